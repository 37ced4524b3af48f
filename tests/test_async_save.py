"""Checkpoints written in the background: sealed when whole, one at a time, and the older one counts until then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import _metrics, _weights, config_file

data = test_run.data
SECONDS = 3.0


def _train(configs: list[str], kill_at: int | None = None) -> list[int]:
    """Train each config; with ``kill_at``, writers of step 4 take long and rank 1 dies in that step.

    Returns the number of writers alive after each step.
    """
    import multiprocessing
    import os
    import signal

    from megatron_tropd import trainer, writing
    from megatron_tropd.config_parser import load_config

    train_step, write, alive = trainer.train_step, writing._write_until_parent_ends, []

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(SECONDS)
        write(*arguments, **options)

    def counted(learner: Any, batch: Any) -> dict[str, float]:
        if kill_at is not None:
            writing._write_until_parent_ends = slow if batch.step >= 3 else write
            if batch.step == kill_at and learner.layout.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        children = multiprocessing.active_children()
        alive.append(sum("Fork" in type(child).__name__ for child in children))
        return train_step(learner, batch)

    trainer.train_step = counted
    for path in configs:
        trainer.train(load_config(path))
    return alive


def test_a_run_that_saves_in_the_background_is_the_run_that_waits(tmp_path: Path, data: Path) -> None:
    from megatron_tropd.integrity import verify

    runs = {name: tmp_path / name / "run" for name in ("whole", "background", "killed")}
    configs = {
        name: str(config_file(tmp_path / name, data, training={"async_save": name != "whole", "keep_checkpoints": 0}))
        for name in runs
    }
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, _train, [configs["killed"]], 4, timeout=200)
    checkpoints = runs["killed"] / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_2", "step_4.incomplete"]
    assert (checkpoints / "latest").read_text() == "step_2"
    time.sleep(SECONDS + 1)
    # A writer ends with its rank: nothing comes into a folder that the restarted run may be writing to.
    assert not list((checkpoints / "step_4.incomplete").glob("*.distcp"))
    found = run_ranks(2, _train, list(configs.values())[::-1], timeout=200)
    assert all(max(alive) <= 1 for alive in found)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_2", "step_4", "step_6"]
    for step in (2, 4, 6):
        verify(runs["background"] / "checkpoints" / f"step_{step}")
    expected = _weights(runs["whole"])
    for name in ("background", "killed"):
        other = _weights(runs[name])
        assert expected.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in expected.items()), name
        assert _metrics(runs[name]) == _metrics(runs["whole"])


def _save_while_training(folder: str) -> list[str]:
    """Saves in the background at steps 1 to 3, the second of which fails on rank 1; what each said."""
    import resource

    import torch.distributed as dist

    from megatron_tropd.checkpoint import CheckpointError, save_checkpoint
    from megatron_tropd.step import train_step
    from megatron_tropd.writing import BackgroundWriter
    from tests import tiny
    from tests.test_checkpoint import _description

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout)
    batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1)
    background, limits, messages = BackgroundWriter(), resource.getrlimit(resource.RLIMIT_FSIZE), []
    for step in (1, 2, 3):
        train_step(learner, batch)
        if step == 2 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            save_checkpoint(Path(folder), learner, _description(step), keep=0, background=background)
            train_step(learner, batch)  # moves the weights that are being written
            background.finish()
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return messages


def test_a_write_that_fails_in_the_background_is_told_on_every_rank_and_the_next_one_works(tmp_path: Path) -> None:
    for first, second, third in run_ranks(2, _save_while_training, str(tmp_path)):
        assert first == third == ""
        assert "step_2.incomplete could not be written (rank 1: " in second, second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]
    assert (tmp_path / "latest").read_text() == "step_3"
