"""Run 2,000 small steps on two ranks with a restart every few minutes, and see whether anything grows.

    make soak        .venv/bin/python tools/soak.py --steps=2000 --restart-seconds=120 --out=benchmarks/soak.md

The program as a user starts it, on gloo, with two data-parallel ranks and tiny models. Restarts are by SIGTERM (save,
exit 0) and by SIGKILL in turn; each continues from the newest checkpoint. From the ranks' own logs, within every
stretch between two starts and without its first steps: resident memory, open file handles and seconds of a step, each
with its slope. The slope's noise comes from the means of blocks of steps, so that alike neighbours do not make it too
small. Exits with 1 where a slope is above twice its noise and above what matters, or the last stretch is above the
first by more than that.
"""

from __future__ import annotations

import argparse
import contextlib
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

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

from faults import write_config, write_inputs  # noqa: E402

NUM_RANKS = 2
NUM_BLOCKS = 8
MEASURES = {
    "rss_gb": ("resident memory, GB", 0.02),
    "open_files": ("open file handles", 1.0),
    "seconds": ("s per step", 0.02),
}
"""Field of a step to (name, change over 1,000 steps below which nothing matters)."""


@dataclass(frozen=True)
class Trend:
    """A straight line through a stretch of steps."""

    num_steps: int
    mean: float
    slope: float
    """Change over 1,000 steps."""
    noise: float
    """Standard error of the slope."""


def trend(values: Sequence[float], num_blocks: int = NUM_BLOCKS) -> Trend:
    """Least squares through the means of ``num_blocks`` equal blocks of steps.

    A block's mean is nearly independent of the next one's where single steps are not.
    """
    size = len(values) // num_blocks
    assert size >= 1, "a stretch needs a step for every block"
    means = np.asarray(values[: size * num_blocks], dtype=np.float64).reshape(num_blocks, size).mean(1)
    centres = (np.arange(num_blocks) + 0.5) * size / 1000
    spread = centres - centres.mean()
    slope = float(spread @ means / (spread @ spread))
    residuals = means - means.mean() - slope * spread
    noise = float(np.sqrt(residuals @ residuals / (num_blocks - 2) / (spread @ spread)))
    return Trend(len(values), float(np.mean(values)), slope, noise)


def grows(found: Trend, matters: float) -> bool:
    """Whether the line rises by more than its noise and by more than what matters."""
    return found.slope > max(2 * found.noise, matters)


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


def end_group(pid: int) -> None:
    """Kill what is left of the process group that ``pid`` leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


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
            for rank in ranks:
                rank.send_signal(how)
            if how == signal.SIGKILL:
                for rank in ranks:
                    end_group(rank.pid)  # what a killed rank has started goes on without it
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
    return [steps for steps in kept if len(steps) >= 2 * NUM_BLOCKS]


def report(folder: Path, num_warm_up: int) -> tuple[list[str], list[str]]:
    """(Rows of the table, what grows) from the logs of a run folder."""
    rows, growing = [], []
    for rank in range(NUM_RANKS):
        found = stretches(folder / "logs" / f"rank_{rank}.jsonl", num_warm_up)
        for measure, (name, matters) in MEASURES.items():
            trends = [trend([step[measure] for step in steps]) for steps in found]
            for index, line in enumerate(trends):
                rows.append(
                    f"| {rank} | {index + 1} | {line.num_steps} | {name} | {line.mean:.4g} | {line.slope:+.4f} ± "
                    f"{line.noise:.4f} |"
                )
                if grows(line, matters):
                    growing.append(f"rank {rank}, stretch {index + 1}: {name} grows by {line.slope:.4g} in 1,000 steps")
            if trends and trends[-1].mean - trends[0].mean > max(matters, 0.05 * trends[0].mean):
                growing.append(f"rank {rank}: {name} went from {trends[0].mean:.4g} to {trends[-1].mean:.4g}")
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
        f"Each stretch is what lies between two starts, without its first {num_warm_up} steps; slopes are changes over "
        "1,000 steps with their standard error. Restarts are by SIGTERM and by SIGKILL in turn; time to save "
        "is not in a step's seconds.",
        "",
        "| rank | stretch | steps | measure | mean | slope |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, print the table, write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--restart-seconds", type=float, default=120)
    parser.add_argument("--warm-up", type=int, default=50, help="steps of a stretch that are not counted")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder / "inputs")
        training = {"train_iters": options.steps, "save_interval": 100, "log_rollouts": 1}
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
