"""The sections of the configuration about text: tokenizers and prompt files. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids; shared by student and teacher."""

    kind: Literal["characters", "sentencepiece", "huggingface", "tiktoken"] = "characters"
    """One id per character of an alphabet, a SentencePiece model file, a folder with a Hugging Face tokenizer, or a
    tiktoken vocabulary in the JSON that Megatron reads."""
    alphabet: str = "0123456789+-=., abcdefghijklmnopqrstuvwxyz"
    """kind=characters: the characters, in id order; id 0 is padding, 1 is end of text, characters follow from 2."""
    model: str | None = None
    """kind=sentencepiece: path of the .model file; kind=huggingface: the folder; kind=tiktoken: the JSON file."""
    teacher: str | None = None
    """The teacher's own tokenizer, of the same kind; None: the student's. It may have more ids at the end, or fewer;
    anything else is refused. Only the shared ids take part in the loss."""
    special_token_map: dict[str, str] = field(default_factory=dict)
    """Special tokens that the teacher has under another name or id, as {"<|endoftext|>": "<|im_end|>"}, the student's
    first: the teacher reads the second for the first, and judges the first by its probability of the second."""
    chat_template: str | None = None
    """Path of a Jinja template for prompts given as messages; None: the tokenizer's own."""
    add_generation_prompt: bool = True
    """Open the assistant's message at the end of such a prompt."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What else the template reads, as {"enable_thinking": false}."""
    megatron_options: dict[str, Any] = field(default_factory=dict)
    """kind=tiktoken: options of Megatron's class (num_special_tokens, special_tokens, pattern, vocab_size)."""


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from. Files are JSONL: {"prompt": str or "messages": [...], "answer": str (optional),
    "id": str (optional)}, and what the line's verifier needs (docs/evaluation.md)."""

    train: str | dict[str, float]
    """JSONL of training prompts; or the .idx of a Megatron indexed dataset (docs/data.md); or reasoning-gym:train, the
    tasks of the section tasks; or a mixture of several,
    {"math.jsonl": 3, "reasoning-gym:train": 1}, where a source's weight is its share of the prompts. Each source is
    shuffled anew whenever it has been through."""
    validation: str | None = None
    """JSONL of held-out prompts with answers, or reasoning-gym:validation; None: no evaluation."""
    max_prompt_length: int = 1024
    """Token budget of a prompt."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """A longer prompt is an error, or is skipped and counted."""
    verifier: Literal["exact", "number", "math", "choice", "python"] = "exact"
    """What judges a response where the line has no "verifier" of its own: the same text, the same number, LaTeX maths
    (math-verify), the same letter, or a program that passes the line's "tests"."""
    prompt_key: str = "prompt"
    """Key of the prompt in every line ("problem", "question" in public sets)."""
    answer_key: str = "answer"
    """Key of the reference answer."""
    prompt_template: str = "{prompt}"
    """The text the model is given; {prompt} stands for the line's prompt (with its choices listed below it)."""
