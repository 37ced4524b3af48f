"""The numerics guard: what it refuses, what follows, and that a restart changes none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.config_watch import GuardConfig
from megatron_tropd.guard import ExplodingError, Guard
from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import _metrics, _weights, config_file

data = test_run.data


def _decisions(guard: Guard, numbers: list[tuple[float, float]]) -> list[str]:
    found = []
    for step, (loss, grad_norm) in enumerate(numbers):
        try:
            guard.check(step, loss, grad_norm)
            found.append("taken")
        except ExplodingError as error:
            found.append("loss" if "|loss|" in str(error) else "gradient")
    return found


def test_a_step_is_judged_by_the_medians_of_the_accepted_ones() -> None:
    guard = Guard(GuardConfig(max_loss_ratio=3, max_grad_norm_ratio=2, window=4))
    # Medians of |loss|: of (1, 9) = 5, then of (1, 9, 2) = 2. The first two are taken whatever they are.
    numbers = [(1.0, 1.0), (-9.0, 1.0), (2.0, 1.0), (-6.5, 1.0), (-6.0, 1.0), (2.0, 2.5), (2.0, 2.0)]
    assert _decisions(guard, numbers) == ["taken", "taken", "taken", "loss", "taken", "gradient", "taken"]


def test_a_guard_without_limits_takes_everything_and_one_restored_decides_as_before() -> None:
    numbers = [(1.0, 1.0), (2.0, 1.1), (1e9, 1e9), (1.5, 0.3), (7.0, 2.3), (0.1 + 0.2, 1.0)]
    assert set(_decisions(Guard(GuardConfig()), numbers)) == {"taken"}
    config = GuardConfig(max_loss_ratio=2, max_grad_norm_ratio=2, window=4)
    whole, first, second = Guard(config), Guard(config), Guard(config)
    expected = _decisions(whole, numbers)
    found = _decisions(first, numbers[:3])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + _decisions(second, numbers[3:]) == expected
    assert second.state_dict() == whole.state_dict()
    assert {"taken", "loss"} <= set(expected)


# ------------------------------------------------------------------------------------------------ whole runs, two ranks

TRAINING = {"train_iters": 8, "eval_interval": 0, "save_interval": 2, "log_rollouts": 16}
RATIO = 1.2
LAYOUTS = {"tp2": {"tensor_model_parallel_size": 2}, "dp2": {}}


def _train(configs: list[str], die_after: int | None = None) -> list[dict[str, Any]]:
    """Train each config; what this rank ends with. Dies after the step ``die_after`` (counting repeated ones)."""
    import os
    import signal

    from megatron_tropd import trainer
    from megatron_tropd.config_parser import load_config

    ends: list[dict[str, Any]] = []
    learners = []
    build, one_step, calls = trainer.build_learner, trainer._one_step, 0

    def remember(*arguments: Any, **options: Any) -> Any:
        learners.append(build(*arguments, **options))
        return learners[-1]

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        if calls == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return one_step(*arguments)

    trainer.build_learner, trainer._one_step = remember, counted
    try:
        for path in configs:
            calls = 0
            error = ""
            try:
                trainer.train(load_config(path))
            except ValueError as refusal:
                error = str(refusal)
            ends.append({"error": error, "calls": calls, **learners[-1].guard.state_dict()})
    finally:
        trainer.build_learner, trainer._one_step = build, one_step
    return ends


def _config(folder: Path, inputs: Path, layout: str, **guard: Any) -> str:
    """A run whose gradient norms, which scatter as those of small batches do, cross the limit every few steps."""
    guard = {"max_grad_norm_ratio": RATIO, "window": 4, "replica_check_interval": 1, **guard}
    sections = {"parallel": LAYOUTS[layout], "training": TRAINING, "guidance": {"schedule": "none"}}
    return str(config_file(folder, inputs, **sections, guard=guard))


def _samples(folder: Path) -> set[int]:
    return {json.loads(line)["sample_id"] for file in folder.iterdir() for line in file.read_text().splitlines()}


RUNS: dict[str, dict[str, Any]] = {
    "skip": {"on_refused": "skip", "max_dumped_samples": 3},
    "back": {"on_refused": "rollback"},
    "stop": {},
    "few": {"on_refused": "skip", "max_refused_steps": 0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[tuple[str, str], dict[str, Any]]]:
    """Whole runs: their folder, and how each (layout, name) ended, which is the same on both ranks."""
    folder = tmp_path_factory.mktemp("runs")
    names = [("dp2", name) for name in RUNS] + [("tp2", "skip"), ("tp2", "back")]
    configs = [_config(folder / layout / name, data, layout, **RUNS[name]) for layout, name in names]
    first, second = run_ranks(2, _train, configs, timeout=300)
    assert first == second
    return folder, dict(zip(names, first, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_steps_are_skipped_or_rolled_back_alike_on_every_rank(
    runs: tuple[Path, dict[tuple[str, str], dict[str, Any]]], layout: str
) -> None:
    folder, ends = runs[0] / layout, runs[1]
    skipped, rolled_back = ends[layout, "skip"], ends[layout, "back"]
    assert skipped["error"] == "" and skipped["num_refused"] >= 1 and skipped["calls"] == 8
    lines = _metrics(folder / "skip" / "run")
    refused = [line for line in lines if "refused_steps" in line]
    assert [line["refused_steps"] for line in refused] == list(range(1, skipped["num_refused"] + 1))
    assert all("loss" not in line for line in refused)
    # The 3 worst of a global batch for each refused step, and nothing else.
    assert len(_samples(folder / "skip" / "run" / "refused")) == 3 * len(refused)

    assert rolled_back["error"] == "" and rolled_back["num_refused"] >= 1
    assert rolled_back["calls"] == 8 + rolled_back["batches_ahead"], "as many more batches as were gone back for"
    lines = _metrics(folder / "back" / "run")
    assert [line["step"] for line in lines] == list(range(9)) and not any("refused_steps" in line for line in lines)
    # No prompt of a refused step is trained on: its samples are in no step's file.
    trained = _samples(folder / "back" / "run" / "rollouts")
    assert trained.isdisjoint(_samples(folder / "back" / "run" / "refused")) and len(trained) >= 8 * 8


@pytest.mark.parametrize("name", ["stop", "few"])
def test_a_refused_step_or_one_too_many_ends_the_run(
    runs: tuple[Path, dict[tuple[str, str], dict[str, Any]]], name: str
) -> None:
    end = runs[1]["dp2", name]
    assert f"guard.max_grad_norm_ratio {RATIO} times its median over the last" in end["error"]
    assert end["num_refused"] == 1 and list((runs[0] / "dp2" / name / "run" / "refused").iterdir())
    assert ("more than guard.max_refused_steps 0" in end["error"]) == (name == "few")


def test_a_killed_run_resumes_with_its_guard_and_its_rollbacks_bit_for_bit(
    runs: tuple[Path, dict[tuple[str, str], dict[str, Any]]], tmp_path: Path, data: Path
) -> None:
    import torch

    end, whole = runs[1]["dp2", "back"], runs[0] / "dp2" / "back" / "run"
    killed = _config(tmp_path, data, "dp2", **RUNS["back"])
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, [killed], end["calls"] - 1, timeout=200)
    (resumed,), _ = run_ranks(2, _train, [killed], timeout=200)
    assert end["num_refused"] >= 1 and 0 < resumed["calls"] < end["calls"]
    assert {**resumed, "calls": 0} == {**end, "calls": 0}
    expected, found = _weights(whole), _weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert _metrics(whole) == _metrics(tmp_path / "run")
