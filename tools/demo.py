"""The demo: teach a small GPT to add, then distil it into a smaller one with TrOPD. Real Megatron, on any machine.

Every stage is a command of the package on a config of examples/addition, under torchrun with two tensor-parallel ranks;
this script only runs them in order and sums them up. A stage that is done is not done again, one that was interrupted
continues.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_tropd.report import final_values, plot_runs, read_metrics

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "addition"
NUM_RANKS = 2


def main() -> None:
    """Run all stages and write ``summary.json``."""
    arguments, overrides = _parse_arguments()
    started = time.perf_counter()
    folder = Path("runs/demo")
    output = _output_of(arguments.objective)
    if not (folder / "data" / "validation.jsonl").exists():
        _run(sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(folder / "data"))
    _stage("teacher learns to add (SFT)", "sft", "teacher.yaml")
    _stage("student gets a short SFT", "sft", "student.yaml")
    _stage("teacher answers the training prompts", "generate", "distill.yaml")
    _stage(
        f"student learns from the teacher ({arguments.objective})",
        "train",
        "distill.yaml",
        f"--objective={arguments.objective}",
        f"--output_dir={output}",
        *overrides,
    )
    summary = summarize(arguments.objective, folder, output, seconds=time.perf_counter() - started)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    finished = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path("runs").glob("demo*/summary.json"))
    ]
    plot_runs({each["objective"]: _output_of(each["objective"]) for each in finished}, Path("runs/demo/comparison.png"))
    _print_table(finished, output)


def summarize(objective: str, folder: Path, output: Path, *, seconds: float) -> dict[str, Any]:
    """What the demo found, from the logs of its runs; ``seconds`` is the wall time of this invocation."""
    lines = read_metrics(output / "metrics.jsonl")
    evaluations = [line for line in lines if "accuracy" in line]
    before, after = evaluations[0], evaluations[-1]
    grad_norms = [line["grad_norm"] for line in lines if "grad_norm" in line][-100:]
    return {
        "objective": objective,
        "teacher_accuracy": final_values(folder / "teacher")["accuracy"],
        "student_accuracy_before": before["accuracy"],
        "student_accuracy_after": after["accuracy"],
        "student_accuracy_after_interval": [after["accuracy_low"], after["accuracy_high"]],
        "grad_norm_last_100_steps": sum(grad_norms) / len(grad_norms),
        "num_prompts": after["num_prompts"],
        "steps": after["step"],
        "seconds": round(seconds, 1),
    }


def _output_of(objective: str) -> Path:
    return Path("runs/demo") if objective == "tropd" else Path(f"runs/demo-{objective}")


def _parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Further --a.b=c options override examples/addition/distill.yaml."
    )
    parser.add_argument("--objective", default="tropd", help="preset of the distillation stage (default: %(default)s)")
    return parser.parse_known_args()


def _stage(title: str, command: str, config: str, *overrides: str) -> None:
    print(f"\n== {title}", flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    _run(sys.executable, *launcher, "-m", "megatron_tropd", command, str(EXAMPLE / config), *overrides)


def _run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode:
        sys.exit(f"this stage failed (exit {finished.returncode}): {' '.join(command)}")


def _print_table(summaries: list[dict[str, Any]], output: Path) -> None:
    """One row for each objective that has been run, this one among them."""
    newest = summaries[-1]
    table = Table(title=f"{newest['num_prompts']} held-out sums, greedy, exact match")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("gradient norm, last 100 steps", justify="right")
    table.add_row("teacher", f"{newest['teacher_accuracy']:.1%}", "", "")
    table.add_row("student before", f"{newest['student_accuracy_before']:.1%}", "", "")
    for summary in summaries:
        low, high = summary["student_accuracy_after_interval"]
        name = f"student after {summary['steps']} steps of {summary['objective']}"
        interval, norm = f"{low:.1%} to {high:.1%}", f"{summary['grad_norm_last_100_steps']:.2f}"
        table.add_row(name, f"{summary['student_accuracy_after']:.1%}", interval, norm)
    console = Console()
    console.print()
    console.print(table)
    console.print(
        f"Summary, metrics, checkpoints and plots: {output}/; all runs side by side: runs/demo/comparison.png"
    )


if __name__ == "__main__":
    main()
