"""The files that one rank leaves, whatever ends it."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.journal import Journal

REPOSITORY = Path(__file__).resolve().parent.parent


def _events(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / f"rank_{rank}.jsonl").read_text().splitlines()]


def _exit(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "logs" / "rank_0.exit.json").read_text())


def test_events_are_one_json_object_a_line_whatever_is_in_them(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, "train", train_iters=3) as journal:
        journal.event("step", loss=math.nan, nested={"norm": [math.inf, 1.0]}, text="two\nlines \ud800 \u2028 ü")
        logging.getLogger("megatron_tropd.somewhere").warning("careful: %s", "now")
    events = _events(tmp_path)
    assert [event["event"] for event in events] == ["start", "step", "log", "exit"]
    assert events[1]["loss"] is None and events[1]["nested"] == {"norm": [None, 1.0]}
    assert events[1]["text"].startswith("two\nlines ") and events[1]["text"].endswith("ü")
    assert (events[2]["level"], events[2]["message"]) == ("warning", "careful: now")
    assert all(event["rank"] == 0 and event["time"].endswith("+00:00") for event in events)


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "finished"), (OSError("disk"), "error"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_exit_report_names_what_ended_the_run(tmp_path: Path, error: BaseException | None, outcome: str) -> None:
    def run() -> None:
        with Journal(tmp_path, 0, "train", train_iters=3) as journal:
            journal.step, journal.steps_done = 1, 1
            journal.beat("save")
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    report = _exit(tmp_path)
    assert report["outcome"] == outcome and report["error"] == (type(error).__name__ if error else None)
    assert (report["step"], report["phase"], report["steps_done"], report["train_iters"]) == (1, "save", 1, 3)
    assert json.loads((tmp_path / "logs" / "rank_0.heartbeat.json").read_text())["phase"] == "exit"
    assert any(event["event"] == "traceback" for event in _events(tmp_path)) == (error is not None)


def test_a_kill_leaves_no_report_and_the_next_start_goes_on_behind_the_torn_line(tmp_path: Path) -> None:
    Journal(tmp_path, 0, "train").__enter__().__exit__(None, None, None)
    code = (
        "import os, signal, sys; from pathlib import Path; from megatron_tropd.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 0, 'train').__enter__(); journal.step = 7; journal.beat('rollout')\n"
        'journal._file.write(\'{"time": "torn\'); journal._file.flush(); os.kill(os.getpid(), signal.SIGKILL)'
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "logs" / "rank_0.exit.json").exists()  # that of the run before is gone too
    heartbeat = json.loads((tmp_path / "logs" / "rank_0.heartbeat.json").read_text())
    assert (heartbeat["step"], heartbeat["phase"]) == (7, "rollout") and heartbeat["pid"] != os.getpid()
    with Journal(tmp_path, 0, "train"):
        pass
    lines = (tmp_path / "logs" / "rank_0.jsonl").read_text().splitlines()
    whole = [json.loads(line)["event"] for line in lines if line != '{"time": "torn']
    assert len(lines) == len(whole) + 1
    assert whole == ["start", "exit", "start", "start", "exit"]


def test_the_heartbeat_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank_0.heartbeat.json"
    with Journal(tmp_path, 0, "train") as journal:
        writer = threading.Thread(target=lambda: [journal.beat("rollout" * 50) for _ in range(500)])
        writer.start()
        reads = 0
        while writer.is_alive():
            assert json.loads(path.read_text())["phase"]
            reads += 1
        writer.join()
    assert reads > 20


def test_what_a_hang_brings_down_does_not_take_its_place(tmp_path: Path) -> None:
    def hang() -> None:
        with Journal(tmp_path, 1, "train") as journal:
            journal.report_hang("hung: rank 0 in fail (faulty.py:11)")
            raise ConnectionError("closed by peer")

    with pytest.raises(ConnectionError):
        hang()
    report = json.loads((tmp_path / "logs" / "rank_1.exit.json").read_text())
    assert (report["outcome"], report["message"]) == ("hung", "hung: rank 0 in fail (faulty.py:11)")
