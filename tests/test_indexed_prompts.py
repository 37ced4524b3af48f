"""Megatron indexed datasets as prompts: what a document means, what is refused, and SFT as from a prompt file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.indexed import IndexedWriter
from megatron_tropd.indexed_prompts import read_indexed_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.tokenizer import CharacterTokenizer
from tests.ranks import run_ranks
from tests.test_run import REPOSITORY, _metrics, _weights, config_file

sys.path.insert(0, str(REPOSITORY / "tools"))
import preprocess_data

ALPHABET = "0123456789+="
TOKENIZER = CharacterTokenizer(ALPHABET)  # ids: 1 ends, digit d is d + 2, + is 12, = is 13
DOCUMENTS = [[[3, 12, 4, 13], [5, 1]], [[6, 7, 8, 1]], [[2] * 6, [3, 1]], [[9], [9, 9, 9, 1]]]


def write(folder: Path, documents: list[list[list[int]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    writer = IndexedWriter(folder / "train", vocab_size=14)
    for document in documents:
        writer.write(document)
    writer.close()
    return folder / "train.idx"


def test_documents_as_prompts_and_answers(tmp_path: Path) -> None:
    path = write(tmp_path, DOCUMENTS)
    prompts, num_skipped = read_indexed_prompts(path, TOKENIZER, 5, "skip", max_answer_length=3, source="sums")
    # The third is over the prompt's budget, the fourth over the answer's.
    assert num_skipped == 2 and len(prompts) == 2
    first, text = prompts[0], prompts[1]
    assert (first.id, first.text, first.tokens, first.answer) == ("sums:1", "1+2=", (3, 12, 4, 13), "3")
    assert (first.answer_tokens, first.source) == ((5, 1), "sums")
    assert (text.tokens, text.answer_tokens) == ((6,), (7, 8, 1))
    assert list(prompts.ids) == [prompt.id for prompt in prompts] == ["sums:1", "sums:2"]
    assert prompts[1:] == [text]


def test_a_text_is_a_prompt_where_no_answer_is_asked_for(tmp_path: Path) -> None:
    prompts, num_skipped = read_indexed_prompts(write(tmp_path, DOCUMENTS), TOKENIZER, 6, "refuse")
    assert num_skipped == 0 and [prompt.tokens for prompt in prompts][:2] == [(3, 12, 4, 13), (6, 7, 8)]
    assert [prompt.answer for prompt in prompts] == ["3", "", "1", "777"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[[3], [4]], [[3], [4], [5]]], "document 2 has not one sequence .* or two"),
        ([[[3], [4]], [[], [4]]], "document 2 has an empty prompt"),
        ([[[3], [4]], [[3], []]], "document 2 has no answer"),
        ([[[3]]], "document 1 has no answer"),
        ([[[3], [4]], [[3] * 6, [4]]], "document 2 is over its budget of 5 ids for the prompt and 3 for the answer"),
        ([[[3], [4] * 4]], "document 1 is over its budget .* or set data.long_prompts=skip"),
        ([[[3], [14]]], r"id 14 is not in \[0, 14\), the tokenizer's ids"),
    ],
)
def test_documents_that_cannot_be_learned_are_named(
    tmp_path: Path, documents: list[list[list[int]]], message: str
) -> None:
    path = write(tmp_path, documents)
    with pytest.raises(DataError, match=rf"train\.idx: {message}"):
        read_indexed_prompts(path, TOKENIZER, 5, "refuse", max_answer_length=3)


def test_nothing_left_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, DOCUMENTS[2:3])
    with pytest.raises(DataError, match="all 1 documents are over the length budget"):
        read_indexed_prompts(path, TOKENIZER, 5, "skip")
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin is empty"):
        read_indexed_prompts(path, TOKENIZER, 5, "skip")
    path.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train\.bin"):
        read_indexed_prompts(path, TOKENIZER, 5, "skip")


def _sft(path: str) -> None:
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import sft

    sft(load_config(path))


def test_sft_from_an_indexed_dataset_is_sft_from_the_prompt_file(tmp_path: Path) -> None:
    lines = [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["--tokenizer", ALPHABET, "--tokenizer-kind", "characters", "--format", "indexed", "--quiet"]
    out = ["--input", str(tmp_path / "sums.jsonl"), "--out", str(tmp_path / "sums"), "--workers", "1"]
    assert preprocess_data.main([*out, *names]) == 0
    found = {}
    for name, train in (("jsonl", tmp_path / "sums.jsonl"), ("idx", tmp_path / "sums" / "train.idx")):
        sections: dict[str, Any] = {
            "data": {"train": str(train), "validation": None},
            "training": {"train_iters": 2, "eval_interval": 0},
        }
        path = config_file(tmp_path / name, tmp_path, **sections)
        run_ranks(2, _sft, str(path), timeout=120, init_process_group=False)
        found[name] = _weights(tmp_path / name / "run"), _metrics(tmp_path / name / "run")
    (expected, metrics), (weights, again) = found["jsonl"], found["idx"]
    assert metrics == again and metrics[0]["loss"] > 0
    assert all(torch.equal(tensor, weights[key]) for key, tensor in expected.items())
    other = CharacterTokenizer("".join(reversed(ALPHABET)))
    with pytest.raises(DataError, match="the ids are those of another tokenizer"):
        read_indexed_prompts(tmp_path / "sums" / "train.idx", other, 9, "refuse")
