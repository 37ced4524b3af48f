"""Tables and figures of the study from its results alone: means over seeds with 95 % intervals, paired by seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from scipy.stats import t as student_t

matplotlib.use("Agg")
from matplotlib import pyplot

Line = dict[str, Any]
Runs = dict[str, dict[int, Line]]
"""Method to seed to its line of results.jsonl; of one task and one student."""

REFERENCE = "OPD"
CURVE_METHODS = {
    "OPD": "tab:blue",
    "Clip": "tab:orange",
    "Mask": "tab:green",
    "FKL-outlier": "tab:red",
    "TrOPD": "tab:purple",
    "TrOPD, beta2 0.95": "tab:brown",
}
"""Method to its colour in every panel."""
WIDEST_DIFFERENCE = 30.0
"""Points to either side of the reference; what lies beyond is written at the edge."""
PANELS = (
    ("grad_norm", "gradient norm before clipping", "log"),
    ("student_entropy", "student entropy (nats per token)", "linear"),
    ("outlier_share", "outlier share of on-policy tokens", "linear"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its 95 % t interval (nan from one seed)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Of ``values``, one a seed. Raises ValueError for none."""
    if not values:
        raise ValueError("no values to take a mean of: the study has no run of this kind yet")
    if len(values) == 1:
        return Estimate(values[0], math.nan, 1)
    quantile = student_t.ppf(0.975, len(values) - 1)
    return Estimate(fmean(values), float(quantile) * stdev(values) / math.sqrt(len(values)), len(values))


def paired_difference(runs: Mapping[int, Line], reference: Mapping[int, Line]) -> Estimate:
    """Of the accuracies, over the seeds that both have: what differs between seeds alone drops out."""
    seeds = sorted(set(runs) & set(reference))
    return estimate([runs[seed]["accuracy"] - reference[seed]["accuracy"] for seed in seeds])


def by_setting(lines: Sequence[Line]) -> dict[tuple[str, str], Runs]:
    """(task, student) to its runs."""
    settings: dict[tuple[str, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        settings[line["task"], line["student"]][line["method"]][line["seed"]] = line
    return settings


def write_report(study: Mapping[str, Any], lines: Sequence[Line], docs: Path) -> None:
    """Write the figures into ``docs`` and the tables between the markers of ``docs/study.md``."""
    settings = by_setting(lines)
    shown = [(task, student) for task in study["tasks"] for student in study["students"] if (task, student) in settings]
    methods = ["base", "SFT", *study["methods"]]
    docs.mkdir(parents=True, exist_ok=True)
    sensitivity = study["sensitivity"]
    variants = [sensitivity["method"], *sensitivity["variants"]]
    sensitivity_runs = settings.get((sensitivity["task"], sensitivity["student"]), {})
    tables = {
        "accuracy": accuracy_table(settings, shown, methods),
        "differences": difference_table(settings, shown, methods),
        "training": training_table(settings, shown, methods),
        "sensitivity": sensitivity_table(sensitivity_runs, variants),
    }
    for name, table in tables.items():
        _replace(docs / "study.md", name, table)
    draw_differences(settings, shown, methods, docs / "study-differences.png")
    draw_curves(settings, shown, docs / "study-curves.png")
    draw_sensitivity(sensitivity_runs, variants, docs / "study-sensitivity.png")


def _replace(path: Path, name: str, table: str) -> None:
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in text:
        text += f"\n{begin}{end}"
    head, rest = text.split(begin, 1)
    path.write_text(f"{head}{begin}{table}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- tables


def accuracy_table(
    settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], methods: Sequence[str]
) -> str:
    """Held-out accuracy in per cent, mean over seeds ± half of the 95 % interval."""
    rows = []
    for method in methods:
        cells = [
            str(estimate([line["accuracy"] for line in settings[setting][method].values()]))
            if settings[setting].get(method)
            else ""
            for setting in shown
        ]
        rows.append([method, *cells])
    return _markdown(["method", *(_label(setting) for setting in shown)], rows)


def difference_table(
    settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], methods: Sequence[str]
) -> str:
    """Accuracy less that of plain OPD from the same start, in points."""
    rows = []
    for method in methods:
        if method != REFERENCE:
            cells = [_difference(settings[setting], method) for setting in shown]
            rows.append([method, *cells, _marked(mean_difference(settings, shown, method))])
    header = [f"method, less {REFERENCE}", *(_label(setting) for setting in shown), "mean of these"]
    return _markdown(header, rows)


def mean_difference(
    settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], method: str
) -> Estimate | None:
    """Of a seed's differences in all settings, over the seeds that have all of them; None: there is none."""
    runs = [(settings[setting].get(method, {}), settings[setting].get(REFERENCE, {})) for setting in shown]
    seeds = set.intersection(*(set(one) & set(reference) for one, reference in runs)) if runs else set()
    if not seeds:
        return None
    return estimate(
        [
            fmean(one[seed]["accuracy"] - reference[seed]["accuracy"] for one, reference in runs)
            for seed in sorted(seeds)
        ]
    )


