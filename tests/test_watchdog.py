"""A rank that hangs ends the job under its name; torchrun starts again what was killed, by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tropd.watchdog import EXIT_CODE, find_hung
from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import REPOSITORY, _metrics, config_file

data = test_run.data


def _count_operations() -> tuple[dict[str, int], set[str]]:
    """By process group what this rank has begun after a step whose teacher has its own layout; the message groups."""
    import torch.distributed as dist

    from megatron_tropd.distributed import MESSAGE_GROUPS
    from megatron_tropd.step import forward_backward
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    learner = tiny.build_learner(layout, ahead=(1, 2))
    forward_backward(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=1))
    groups = dist.distributed_c10d._world.pg_names.items()
    return {name: group._get_sequence_number_for_group() for group, name in groups}, MESSAGE_GROUPS


def test_ranks_that_all_joined_have_begun_the_same_operations_but_messages() -> None:
    found = run_ranks(4, _count_operations)
    messages = set().union(*(names for _, names in found))
    unequal = {
        name
        for name in set().union(*(counts for counts, _ in found))
        if len({counts[name] for counts, _ in found if name in counts}) > 1
    }
    assert unequal and unequal <= messages


@pytest.mark.parametrize(
    ("counts", "hung"),
    [
        # Rank 1 has not joined what 0 and 2 wait in.
        ([{"world": 5}, {"world": 4}, {"world": 5}], [1]),
        # 0 waits for 1 in a, which waits for 2 in b; nobody is ahead of 3 and nobody waits for it.
        ([{"a": 9, "w": 3}, {"a": 8, "b": 7, "w": 3}, {"b": 6, "w": 3}, {"w": 3}], [2]),
        # Two ranks have not come.
        ([{"world": 5}, {"world": 4}, {"world": 4}], [1, 2]),
        # Each is ahead of the other: both are named.
        ([{"a": 2, "b": 1}, {"a": 1, "b": 2}], [0, 1]),
    ],
)
def test_the_rank_that_all_others_wait_for_is_found(counts: list[dict[str, int]], hung: list[int]) -> None:
    unequal = {
        name
        for name in {name for count in counts for name in count}
        if len({count[name] for count in counts if name in count}) > 1
    }
    assert find_hung(counts, frozenset(unequal)) == hung


FAULTY_RANK = """
import os, signal, sys, time
from megatron_tropd import trainer
from megatron_tropd.__main__ import main
original = trainer.train_step
def faulty(learner, batch):
    rank, step, what, marker = int(os.environ["RANK"]), int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if batch.step == step and rank == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        if what == "sleep":
            time.sleep(1000)
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[what])
    return original(learner, batch)
trainer.train_step = faulty
if __name__ == "__main__":  # Megatron's writers import this again
    sys.exit(main(sys.argv[4:]))
"""


def _torchrun(folder: Path, config: Path, what: str, *options: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run under torchrun whose rank 1 sleeps, is stopped or is killed in step 3, once; and the seconds it took."""
    script = folder / "faulty.py"
    script.write_text(FAULTY_RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    started = time.monotonic()
    finished = subprocess.run(
        [*torchrun, str(script), "3", what, str(folder / "happened"), "train", str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    return finished, time.monotonic() - started


@pytest.mark.parametrize(
    ("what", "tp", "place"),
    [
        pytest.param("sleep", 1, "did not join", marks=pytest.mark.slow),
        ("sleep", 2, "did not join"),
        pytest.param("stop", 2, "no sign of life", marks=pytest.mark.slow),  # torchrun waits 30 s for what is stopped
    ],
)
def test_a_hung_rank_ends_the_whole_job_and_is_named(
    tmp_path: Path, data: Path, what: str, tp: int, place: str
) -> None:
    parallel = {"tensor_model_parallel_size": tp, "distributed_timeout_minutes": 0.25}
    config = config_file(tmp_path, data, parallel=parallel, training={"eval_interval": 0})
    finished, seconds = _torchrun(tmp_path, config, what)
    assert finished.returncode != 0 and (tmp_path / "happened").exists()
    assert "error: hung: rank 1 in " in finished.stderr and place in finished.stderr, finished.stderr
    assert "hung: rank 0" not in finished.stderr
    assert f"exitcode  : {EXIT_CODE}" in finished.stderr
    if what == "sleep":
        assert "faulty (faulty.py:11)" in finished.stderr
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"
    assert seconds < 150


def test_torchrun_starts_a_killed_run_again_and_it_continues(tmp_path: Path, data: Path) -> None:
    whole, killed = (config_file(tmp_path / name, data) for name in ("whole", "killed"))
    (tmp_path / "happened").write_text("")
    assert _torchrun(tmp_path, whole, "kill")[0].returncode == 0
    (tmp_path / "happened").unlink()
    finished, _ = _torchrun(tmp_path, killed, "kill", "--max-restarts=1")
    assert finished.returncode == 0 and (tmp_path / "happened").exists(), finished.stderr
    assert "resumed from" in finished.stderr
    assert _metrics(tmp_path / "killed" / "run") == _metrics(tmp_path / "whole" / "run")
