"""Runs with partial rollouts and with over-sampling: killed and continued, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.test_run import _metrics, _train, _train_each, _weights, config_file
from tests.test_run import data as inputs

__all__ = ["inputs"]  # a fixture

ROLLOUTS: dict[str, dict[str, Any]] = {
    "segments": {"partial_tokens": 2},
    "finished": {"partial_tokens": 2, "partial_learn_from": "finished", "over_sampling": 2.5},
    "over": {"over_sampling": 1.5, "engine": "static"},
    "over, dynamic": {"over_sampling": 1.5, "engine": "dynamic"},
    "over, copy": {"over_sampling": 1.5, "tensor_model_parallel_size": 2},
}


def _config(folder: Path, data: Path, name: str, **training: Any) -> Path:
    # Half of the samples begin with a teacher's prefix of two tokens, and end sooner.
    guidance = {"fraction": 0.5, "schedule": "constant", "max_prefix_length": 2}
    sections: dict[str, Any] = {"guidance": guidance, "optimizer": {"lr": 0.02}}
    training = {"train_iters": 4, "eval_interval": 0, "max_log_prob_gap": 1e-4, "log_rollouts": 16, **training}
    return config_file(folder, data, rollout=ROLLOUTS[name], training=training, **sections)


def _stop_and_continue(paths: list[str], train_iters: int) -> None:
    """Every run in two goes, of which the first ends after ``train_iters`` steps."""
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import train

    for path in paths:
        train(load_config(path, [f"--training.train_iters={train_iters}", "--training.save_interval=1"]))
        train(load_config(path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> dict[str, Path]:
    """Run folders by what was done: all kinds on two data-parallel ranks, and the partial ones on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    two = {name: _config(folder / name, inputs, name) for name in ROLLOUTS}
    run_ranks(2, _train_each, [str(path) for path in two.values()], timeout=120)
    one = {f"{name} 1": _config(folder / f"{name}_1", inputs, name) for name in ("segments", "finished")}
    run_ranks(1, _train_each, [str(path) for path in one.values()], timeout=120)
    return {name: path.parent / "run" for name, path in (two | one).items()}


def _samples(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def test_a_run_killed_with_paused_samples_continues_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, inputs: Path
) -> None:
    import torch

    killed = {name: _config(tmp_path / name, inputs, name, save_interval=2) for name in ("segments", "finished")}
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, str(killed["finished"]), 3, timeout=120, init_process_group=False)
    checkpoints = tmp_path / "finished" / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_2"
    head, *paused = [json.loads(line) for line in (checkpoints / "step_2" / "paused_rollouts.jsonl").open()]
    # 40 in flight, 16 learned from: every step after the first begins 16, and 24 are left over.
    assert head == {"next_sample": 40 + 16} and len(paused) == 24 and all(sample["versions"] for sample in paused)
    run_ranks(2, _train_each, [str(killed["finished"])], timeout=120)
    run_ranks(2, _stop_and_continue, [str(killed["segments"])], 3, timeout=120)
    for name in killed:
        whole, resumed = runs[name], tmp_path / name / "run"
        expected, found = _weights(whole), _weights(resumed)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)
        assert _metrics(whole) == _metrics(resumed)
        assert all(_samples(whole, step) == _samples(resumed, step) for step in range(4))


@pytest.mark.parametrize("name", ["segments", "finished"])
def test_one_rank_and_two_take_the_same_steps(runs: dict[str, Path], name: str) -> None:
    layout = {"padding_share", "rollout_imbalance"}  # how the work is spread
    for one, two in zip(_metrics(runs[f"{name} 1"]), _metrics(runs[name]), strict=True):
        assert one.keys() == two.keys()
        assert {k: v for k, v in one.items() if k not in layout} == pytest.approx(
            {k: v for k, v in two.items() if k not in layout}, rel=1e-3, abs=1e-5
        )


def test_segments_are_strictly_on_policy(runs: dict[str, Path]) -> None:
    steps = _metrics(runs["segments"])[:-1]
    for step in steps:
        assert step["stale_token_share"] == 0 and step["log_prob_gap_max"] < 1e-4 and step["clipped_ratio_share"] == 0
        assert step["response_length"] <= 2 and step["rollout_rounds"] == 1
    assert steps[0]["new_samples"] == 16 and steps[0]["max_version_lag"] == 0
    assert all(0 < step["new_samples"] < 16 for step in steps[1:])
    assert steps[2]["max_version_lag"] == 2  # a budget of 5 tokens takes three steps
    continued = [sample for sample in _samples(runs["segments 1"], 1) if "earlier" in sample]
    before = {sample["sample_id"]: sample for sample in _samples(runs["segments 1"], 0)}
    assert continued and all(s["earlier"] == before[s["sample_id"]]["response"] for s in continued)


def test_stale_tokens_of_whole_responses_take_ppos_ratio(runs: dict[str, Path]) -> None:
    first, *later = _metrics(runs["finished"])[:-1]
    assert first["stale_token_share"] == 0 and first["rollout_age"] == 0
    for step in later:
        assert 0 < step["stale_token_share"] < 1 and step["max_version_lag"] >= 1 and step["rollout_age"] > 0
        # The engine sampled the stale ones with other weights, and the new ones with those of the trainer.
        assert step["stale_log_prob_gap"] > 1e-3 and step["log_prob_gap_max"] < 1e-4
    assert any(step["clipped_ratio_share"] > 0 for step in later)
    assert all(step["finished_share"] <= 1 and step["new_samples"] == 16 for step in later)
    stale = [sample for sample in _samples(runs["finished"], 1) if len(sample["versions"]) > 1]
    assert stale and all([version for version, _ in sample["versions"]] == [0, 1] for sample in stale)


def test_over_sampling_drops_the_long_ones(runs: dict[str, Path]) -> None:
    steps = _metrics(runs["over"])[:-1]
    for index, step in enumerate(steps):
        assert 0 < step["dropped_token_share"] < 0.6 and step["stale_token_share"] == 0
        ids = {sample["sample_id"] for sample in _samples(runs["over"], index)}
        assert len(ids) == 8 and ids <= set(range(24 * index, 24 * (index + 1)))  # of the 12 of rank 0
        assert [(one["sample_id"], one["response"]) for one in _samples(runs["over, dynamic"], index)] == [
            (one["sample_id"], one["response"]) for one in _samples(runs["over"], index)
        ]


def test_over_sampling_on_a_copy_chooses_among_all_that_its_replica_generates(runs: dict[str, Path]) -> None:
    steps = _metrics(runs["over, copy"])[:-1]
    for index, step in enumerate(steps):
        assert 0 < step["dropped_token_share"] < 0.6 and step["stale_token_share"] == 0
        assert step["rollout_imbalance"] == 1  # one replica of the copy, two of the trainer
        ids = {sample["sample_id"] for sample in _samples(runs["over, copy"], index)}
        assert len(ids) == 8 and ids <= set(range(24 * index, 24 * (index + 1)))
    apart, together = (
        {one["sample_id"]: one["response"] for one in _samples(runs[name], 0)} for name in ("over", "over, copy")
    )
    both = apart.keys() & together.keys()
    assert both and all(apart[sample] == together[sample] for sample in both)