def _difference(runs: Runs, method: str) -> str:
    if not set(runs.get(method, {})) & set(runs.get(REFERENCE, {})):
        return ""
    return _marked(paired_difference(runs[method], runs[REFERENCE]))


def _marked(found: Estimate | None) -> str:
    if found is None:
        return ""
    text = f"{'+' if found.mean >= 0 else ''}{found}"
    return f"**{text}**" if abs(found.mean) > found.half_width else text


def training_table(
    settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], methods: Sequence[str]
) -> str:
    """Gradient norm, entropy and outlier share over the last fifth of the run, means over seeds."""
    names = ("grad_norm", "student_entropy", "outlier_share")
    rows = []
    for method in methods:
        if method in ("base", "SFT"):
            continue
        cells = []
        for setting in shown:
            found = [_last_fifth(settings[setting].get(method, {}), name) for name in names]
            cells.append("" if found[0] is None else " / ".join("–" if x is None else f"{x:.2g}" for x in found))
        rows.append([method, *cells])
    return _markdown(["gradient norm / entropy / outlier share", *(_label(setting) for setting in shown)], rows)


def sensitivity_table(runs: Runs, variants: Sequence[str]) -> str:
    """The variants beside the method as it stands, which comes first."""
    usual, *_ = variants
    rows = []
    for variant in variants:
        if runs.get(variant):
            difference = "" if variant == usual else _signed(paired_difference(runs[variant], runs[usual]))
            accuracy = estimate([line["accuracy"] for line in runs[variant].values()])
            rows.append([variant, str(accuracy), difference, _number(_last_fifth(runs[variant], "grad_norm"))])
    return _markdown(["variant", "accuracy", f"less {usual}", "gradient norm"], rows)


def _signed(value: Estimate) -> str:
    return f"{'+' if value.mean >= 0 else ''}{value}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _last_fifth(runs: Mapping[int, Line], name: str) -> float | None:
    curves = [line["curves"].get(name, []) for line in runs.values()]
    values = [value for curve in curves for value in curve[-max(len(curve) // 5, 1) :] if value is not None]
    return fmean(values) if values else None


def _label(setting: tuple[str, str]) -> str:
    task, student = setting
    return f"{task.replace('_', ' ')}, {student}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------------------- figures


def draw_differences(
    settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], methods: Sequence[str], path: Path
) -> None:
    """A panel a setting: every method's accuracy less that of OPD, with interval."""
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.6 * len(shown) + 1, 6), sharey=True, squeeze=False)
    rows = [method for method in methods if method not in ("base", REFERENCE)]
    for axis, setting in zip(axes.flat, shown, strict=True):
        runs = settings[setting]
        for row, method in enumerate(rows):
            if set(runs.get(method, {})) & set(runs.get(REFERENCE, {})):
                found = paired_difference(runs[method], runs[REFERENCE])
                width = 0.0 if math.isnan(found.half_width) else found.half_width
                colour = "tab:red" if method.startswith("TrOPD") else "tab:blue"
                if abs(100 * found.mean) > WIDEST_DIFFERENCE:
                    edge, side = math.copysign(WIDEST_DIFFERENCE, found.mean), "left" if found.mean < 0 else "right"
                    arrow = f"\u25c4 {found}" if found.mean < 0 else f"{found} \u25ba"
                    axis.text(edge, row, arrow, ha=side, va="center", fontsize=8, color=colour)
                    continue
                axis.errorbar(100 * found.mean, row, xerr=100 * width, fmt="o", color=colour, capsize=3, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=_label(setting), xlabel=f"accuracy less {REFERENCE} (points)")
        axis.set_xlim(-WIDEST_DIFFERENCE, WIDEST_DIFFERENCE)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].invert_yaxis()
    _save(figure, path)


