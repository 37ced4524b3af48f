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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_steps_are_skipped_or_rolled_back_alike_on_every_rank(
    tmp_path: Path,
    data: Path,
    layout: str,
) -> None:
    skip = _config(tmp_path / "skip", data, layout, on_refused="skip", max_dumped_samples=3)
    back = _config(tmp_path / "back", data, layout, on_refused="rollback")
    stop = _config(tmp_path / "stop", data, layout)
    few = _config(tmp_path / "few", data, layout, on_refused="skip", max_refused_steps=0)
    first, second = run_ranks(2, _train, [skip, back, stop, few], timeout=200)
    assert first == second
    skipped, rolled_back, stopped, limited = first
    assert skipped["error"] == "" and skipped["num_refused"] >= 1 and skipped["calls"] == 8
    lines = _metrics(tmp_path / "skip" / "run")
    refused = [line for line in lines if "refused_steps" in line]
    assert [line["refused_steps"] for line in refused] == list(range(1, skipped["num_refused"] + 1))
    assert all("loss" not in line for line in refused)
    # The 3 worst of a global batch for each refused step, and nothing else.
    assert len(_samples(tmp_path / "skip" / "run" / "refused")) == 3 * len(refused)

    assert rolled_back["error"] == "" and rolled_back["num_refused"] >= 1
    assert rolled_back["calls"] == 8 + rolled_back["batches_ahead"], "as many more batches as were gone back for"
    lines = _metrics(tmp_path / "back" / "run")
    assert [line["step"] for line in lines] == list(range(9)) and not any("refused_steps" in line for line in lines)
    # No prompt of a refused step is trained on: its samples are in no step's file.
    trained = _samples(tmp_path / "back" / "run" / "rollouts")
    assert trained.isdisjoint(_samples(tmp_path / "back" / "run" / "refused")) and len(trained) >= 8 * 8

    for end, folder in ((stopped, "stop"), (limited, "few")):
        assert f"guard.max_grad_norm_ratio {RATIO} times its median over the last" in end["error"]
        assert end["num_refused"] == 1 and list((tmp_path / folder / "run" / "refused").iterdir())
    assert "more than guard.max_refused_steps 0" in limited["error"]


def test_a_killed_run_resumes_with_its_guard_and_its_rollbacks_bit_for_bit(
    tmp_path: Path,
    data: Path,
) -> None:
    import torch

    whole = _config(tmp_path / "whole", data, "dp2", on_refused="rollback")
    killed = _config(tmp_path / "killed", data, "dp2", on_refused="rollback")
    (end,), _ = run_ranks(2, _train, [whole], timeout=200, init_process_group=False)
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, [killed], end["calls"] - 1, timeout=200, init_process_group=False)
    (resumed,), _ = run_ranks(2, _train, [killed], timeout=200, init_process_group=False)
    assert end["num_refused"] >= 1 and 0 < resumed["calls"] < end["calls"]
    assert {**resumed, "calls": 0} == {**end, "calls": 0}
    expected, found = _weights(tmp_path / "whole" / "run"), _weights(tmp_path / "killed" / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert _metrics(tmp_path / "whole" / "run") == _metrics(tmp_path / "killed" / "run")
