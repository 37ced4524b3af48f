"""A rank that hangs ends the job under its name; torchrun starts again what was killed, by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.watchdog import EXIT_CODE, Watchdog, counts_of, find_hung
from tests import test_run
from tests.ranks import run_ranks
from tests.test_run import REPOSITORY, _exit_report, _metrics, config_file

data = test_run.data


def _reports(tp: int, pp: int, ahead: tuple[int, int] | None) -> dict[str, Any]:
    """What this rank's watchdog reports after a step and a few responses."""
    from megatron_tropd.config_rollout import RolloutConfig
    from megatron_tropd.rollout import build_engine
    from megatron_tropd.step import forward_backward
    from tests import tiny
    from tests.test_rollout import BUDGET, requests

    layout = tiny.start(tp=tp, pp=pp)
    watchdog = Watchdog(layout, timeout_seconds=60)
    watchdog.start()
    student = replace(tiny.STUDENT, num_layers=4)
    learner = tiny.build_learner(layout, student=student, ahead=ahead)
    forward_backward(learner, tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2))
    engine = build_engine(learner.stage.module, layout, RolloutConfig(), vocab_size=tiny.VOCAB_SIZE, eos_id=0, seed=1)
    engine.generate(requests(4)[2:], max_response_length=BUDGET)
    report = watchdog.report()
    watchdog.stop()
    return report


@pytest.mark.parametrize(("tp", "pp", "ahead"), [(1, 4, None), (2, 1, (1, 2))])
def test_ranks_that_all_joined_have_begun_the_same_operations_and_messages(
    tp: int, pp: int, ahead: tuple[int, int] | None
) -> None:
    reports = run_ranks(4, _reports, tp, pp, ahead)
    pairs = {pair for report in reports for pair in report["messages"]}
    if ahead is None:  # each stage to the next and, with gradients, to the one before
        assert pairs == {"0>1", "1>0", "1>2", "2>1", "2>3", "3>2"}
    assert len(pairs) >= 4
    counts = counts_of(reports)
    for name in set().union(*counts):
        numbers = {count[name] for count in counts if name in count}
        assert len(numbers) == 1, (name, counts)
        assert name not in pairs or numbers != {0}
    # One end of a message that the other has not come to waits for it.
    reports[0]["messages"][min(pairs)] -= 1
    assert find_hung(counts_of(reports), frozenset(pairs)) == [0]


@pytest.mark.parametrize(
    ("counts", "hung"),
    [
        # Rank 1 has not joined what 0 and 2 wait in.
        ([{"world": 5}, {"world": 4}, {"world": 5}], [1]),
        # 0 waits for 1 in a, which waits for 2 in b; nobody is ahead of 3 and nobody waits for it.
        ([{"a": 9, "w": 3}, {"a": 8, "b": 7, "w": 3}, {"b": 6, "w": 3}, {"w": 3}], [2]),
        # Two ranks have not come.
        ([{"world": 5}, {"world": 4}, {"world": 4}], [1, 2]),
        # 3 has not answered 2, for whom 1 waits, and for that one 0; the other replica's ranks wait in a collective.
        (
            [
                {"d0": 1, "0>1": 5, "1>0": 5},
                {"d1": 1, "0>1": 4, "1>0": 4, "1>2": 5, "2>1": 5},
                {"d2": 1, "1>2": 4, "2>1": 4, "2>3": 4, "3>2": 4},
                {"d3": 1, "2>3": 3, "3>2": 3},
                {"d0": 2},
                {"d1": 2},
                {"d2": 2},
                {"d3": 2},
            ],
            [3],
        ),
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
from megatron_tropd import step, trainer
from megatron_tropd.__main__ import main
rank, what, marker = int(sys.argv[1]), sys.argv[2], sys.argv[3]
train_step, forward_step = trainer.train_step, step._forward_step
now, num_forwards = -1, 0
def fail():
    open(marker, "w").close()
    if what in ("sleep", "schedule"):
        time.sleep(1000)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[what])
def is_due():
    return now == 3 and int(os.environ["RANK"]) == rank and not os.path.exists(marker)
def faulty_step(learner, batch):
    global now
    now = batch.step
    if is_due() and what != "schedule":
        fail()
    return train_step(learner, batch)
def faulty_forward(*arguments):
    global num_forwards
    num_forwards += now == 3
    if is_due() and what == "schedule" and num_forwards == 2:
        fail()
    return forward_step(*arguments)
trainer.train_step, step._forward_step = faulty_step, faulty_forward
if __name__ == "__main__":  # Megatron's writers import this again
    sys.exit(main(sys.argv[4:]))
"""


def _torchrun(
    folder: Path, config: Path, what: str, *options: str, rank: int = 1
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run under torchrun one rank of which fails in step 3, once; and the seconds it took.

    It sleeps before the schedule or, under ``schedule``, in its second micro-batch; it is stopped; or it is killed.
    """
    script = folder / "faulty.py"
    script.write_text(FAULTY_RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    started = time.monotonic()
    finished = subprocess.run(
        [*torchrun, str(script), str(rank), what, str(folder / "happened"), "train", str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    return finished, time.monotonic() - started


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "rank", "layout", "place"),
    [
        pytest.param("sleep", 1, {}, "did not join", marks=SLOW),
        ("sleep", 1, {"tensor_model_parallel_size": 2}, "did not join"),
        ("schedule", 0, {"pipeline_model_parallel_size": 2}, "did not join"),  # the other waits to receive
        pytest.param("sleep", 1, {"pipeline_model_parallel_size": 2}, "did not join", marks=SLOW),  # waits to send
        # torchrun waits 30 s for what is stopped
        pytest.param("stop", 1, {"tensor_model_parallel_size": 2}, "no sign of life", marks=SLOW),
    ],
)
def test_a_hung_rank_ends_the_whole_job_and_is_named(
    tmp_path: Path, data: Path, what: str, rank: int, layout: dict[str, int], place: str
) -> None:
    parallel = {**layout, "distributed_timeout_minutes": 0.25}
    config = config_file(tmp_path, data, parallel=parallel, training={"eval_interval": 0})
    finished, seconds = _torchrun(tmp_path, config, what, rank=rank)
    assert finished.returncode != 0 and (tmp_path / "happened").exists()
    assert f"error: hung: rank {rank} in " in finished.stderr and place in finished.stderr, finished.stderr
    assert f"hung: rank {1 - rank}" not in finished.stderr and "; rank" not in finished.stderr
    assert f"exitcode  : {EXIT_CODE}" in finished.stderr
    if what != "stop":
        assert "fail (faulty.py:11)" in finished.stderr
    for reporting in range(2) if what != "stop" else [1 - rank]:
        report = _exit_report(tmp_path / "run", reporting)
        assert report["outcome"] == "hung" and f"hung: rank {rank} in " in report["message"]
        assert (report["step"], report["steps_done"]) == (3, 3)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"
    assert seconds < 150


def test_torchrun_starts_a_killed_run_again_and_it_continues(tmp_path: Path, data: Path) -> None:
    config = config_file(tmp_path, data, training={"keep_checkpoints": 1, "keep_every": 4})
    finished, _ = _torchrun(tmp_path, config, "kill", "--max-restarts=1")
    assert finished.returncode == 0 and (tmp_path / "happened").exists(), finished.stderr
    assert "resumed from" in finished.stderr
    assert [line["step"] for line in _metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_4", "step_6"]
    assert (checkpoints / "latest").read_text() == "step_6"