def draw_curves(settings: Mapping[tuple[str, str], Runs], shown: Sequence[tuple[str, str]], path: Path) -> None:
    """A row a setting: accuracy, gradient norm, entropy, outlier share against the step.

    Bands: one std over seeds, within what they reach.
    """
    figure, axes = pyplot.subplots(len(shown), 4, figsize=(15, 3.2 * len(shown)), squeeze=False)
    for row, setting in zip(axes, shown, strict=True):
        for method, colour in CURVE_METHODS.items():
            runs = list(settings[setting].get(method, {}).values())
            if runs:
                steps = [int(step) for step in runs[0]["evaluations"]]
                accuracies = [[100 * value for value in run["evaluations"].values()] for run in runs]
                _band(row[0], steps, accuracies, label=method, color=colour, marker="o")
                for axis, (name, _, _) in zip(row[1:], PANELS, strict=True):
                    curves = [run["curves"][name] for run in runs if any(run["curves"].get(name, ()))]
                    if curves:  # a method without a gate has no outliers to show
                        width = runs[0]["steps"] / len(curves[0])
                        _band(axis, [(i + 0.5) * width for i in range(len(curves[0]))], curves, color=colour)
        row[0].set(title=f"{_label(setting)}: accuracy (%)", xlabel="step")
        for axis, (_, title, scale) in zip(row[1:], PANELS, strict=True):
            axis.set(title=title, xlabel="step", yscale=scale)
        for axis in row:
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(CURVE_METHODS))
    _save(figure, path, top=0.97)


def _band(axis: Any, steps: Sequence[float], curves: Sequence[Sequence[float | None]], **style: Any) -> None:
    points = [
        (step, [value for value in values if value is not None])
        for step, values in zip(steps, zip(*curves, strict=True), strict=True)
    ]
    points = [(step, values) for step, values in points if values]
    means = [fmean(values) for _, values in points]
    spreads = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    steps = [step for step, _ in points]
    axis.plot(steps, means, linewidth=1.4, markersize=3, **style)
    # Not beyond what was seen: on a logarithmic axis a mean less its spread may have no place.
    low = [max(mean - spread, min(values)) for mean, spread, (_, values) in zip(means, spreads, points, strict=True)]
    high = [min(mean + spread, max(values)) for mean, spread, (_, values) in zip(means, spreads, points, strict=True)]
    axis.fill_between(steps, low, high, alpha=0.12, color=style["color"], linewidth=0)


def draw_sensitivity(runs: Runs, variants: Sequence[str], path: Path) -> None:
    """Every variant's accuracy less that of the method as it stands, which comes first, with interval."""
    usual, *others = variants
    present = [variant for variant in others if set(runs.get(variant, {})) & set(runs.get(usual, {}))]
    figure, axis = pyplot.subplots(figsize=(7, 0.35 * len(present) + 1.5))
    for row, variant in enumerate(present):
        found = paired_difference(runs[variant], runs[usual])
        width = 0.0 if math.isnan(found.half_width) else found.half_width
        axis.errorbar(100 * found.mean, row, xerr=100 * width, fmt="o", color="tab:blue", capsize=3, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(present)), present)
    axis.invert_yaxis()
    axis.set_xlabel(f"accuracy less {usual} (points)")
    axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
