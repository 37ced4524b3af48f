"""One run on two ranks as a user starts it: what it prints, what it writes, and which secrets it keeps to itself."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import REPOSITORY, config_file, data

__all__ = ["data"]  # a fixture

SECRETS = {"HF_TOKEN": "planted-hub-token-5173", "WANDB_API_KEY": "planted-wandb-key-9642"}
URI = "https://me:planted-password-3310@tracking.invalid"
PLANTED = ("planted-hub-token-5173", "planted-wandb-key-9642", "planted-password-3310")
TRAIN_ITERS, LOG_INTERVAL = 4, 2
OWN_LINES = (
    r"layer spec: local \(transformer-engine is not usable here\)",
    r"layer spec: transformer-engine",
    r"rollout engine: (static|dynamic) \(.*\)",
    r"teacher\.load is not set: the teacher has random weights, and nothing worth learning",
    r"tropd: +\d+%\|.*",
    r"profile of steps 2 to 2: .*/profile/rank_0_steps_2_to_2\.json\.gz",
    rf"finished: {TRAIN_ITERS} of {TRAIN_ITERS} steps in [\d.]+ s; report: .*/logs/rank_0\.exit\.json",
)
"""Everything that a clean start may print."""


@dataclass(frozen=True)
class Finished:
    folder: Path
    stdout: str
    stderr: str


def _start(path: Path, *overrides: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "megatron_tropd", "train", str(path), *overrides],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Finished:
    """Two data-parallel ranks, every third-party key in the environment, the third step profiled."""
    folder = tmp_path_factory.mktemp("clean")
    monitoring = {"log_interval": LOG_INTERVAL, "profile_step_start": 2, "profile_step_end": 3}
    training = {"train_iters": TRAIN_ITERS, "eval_interval": 2, "save_interval": 2}
    path = config_file(folder, data, training=training)
    text = path.read_text() + f"monitoring: {json.dumps(monitoring | {'mlflow_tracking_uri': URI})}\n"
    path.write_text(text)
    finished = _start(path, "--profile", environment=SECRETS)
    assert finished.returncode == 0, finished.stderr
    return Finished(folder / "run", finished.stdout, finished.stderr)


def _events(folder: Path, rank: int, name: str) -> list[dict[str, Any]]:
    lines = (folder / "logs" / f"rank_{rank}.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def test_a_clean_start_prints_nothing_but_its_own_lines(clean: Finished) -> None:
    assert clean.stdout == ""
    lines = [line for line in re.split(r"[\r\n]+", clean.stderr) if line.strip()]
    unexpected = [line for line in lines if not any(re.fullmatch(own, line.strip()) for own in OWN_LINES)]
    assert not unexpected
    assert sum(line.startswith("finished: ") for line in lines) == 1


def test_every_rank_logs_its_steps_and_phases(clean: Finished) -> None:
    for rank in range(2):
        (start,), (place,) = _events(clean.folder, rank, "start"), _events(clean.folder, rank, "layout")
        assert start["command"] == "train" and place["data_parallel_rank"] == rank
        steps = _events(clean.folder, rank, "step")
        assert [event["step"] for event in steps] == list(range(TRAIN_ITERS))
        for event in steps:
            phases = {"rollout", "batch", "schedule", "teacher", "optimizer", "log"}
            phases |= {"evaluate"} if event["step"] == 2 or event["step"] == 0 else {"save"}
            assert set(event["seconds"]) == phases and all(0 < value < 100 for value in event["seconds"].values())
            assert event["seconds"]["teacher"] < event["seconds"]["schedule"]
            assert set(event["peak_gb"]) == phases - {"teacher"}
            assert min(event["peak_gb"].values()) > 0.05 and event["rss_gb"] > 0.05 and event["open_files"] > 3
        heartbeat = json.loads((clean.folder / "logs" / f"rank_{rank}.heartbeat.json").read_text())
        assert (heartbeat["phase"], heartbeat["pid"]) == ("exit", start["pid"])
        report = json.loads((clean.folder / "logs" / f"rank_{rank}.exit.json").read_text())
        assert (report["outcome"], report["steps_done"]) == ("finished", TRAIN_ITERS)
    losses = [[event["loss"] for event in _events(clean.folder, rank, "step")] for rank in range(2)]
    metrics = [json.loads(line) for line in (clean.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == losses[1] == [line["loss"] for line in metrics[:TRAIN_ITERS]]


def test_the_slowest_rank_of_every_phase_is_in_the_log_of_rank_0(clean: Finished) -> None:
    assert not _events(clean.folder, 1, "stragglers")
    reports = _events(clean.folder, 0, "stragglers")
    assert [report["step"] for report in reports] == [1, 3]
    steps = [_events(clean.folder, rank, "step") for rank in range(2)]
    for report in reports:
        for name, found in report["phases"].items():
            mine = [
                sum(event["seconds"].get(name, 0.0) for event in events[report["step"] - 1 : report["step"] + 1])
                for events in steps
            ]
            assert found["slowest_seconds"] == pytest.approx(max(mine), abs=1e-5), name
            assert found["median_seconds"] == pytest.approx(sum(mine) / 2, abs=1e-5), name
            assert mine[found["slowest_rank"]] == pytest.approx(max(mine), abs=1e-5), name


def test_the_profile_has_the_phases_of_the_chosen_step_and_operators(clean: Finished) -> None:
    (path,) = (clean.folder / "profile").iterdir()
    assert path.name == "rank_0_steps_2_to_2.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    for phase in ("evaluate", "rollout", "schedule", "optimizer"):
        assert names.count(phase) == 1, phase
    assert "aten::mm" in names


def test_no_secret_of_environment_or_config_is_in_the_run_folder(clean: Finished) -> None:
    files = [path for path in clean.folder.rglob("*") if path.is_file()]
    assert len(files) > 15 and any("checkpoints" in path.parts for path in files)
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for secret in PLANTED:
            assert secret.encode() not in content, path
    assert "[redacted]@tracking.invalid" in (clean.folder / "config.yaml").read_text()


def test_an_error_that_quotes_secrets_reaches_the_logs_without_them(tmp_path: Path, data: Path) -> None:
    path = config_file(tmp_path, data)
    nowhere = f"{URI}/model?token=planted-hub-token-5173"
    finished = _start(path, f"--student.load={nowhere}", environment=SECRETS)
    assert finished.returncode != 0
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert not [secret for secret in PLANTED if secret.encode() in file.read_bytes()], file
    for rank in range(2):
        report = json.loads((tmp_path / "run" / "logs" / f"rank_{rank}.exit.json").read_text())
        assert report["outcome"] == "error" and "no checkpoint at" in report["message"]
        assert "[redacted]" in report["message"] and "tracking.invalid/model" in report["message"]
        assert f"error: CheckpointError on rank {rank} in phase start of step None" in finished.stderr


def test_verbose_shows_what_the_libraries_say(tmp_path: Path, data: Path) -> None:
    path = config_file(tmp_path, data, training={"train_iters": 1, "eval_interval": 0})
    command = [sys.executable, "-m", "megatron_tropd", "train", str(path), "--monitoring.verbose=true"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=200, check=True)
    assert "megatron/core" in finished.stderr and "Warning: " in finished.stderr
    assert "[rank 0] INFO megatron_tropd.journal: finished: 1 of 1 steps" in finished.stderr
