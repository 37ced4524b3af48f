"""Mixtures of prompt files: shares, epochs, the order as a function of the place, and metrics of each source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_tropd.batch import build_batch
from megatron_tropd.data import PromptOrder, read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.metrics import SOURCE_NAMES, SUM_NAMES, source_metrics, token_sums
from megatron_tropd.mixture import BLOCK, MixtureOrder, read_mixture
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import CharacterTokenizer
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks
from tests.test_run import _metrics, _train, _weights, config_file

TOKENIZER = CharacterTokenizer("0123456789+=")


def read(max_prompt_length: int, long_prompts: Literal["refuse", "skip"]) -> Any:
    def read_one(path: str, source: str) -> tuple[list[Prompt], int]:
        return read_prompts(path, TOKENIZER, max_prompt_length, long_prompts, source=source)

    return read_one


def write_prompts(path: Path, count: int, **extra: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": f"{index}+{index % 7}=", "answer": str(index + index % 7), **extra} for index in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_block_has_every_sources_share() -> None:
    order = MixtureOrder(sizes=(50, 7, 300), weights=(6.0, 1.0, 3.0), seed=3)
    for block in range(4):
        counts = Counter(source for source, _ in order.indices(block * BLOCK, BLOCK))
        for source, share in enumerate((0.6, 0.1, 0.3)):
            assert abs(counts[source] - share * BLOCK) < 1
    counts = Counter(source for source, _ in order.indices(0, 40 * BLOCK))
    assert all(abs(counts[s] / (40 * BLOCK) - share) < 2e-4 for s, share in enumerate((0.6, 0.1, 0.3)))
    # Also one that has less than a place in a block: a place in every fourth, on average.
    rare = MixtureOrder(sizes=(10, 10), weights=(4 * BLOCK - 1.0, 1.0), seed=1)
    assert 8 <= Counter(source for source, _ in rare.indices(0, 80 * BLOCK))[1] <= 32


def test_a_source_goes_through_its_own_shuffled_epochs() -> None:
    order = MixtureOrder(sizes=(50, 7), weights=(1.0, 1.0), seed=3)
    places = order.indices(0, 3 * BLOCK)
    for source, size in ((0, 50), (1, 7)):
        taken = [index for chosen, index in places if chosen == source]
        assert taken == PromptOrder(size, 3, source).indices(0, len(taken))
        assert sorted(taken[:size]) == sorted(taken[size : 2 * size]) == list(range(size))
        assert order.epochs(3 * BLOCK)[source] == len(taken) / size
    assert PromptOrder(50, 3, 0).indices(0, 50) != PromptOrder(50, 3, 1).indices(0, 50)


def test_a_place_needs_only_its_position() -> None:
    order = MixtureOrder(sizes=(5, 9), weights=(2.0, 1.0), seed=8)
    whole = order.indices(0, 3000)
    for start, count in ((0, 5), (1000, 100), (1024, 1), (2047, 2), (2990, 10), (7, 0)):
        again = MixtureOrder(sizes=(5, 9), weights=(2.0, 1.0), seed=8)
        assert again.indices(start, count) == whole[start : start + count]
        taken = Counter(source for source, _ in whole[:start])
        assert again.epochs(start) == [taken[0] / 5, taken[1] / 9]
    assert whole != MixtureOrder(sizes=(5, 9), weights=(2.0, 1.0), seed=9).indices(0, 3000)
    # One source alone is the plain order.
    assert MixtureOrder((9,), (2.0,), 8).indices(4, 20) == [(0, i) for i in PromptOrder(9, 8).indices(4, 20)]


def test_reading_a_mixture(tmp_path: Path) -> None:
    first, second = write_prompts(tmp_path / "a" / "train.jsonl", 5), write_prompts(tmp_path / "b" / "train.jsonl", 20)
    weights = {str(first): 3.0, str(second): 1}
    mixture, skipped = read_mixture(weights, read(4, "skip"), seed=1, prompts_per_step=8)
    assert mixture.source_names == ("a/train", "b/train") and skipped == {str(first): 0, str(second): 10}
    assert [prompt.id for prompt in mixture.prompts[:6]] == [*(f"a/train:{n}" for n in range(1, 6)), "b/train:1"]
    counts = Counter(prompt.source for step in range(128) for prompt in mixture.of_batch(step))
    assert counts == {"a/train": 768, "b/train": 256}
    assert mixture.epochs(127) == {"epoch/a/train": 768 / 5, "epoch/b/train": 256 / 10}
    alone, _ = read_mixture({str(first): 1.0}, read(4, "refuse"), seed=1, prompts_per_step=2)
    assert alone.source_names == () and alone.epochs(3) == {} and alone.prompts[0].id == "1"
    assert [prompt.id for prompt in alone.of_batch(1)] == [str(i + 1) for i in PromptOrder(5, 1).indices(2, 2)]


def test_mixture_refusals(tmp_path: Path) -> None:
    first = write_prompts(tmp_path / "a.jsonl", 1, id="same")
    second = write_prompts(tmp_path / "b.jsonl", 1, id="same")
    with pytest.raises(DataError, match=r"b.jsonl: id 'same' is also in .*a.jsonl: ids must differ"):
        read_mixture({str(first): 1, str(second): 1}, read(9, "refuse"))
    with pytest.raises(DataError, match="absent.jsonl: No such file"):
        read_mixture({str(first): 1, str(tmp_path / "absent.jsonl"): 1}, read(9, "refuse"))
    with pytest.raises(DataError, match="names a file twice"):
        read_mixture({str(first): 1, f"{tmp_path}/./a.jsonl": 1}, read(9, "refuse"))


def test_sums_of_each_source_by_hand() -> None:
    def rollout(sample: int, source: str, prefix: int, response: int) -> Rollout:
        request = RolloutRequest(sample, Prompt(str(sample), "", (3, 4), "", source=source), (5,) * prefix)
        return Rollout(request, (6,) * response, (0.0,) * response, finished=True)

    rollouts = [rollout(0, "math", 1, 2), rollout(1, "code", 0, 2), rollout(2, "math", 1, 0)]
    batch = build_batch(
        rollouts, step=0, seed=0, micro_batch_size=4, num_micro_batches=1, pad_id=0, max_sequence_length=9,
        source_names=("code", "math"),
    )  # fmt: skip
    (micro_batch,) = batch.micro_batches
    # Rows by length: sample 0 (guidance, two on-policy), 1 (two on-policy), 2 (guidance), and one of padding.
    assert micro_batch.sources_N is not None and micro_batch.sources_N.tolist() == [1, 1, 1, 0, 0, 1]
    report = {
        "student_log_prob": torch.zeros(6),
        "outlier": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        "reward": torch.tensor([9.0, 0.5, -1.5, 2.0, 4.0, 9.0]),
        "p_trust": torch.ones(6),
        "student_entropy": torch.ones(6),
        "teacher_entropy": torch.ones(6),
    }
    sums = token_sums(micro_batch, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), torch.tensor(6), report)
    names = [f"{name}/{source}" for name in SOURCE_NAMES for source in ("code", "math")]
    of_sources = dict(zip(names, sums[len(SUM_NAMES) : len(SUM_NAMES) + len(names)].tolist(), strict=True))
    assert source_metrics(of_sources, ("code", "math")) == {
        "token_share/code": 2 / 6,
        "loss/code": 24 / 2,
        "reward/code": 6 / 2,
        "outlier_share/code": 0.0,
        "token_share/math": 4 / 6,
        "loss/math": 39 / 4,
        "reward/math": -1.0 / 2,
        "outlier_share/math": 1 / 2,
    }


def test_a_killed_run_on_a_mixture_continues_with_the_same_prompts(tmp_path: Path) -> None:
    write_prompts(tmp_path / "easy.jsonl", 9)
    write_prompts(tmp_path / "hard.jsonl", 40)
    write_prompts(tmp_path / "validation.jsonl", 5)
    train = {str(tmp_path / "easy.jsonl"): 1, str(tmp_path / "hard.jsonl"): 3}
    changes: dict[str, Any] = {"data": {"train": train}, "guidance": {"schedule": "none", "answers": None}}
    whole = config_file(tmp_path / "whole", tmp_path, **changes)
    run_ranks(2, _train, str(whole), None, timeout=200, init_process_group=False)
    killed = config_file(tmp_path / "killed", tmp_path, **changes)
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, str(killed), 3, timeout=200, init_process_group=False)
    run_ranks(2, _train, str(killed), None, timeout=200, init_process_group=False)
    expected, found = _weights(tmp_path / "whole" / "run"), _weights(tmp_path / "killed" / "run")
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    metrics = _metrics(tmp_path / "whole" / "run")
    assert metrics == _metrics(tmp_path / "killed" / "run")
    for line in metrics[:-1]:
        assert line["token_share/easy"] + line["token_share/hard"] == pytest.approx(1)
        parts = [line[f"token_share/{name}"] * line.get(f"loss/{name}", 0.0) for name in ("easy", "hard")]
        assert sum(parts) == pytest.approx(line["loss"], rel=1e-6)
    # 6 steps of 8 prompts; the last line is an evaluation alone.
    epochs = metrics[-2]["epoch/easy"] * 9 + metrics[-2]["epoch/hard"] * 40
    assert epochs == pytest.approx(48) and metrics[-2]["epoch/hard"] < 1
