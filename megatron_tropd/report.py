"""What a run has logged, and plots of it, from ``metrics.jsonl`` alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = (
    ("accuracy", "held-out accuracy", "linear"),
    ("outlier_share", "outlier share of on-policy tokens", "linear"),
    ("on_policy_share", "on-policy share of response tokens", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("prefix_length", "mean teacher prefix (tokens)", "linear"),
    ("reward", "mean R = log pi_T - log pi_S (nats)", "linear"),
)
"""(key in metrics.jsonl, title, y scale)."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a ``metrics.jsonl``; a last line cut off by a crash is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def plot_runs(runs: Mapping[str, Path], output: Path) -> None:
    """One PNG with a panel for each of ``PANELS``; ``runs`` maps a label to a run folder.

    Values a run does not have (accuracy between evaluations, a non-finite number) are left out of its line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for label, folder in runs.items():
        lines = read_metrics(folder / "metrics.jsonl")
        for axis, (key, _, _) in zip(axes.flat, PANELS, strict=True):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                marker = "o" if key == "accuracy" else None
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker, markersize=3)
    for axis, (_, title, scale) in zip(axes.flat, PANELS, strict=True):
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes.flat[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def final_values(folder: Path) -> dict[str, Any]:
    """The last value of every key that the run has logged."""
    values: dict[str, Any] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        values.update({key: value for key, value in line.items() if value is not None})
    return values
