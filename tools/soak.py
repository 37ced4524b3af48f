"""Run 2,000 small steps on two ranks with a restart every two minutes, and see whether anything grows.

    make soak        .venv/bin/python tools/soak.py --steps=2000 --restart-seconds=120 --out=benchmarks/soak.md

The program as a user starts it, on gloo, with two data-parallel ranks and tiny models. Restarts are by SIGTERM to the
ranks' process groups (save, exit 0) and by SIGKILL in turn; each continues from the newest checkpoint. From the ranks'
own logs, within every stretch between two starts and without its first steps: resident memory, open file handles and
seconds of a step, each with its slope and the slope's standard error. That comes from the means of blocks of steps, so
that alike neighbours do not make it too small. The stretches of a rank share one slope: exits with 1 where
it is above what noise gives in one soak of a hundred and above what matters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
from scipy.stats import t as student_t

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

from faults import write_config, write_inputs  # noqa: E402

NUM_RANKS = 2
SAVE_INTERVAL = 100
"""Steps. The first saves of a start belong to its warm-up: what they allocate is kept."""
BLOCK = 25
"""Steps in a block."""
FALSE_ALARMS = 0.01
"""Probability that a soak in which nothing grows says otherwise, over all its measures."""
MEASURES = {
    "rss_gb": ("resident memory, GB", 0.005),
    "open_files": ("open file handles", 0.5),
    "seconds": ("s per step", 0.01),
}
"""Field of a step to (name, change over 1,000 steps below which a growth does not matter, however certain)."""


@dataclass(frozen=True)
class Trend:
    """One slope through several series, each with a level of its own."""

    slope: float
    """Change over 1,000 steps."""
    noise: float
    """Standard error of the slope."""
    freedom: int
    """Degrees of freedom of the standard error."""


def trend(series: Sequence[Sequence[float]], block: int = BLOCK) -> Trend:
    """Least squares through the means of blocks of ``block`` steps.

    A block's mean is nearly independent of the next one's where single steps are not.
    """
    centred = []
    for values in series:
        count = len(values) // block
        means = np.asarray(values[: count * block], dtype=np.float64).reshape(count, block).mean(1)
        places = np.arange(count) * block / 1000
        centred.append(np.stack([places - places.mean(), means - means.mean()]))
    x, y = np.concatenate(centred, axis=1)
    slope = float(x @ y / (x @ x))
    freedom = len(x) - len(series) - 1
    assert freedom >= 1, "too few steps for a slope and its noise"
    residuals = y - slope * x
    return Trend(slope, float(np.sqrt(residuals @ residuals / freedom / (x @ x))), freedom)


def limit(found: Trend, matters: float, false_alarms: float) -> float:
    """The slope above which something grows: noise passes it with probability ``false_alarms``, and it matters."""
    return max(float(student_t.ppf(1 - false_alarms, found.freedom)) * found.noise, matters)


def start(config: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks of `train`, silent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_tropd", "train", str(config)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(NUM_RANKS)
    ]


def run_until_done(config: Path, folder: Path, restart_seconds: float) -> int:
    """Start again and again until the exit report says that all steps are done; returns the number of starts."""
    report = folder / "logs" / "rank_0.exit.json"
    starts = 0
    while True:
        ranks = start(config)
        starts += 1
        deadline = monotonic() + restart_seconds
        how = signal.SIGTERM if starts % 2 else signal.SIGKILL
        codes: list[int | None] = [None] * NUM_RANKS
        while None in codes and monotonic() < deadline:
            sleep(0.2)
            codes = [rank.poll() for rank in ranks]
        if None in codes:
            for rank in (rank for rank in ranks if rank.poll() is None):
                if how == signal.SIGTERM:  # as a scheduler sends it: to all that the rank has started, too
                    os.killpg(rank.pid, how)
                else:
                    rank.kill()
        codes = [rank.wait(120) for rank in ranks]
        # First this: a rank that has written its report may still be hit on its way out.
        if report.exists() and json.loads(report.read_text())["outcome"] == "finished":
            return starts
        if any(code not in (0, -signal.SIGKILL) for code in codes):
            ends = [path.read_text() for path in sorted((folder / "logs").glob("rank_*.exit.json"))]
            raise SystemExit(f"start {starts} ended with {codes}: {' '.join(ends)}")


def stretches(log: Path, num_warm_up: int) -> list[list[dict[str, Any]]]:
    """The steps of every start of one rank, without the first ``num_warm_up``; lines cut off by a kill are left out."""
    result: list[list[dict[str, Any]]] = []
    for line in log.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == "start":
            result.append([])
        elif event["event"] == "step":
            parts = {name: value for name, value in event["seconds"].items() if name not in ("teacher", "save")}
            result[-1].append(event | {"seconds": sum(parts.values())})
    kept = [steps[num_warm_up:] for steps in result]
    return [steps for steps in kept if len(steps) >= 2 * BLOCK]


def report(folder: Path, num_warm_up: int) -> tuple[list[str], list[str]]:
    """(Rows of the table, what grows) from the logs of a run folder."""
    rows, growing = [], []
    false_alarms = FALSE_ALARMS / (NUM_RANKS * len(MEASURES))
    for rank in range(NUM_RANKS):
        found = stretches(folder / "logs" / f"rank_{rank}.jsonl", num_warm_up)
        for measure, (name, matters) in MEASURES.items():
            series = [[step[measure] for step in steps] for steps in found]
            line = trend(series)
            most = limit(line, matters, false_alarms)
            means = ", ".join(f"{np.mean(values):.4g}" for values in series)
            rows.append(f"| {rank} | {name} | {means} | {line.slope:+.4f} ± {line.noise:.4f} | {most:.4f} |")
            if line.slope > most:
                growing.append(f"rank {rank}: {name} by {line.slope:.4g} in 1,000 steps")
    return rows, growing


def render(rows: list[str], growing: list[str], *, steps: int, starts: int, seconds: float, num_warm_up: int) -> str:
    """The page that is kept."""
    verdict = "Nothing grows." if not growing else "Grows: " + "; ".join(growing) + "."
    lines = [
        "# Soak",
        "",
        f"`tools/soak.py`: {steps:,} steps on two data-parallel ranks (gloo, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}), {starts} starts, {seconds / 60:.1f} minutes. {verdict}",
        "",
        "A stretch is what lies between two starts, which SIGTERM to the whole process groups and SIGKILL end in turn, "
        f"without its first {num_warm_up} steps. The slope is the change over 1,000 steps, common to all "
        f"stretches of a rank, with its standard error from the means of {BLOCK} steps. Above the limit something "
        f"grows: all limits together are passed by noise in {FALSE_ALARMS:.0%} of soaks, and none is below what "
        "matters. Time to save is not in a step's seconds.",
        "",
        "| rank | measure | mean of each stretch | slope | limit |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, print the table, write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--restart-seconds", type=float, default=120)
    parser.add_argument("--warm-up", type=int, default=2 * SAVE_INTERVAL, help="steps of a stretch not to count")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder / "inputs")
        training = {"train_iters": options.steps, "save_interval": SAVE_INTERVAL, "log_rollouts": 1}
        config = write_config(folder, folder / "inputs", "data", **training)
        began = monotonic()
        starts = run_until_done(config, folder / "run", options.restart_seconds)
        rows, growing = report(folder / "run", options.warm_up)
        seconds = monotonic() - began
    text = render(rows, growing, steps=options.steps, starts=starts, seconds=seconds, num_warm_up=options.warm_up)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return int(bool(growing))


if __name__ == "__main__":
    sys.exit(main())
