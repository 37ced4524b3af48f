"""Predicted step times of one run on 8 to 1024 GPUs: docs/scaling.png, and the tables in docs/scaling.md.

python tools/scaling_sweep.py

Everything here is a prediction of megatron_tropd.planner; no GPU is needed and none has been measured. "Separate" is
the fastest job with two sides (``training.one_step_off``); an engine with a smaller launch overhead is what a run could
gain, and the package does not have it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tropd.config import Config, DataConfig, GuidanceConfig, RolloutConfig, TrainingConfig
from megatron_tropd.planner.hardware import GPUS, Assumptions
from megatron_tropd.planner.layouts import plans
from megatron_tropd.planner.lengths import pieces
from megatron_tropd.planner.plan import Plan
from megatron_tropd.planner.shapes import SHAPES

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPU = GPUS["H100"]
FAST_OVERHEAD = 20e-6
"""Seconds a layer and decoded token of an engine that leaves almost none."""
PIECE = 1024
"""``rollout.partial_tokens``."""
BEGIN, END = "<!-- sweep: written by tools/scaling_sweep.py -->", "<!-- end of sweep -->"


def run(batch: int = 512) -> Config:
    """Llama-3-8B from Llama-3-70B, prompts of 1024 and responses of 8192 tokens at most."""
    return Config(
        student=SHAPES["llama3-8b"],
        teacher=SHAPES["llama3-70b"],
        data=DataConfig(train="data/train.jsonl"),
        output_dir="runs/sweep",
        guidance=GuidanceConfig(answers="data/teacher_answers.jsonl"),
        rollout=RolloutConfig(max_response_length=8192),
        training=TrainingConfig(global_batch_size=batch),
    )


@dataclass(frozen=True)
class Row:
    """One number of GPUs; seconds, NaN where nothing fits."""

    num_gpus: int
    plan: Plan | None
    separate: float
    fast: float
    separate_fast: float
    larger: float
    """A step of four times the rollouts, divided by four."""
    partial: float
    """Steps of at most ``PIECE`` new tokens a response, as many as a response takes."""

    @property
    def colocated(self) -> float:
        """The fastest layout in which every GPU does everything."""
        return math.nan if self.plan is None else self.plan.time.total


def row(num_gpus: int) -> Row:
    """All variants on so many GPUs."""
    assumed = Assumptions()
    fast = replace(assumed, decode_layer_overhead=FAST_OVERHEAD)
    found = plans(run(), num_gpus, GPU, assumed, most=1)
    partial = replace(run(), rollout=replace(run().rollout, partial_tokens=PIECE))
    separate = replace(run(), training=replace(run().training, one_step_off=True))
    return Row(
        num_gpus,
        found[0] if found else None,
        _fastest(separate, num_gpus, assumed),
        _fastest(run(), num_gpus, fast),
        _fastest(separate, num_gpus, fast),
        _fastest(run(batch=2048), num_gpus, assumed) / 4,
        _fastest(partial, num_gpus, assumed) * pieces(partial, assumed),
    )


def _fastest(config: Config, num_gpus: int, assumed: Assumptions) -> float:
    found = plans(config, num_gpus, GPU, assumed, most=1)
    return found[0].time.total if found else math.nan


def latency_floor(assumed: Assumptions) -> float:
    """Seconds of a step that no number of GPUs removes: launches and collective latencies of the longest response."""
    config = run()
    per_layer = assumed.decode_layer_overhead + 2 * assumed.collective_latency
    return config.rollout.max_response_length * config.student.num_layers * per_layer


# ------------------------------------------------------------------------------------------------------- the output


def table_line(found: Row) -> str:
    """One line of the table in docs/scaling.md."""
    if found.plan is None:
        return f"| {found.num_gpus} | does not fit | | | | | | | | | | |"
    student, teacher = found.plan.sizes
    time, own = found.plan.time, found.plan.config.parallel.teacher_schedule == "ahead"
    layout = f"{student.tensor}x{student.pipeline}x{student.data}"
    copy = found.plan.config.rollout.tensor_model_parallel_size
    layout += f", copy {copy}" if copy is not None else ""
    if own:
        host = ", on host" * found.plan.config.parallel.offload_teacher
        layout += f", teacher {teacher.tensor}x{teacher.pipeline}x{teacher.data}{host}"
    other = time.bubble + time.gradients + time.optimizer + time.transfer + time.refit
    seconds = (found.colocated, time.rollout, time.teacher, time.student, other, found.separate, found.fast,
               found.separate_fast, found.larger, found.partial)  # fmt: skip
    cells = " | ".join("–" if math.isnan(value) else f"{value:.1f}" for value in seconds)
    return f"| {found.num_gpus} | {layout} | {cells} |"


def table(rows: list[Row]) -> str:
    """The table of docs/scaling.md."""
    columns = ("GPUs", "layout", "step", "rollout", "teacher", "student", "other", "separate", "20 µs",
               "separate, 20 µs", "2048", "pieces")  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    return "\n".join([head, "|" + "---|" * len(columns), *map(table_line, rows)])


def plot(rows: list[Row], path: Path) -> None:
    """Parts of the step, and the variants, against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fitting = [(each, each.plan.time) for each in rows if each.plan is not None]
    gpus = [each.num_gpus for each, _ in fitting]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = ("rollout", "teacher", "student", "gradients", "bubble", "transfer")
    left.stackplot(gpus, *([getattr(time, name) for _, time in fitting] for name in names), labels=names)
    left.set_title("Predicted parts of a step, colocated")
    lines = {
        "colocated": [each.colocated for each, _ in fitting],
        "separate groups, one step behind": [each.separate for each, _ in fitting],
        "colocated, 20 µs a layer and token": [each.fast for each, _ in fitting],
        "separate groups, 20 µs": [each.separate_fast for each, _ in fitting],
        "colocated, 2048 rollouts a step, / 4": [each.larger for each, _ in fitting],
        f"colocated, in pieces of {PIECE} tokens": [each.partial for each, _ in fitting],
    }
    for label, seconds in lines.items():
        right.plot(gpus, seconds, marker="o", markersize=3, label=label)
    right.axhline(latency_floor(Assumptions()), color="gray", linestyle=":", label="decode latency alone")
    right.set_title("Predicted seconds for 512 rollouts")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(gpus, map(str, gpus))
        axis.set_xlabel("H100 GPUs")
        axis.set_ylabel("seconds")
        axis.legend(fontsize=8)
    figure.suptitle("Predictions, not measurements: Llama-3-8B from Llama-3-70B, 512 rollouts of up to 8192 tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute, plot, and write the table into the document."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    rows = [row(num_gpus) for num_gpus in NUM_GPUS]
    text = table(rows)
    print(text)
    plot(rows, DOCS / "scaling.png")
    document = DOCS / "scaling.md"
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
