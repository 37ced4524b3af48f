"""Signals that reach everything a rank has started: SIGTERM saves, SIGKILL leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import test_run
from tests.ranks import _environment, run_ranks
from tests.test_run import REPOSITORY, _exit_report, config_file

data = test_run.data


class _Ranks:
    """Two ranks of `train`, each the leader of a process group of its own."""

    def __init__(self, config: Path, output: Path):
        self.output = output
        with output.open("w") as file:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "megatron_tropd", "train", str(config)],
                    stdout=file,
                    stderr=file,
                    cwd=REPOSITORY,
                    env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                )
                for environment in [_environment(2)]
                for rank in range(2)
            ]

    def wait_for(self, path: Path) -> None:
        """Until the file is there."""
        deadline = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < deadline, self.output.read_text()
            assert all(process.poll() is None for process in self.processes), self.output.read_text()
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """To every process of both groups, ``number``."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def in_their_groups(self) -> list[psutil.Process]:
        """What the ranks have started and is still there, and they themselves."""
        groups = {process.pid for process in self.processes}
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@pytest.fixture
def ranks(request: pytest.FixtureRequest, tmp_path: Path, data: Path) -> Iterator[_Ranks]:
    """A run without end that saves every other step, once it has saved step 2."""
    training = {"train_iters": 10_000, "eval_interval": 0, "async_save": request.param}
    started = _Ranks(config_file(tmp_path, data, training=training), tmp_path / "output.txt")
    try:
        started.wait_for(tmp_path / "run" / "checkpoints" / "step_2")
        yield started
    finally:
        started.signal(signal.SIGKILL)


def _evaluate_until_told_to_stop(path: str) -> None:
    from megatron_tropd import evaluate
    from megatron_tropd.config_parser import load_config

    evaluate.evaluate_prompts = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    evaluate.evaluate(load_config(path))


def test_sigterm_ends_an_evaluation_at_once(tmp_path: Path, data: Path) -> None:
    with pytest.raises(AssertionError, match="the process ended without a word"):
        run_ranks(1, _evaluate_until_told_to_stop, str(config_file(tmp_path, data)), init_process_group=False)
    assert not (tmp_path / "run" / "evaluation.json").exists()


BOTH_WAYS = pytest.mark.parametrize("ranks", [False, True], ids=["waiting", "background"], indirect=True)


@BOTH_WAYS
def test_sigterm_to_the_whole_process_groups_saves_and_exits_0(ranks: _Ranks, tmp_path: Path) -> None:
    ranks.signal(signal.SIGTERM)
    codes = [process.wait(60) for process in ranks.processes]
    assert codes == [0, 0], ranks.output.read_text()
    reports = [_exit_report(tmp_path / "run", rank) for rank in range(2)]
    assert [report["outcome"] for report in reports] == ["sigterm", "sigterm"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{reports[0]['steps_done']}"
    assert not ranks.in_their_groups()


@BOTH_WAYS
def test_a_killed_rank_leaves_no_process_behind(ranks: _Ranks) -> None:
    for process in ranks.processes:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while left := ranks.in_their_groups():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
