"""The tokenizers of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.config import ConfigError
from megatron_tropd.config_data import TokenizerConfig
from megatron_tropd.tiktoken_tokenizer import TiktokenTokenizer
from megatron_tropd.tokenizer import (
    CharacterTokenizer,
    ChatOptions,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerKind,
    huggingface_fingerprint,
)
from megatron_tropd.tokenizer_agreement import TokenizerMismatchError, shared_vocab_size


def build_tokenizers(config: TokenizerConfig) -> tuple[Tokenizer, Tokenizer]:
    """The student's and the teacher's tokenizer. Raises ValueError where they do not agree."""
    chat = ChatOptions(config.chat_template, config.add_generation_prompt, config.chat_template_kwargs)

    def build(model: str | None) -> Tokenizer:
        return build_tokenizer(config.kind, config.alphabet, model, chat, config.megatron_options)

    student = build(config.model)
    if config.teacher is None:
        return student, student
    teacher = build(config.teacher)
    shared_vocab_size(student, teacher, config.special_token_map)
    return student, teacher


def build_tokenizer(
    kind: TokenizerKind,
    alphabet: str,
    model: str | None,
    chat: ChatOptions | None = None,
    megatron_options: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer of a config: ``alphabet`` for characters, ``model`` (a path) for the other kinds.

    ``megatron_options`` go to Megatron's tokenizer class (kind ``tiktoken``).
    """
    if kind == "characters":
        return CharacterTokenizer(alphabet)
    if kind not in _MODELS:
        raise ValueError(f"tokenizer.kind {kind!r} is unknown: characters or {' or '.join(_MODELS)}")
    if model is None:
        raise ValueError(f"tokenizer.kind={kind} needs tokenizer.model, {_MODELS[kind]}")
    if kind == "sentencepiece":
        return SentencePieceTokenizer(model)
    if kind == "huggingface":
        return HuggingFaceTokenizer(model, chat)
    return TiktokenTokenizer(model, megatron_options or {}, chat)


_MODELS = {
    "sentencepiece": "the path of a .model file",
    "huggingface": "a folder with a Hugging Face tokenizer",
    "tiktoken": "the path of a vocabulary in JSON, as Megatron's tiktoken tokenizer reads it",
}


def check_tokenizer(tokenizer: Tokenizer, folder: Path, size: int) -> None:
    """Refuse a Hugging Face model whose embedding has no row for a token, or whose own tokenizer is another."""
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {folder} only {size} rows in its embedding: "
            "use the model's own tokenizer (tokenizer.kind=huggingface)"
        )
    if huggingface_fingerprint(folder) in (None, tokenizer.fingerprint):
        return
    hint = f"{folder} has another tokenizer than this run: set tokenizer.kind=huggingface and tokenizer.model (for the "
    hint += "teacher, tokenizer.teacher) to it"
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(hint)
    try:
        shared_vocab_size(tokenizer, HuggingFaceTokenizer(folder))
    except TokenizerMismatchError as error:
        raise ConfigError(f"{hint}. {error}") from error
