"""Runs as pictures: curves, samples token by token, histograms of P_trust; as PNG and one self-contained HTML file.

    python tools/plot_run.py runs/tropd-* runs/opd-* --out runs/comparison

Runs that differ in nothing but their seed (and in folders) are one line, their mean, with a band from the lowest to the
highest. Samples and histograms need runs with training.log_tokens. Without --out the files go to FIRST_RUN/report.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import yaml

from megatron_tropd.report import read_metrics
from megatron_tropd.report_html import LEGEND, STYLE, sample_html, unlikely_html

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (
    ("accuracy", "held-out accuracy", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("student_entropy", "student entropy (nats per token)", "linear"),
    ("outlier_share", "outlier share of on-policy tokens", "linear"),
    ("loss", "loss (nats per term; each objective its own)", "linear"),
    ("reward", "mean R = log pi_T - log pi_S (nats)", "linear"),
    ("response_length", "response length (student's tokens)", "linear"),
    ("prefix_length", "teacher prefix (tokens)", "linear"),
    ("p_trust", "mean P_trust of on-policy tokens", "linear"),
)
"""(key in metrics.jsonl, title, y scale)."""

OF_ON_POLICY_TOKENS = ("outlier_share", "reward", "p_trust")
"""Means over the student's own tokens."""

NOT_THE_METHOD = ("output_dir", "training.seed", "tasks.seed", "student.load", "teacher.load", "guidance.answers")
"""Config fields that runs of one group may differ in, beside the whole section monitoring."""

Curve = dict[int, float]
Group = dict[str, list[Path]]


def group_runs(folders: Sequence[Path]) -> Group:
    """Label to run folders: a label names the fields that differ between groups. Raises ValueError for no run."""
    configs = {folder: dict(_flatten(_read_config(folder))) for folder in folders}
    by_config: dict[str, list[Path]] = defaultdict(list)
    for folder, config in configs.items():
        key = {name: value for name, value in config.items() if _is_method(name)}
        by_config[json.dumps(key, sort_keys=True)].append(folder)
    settings = [json.loads(key) for key in by_config]
    names = sorted({name for setting in settings for name in setting})
    varying = [name for name in names if len({json.dumps(setting.get(name)) for setting in settings}) > 1]
    groups: Group = {}
    for setting, members in zip(settings, by_config.values(), strict=True):
        parts = [
            str(setting[name]) if name == "objective" else f"{name.rsplit('.', 1)[-1]}={setting[name]}"
            for name in varying
            if setting.get(name) is not None
        ]
        label = ", ".join(parts) or str(setting["objective"])
        groups[label if label not in groups else f"{label} ({members[0].name})"] = members
    return groups


def _is_method(name: str) -> bool:
    return name not in NOT_THE_METHOD and not name.startswith("monitoring.")


def _read_config(folder: Path) -> dict[str, Any]:
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is not a run folder: it has no {name}")
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def curves_of(folder: Path, key: str) -> Curve:
    """Step to value, without what is missing, not finite, or a mean over no tokens at all."""
    lines = read_metrics(folder / "metrics.jsonl")
    if key in OF_ON_POLICY_TOKENS:
        # While the teacher's prefixes are whole answers, the log says 0, which is no measurement.
        lines = [line for line in lines if line.get("on_policy_share") != 0]
    return {line["step"]: line[key] for line in lines if line.get(key) is not None}


def smooth(curve: Curve, window: int) -> Curve:
    """Mean over the ``window`` values up to each step."""
    steps = sorted(curve)
    return {step: fmean(curve[s] for s in steps[max(0, i - window + 1) : i + 1]) for i, step in enumerate(steps)}


def band(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(Step, mean, lowest, highest) at the steps that every curve has."""
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in common]
    return [(step, fmean(found), min(found), max(found)) for step, found in zip(common, values, strict=True)]


def plot_curves(groups: Group, window: int) -> Any:
    """A figure with a panel for each of ``PANELS`` that any run has values for."""
    panels = [panel for panel in PANELS if any(curves_of(run, panel[0]) for runs in groups.values() for run in runs)]
    num_rows = -(-len(panels) // 3)
    figure, axes = pyplot.subplots(num_rows, 3, figsize=(13, 3.3 * num_rows), constrained_layout=True, squeeze=False)
    for axis, (key, title, scale) in zip(axes.flat, panels, strict=False):
        for index, (label, runs) in enumerate(groups.items()):
            sparse = key == "accuracy"
            curves = [curve for run in runs if (curve := curves_of(run, key))]
            points = band(curves if sparse else [smooth(curve, window) for curve in curves])
            if not points:
                continue
            steps, means, lows, highs = zip(*points, strict=True)
            colour = f"C{index % 10}"
            axis.plot(steps, means, color=colour, label=f"{label} ({len(curves)} seed{'s' * (len(curves) > 1)})",
                      marker="o" if sparse else None, markersize=3, linewidth=1.3)  # fmt: skip
            if len(curves) > 1:
                axis.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)
    return figure


def recorded_steps(run: Path) -> dict[int, Path]:
    """Step to the file of the samples recorded then."""
    return {int(path.stem.removeprefix("step_")): path for path in sorted((run / "tokens").glob("step_*.jsonl"))}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of one file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(steps: Sequence[int], count: int = 4) -> list[int]:
    """First, last and evenly between: the steps that are shown."""
    ordered = sorted(steps)
    return sorted({ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)} if ordered else [])


def trust_of(runs: Sequence[Path]) -> dict[int, list[float]]:
    """Step to P_trust of the on-policy tokens recorded then, over runs; steps without any are left out."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, path in recorded_steps(run).items():
            for sample in read_samples(path):
                pairs = zip(sample.get("p_trust", []), sample["region"], strict=False)
                values[step] += [trust for trust, region in pairs if region == "on-policy"]
    return {step: found for step, found in values.items() if found}


def plot_trust(groups: Group) -> Any | None:
    """Histograms of P_trust = min(pi_T / pi_S, 1) of the on-policy tokens recorded, by step; None without any."""
    found = {label: values for label, runs in groups.items() if (values := trust_of(runs))}
    if not found:
        return None
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.6 * len(found) + 1, 3.8), constrained_layout=True, squeeze=False, sharey=True
    )
    for axis, (label, values) in zip(axes.flat, found.items(), strict=True):
        steps = spread(list(values))
        for index, step in enumerate(steps):
            here = values[step]
            colour = pyplot.get_cmap("viridis")(index / max(1, len(steps)))
            axis.hist(here, bins=20, range=(0, 1), weights=[1 / len(here)] * len(here), histtype="step",
                      linewidth=1.5, color=colour, label=f"step {step} ({len(here)} tokens)")  # fmt: skip
        axis.set(title=label, xlabel="P_trust = min(pi_T / pi_S, 1)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center")
    axes.flat[0].set_ylabel("share of on-policy tokens (log)")
    return figure


def report_html(groups: Group, pictures: Mapping[str, bytes], window: int, num_samples: int) -> str:
    """The whole report as one file."""
    body = [f"<h1>{escape(' vs '.join(groups)) if len(groups) < 4 else f'{len(groups)} settings'}</h1>"]
    runs = "".join(f"<li>{escape(label)}: {escape(', '.join(map(str, r)))}</li>" for label, r in groups.items())
    smoothing = f"Curves but accuracy are running means over {window} steps. " if window > 1 else ""
    band_text = "Lines are means over seeds, bands go from the lowest to the highest seed."
    body.append(f"<ul>{runs}</ul><p>{smoothing}{band_text}</p>")
    titles = {"curves": "Curves", "p_trust": "P_trust of on-policy tokens"}
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        body.append(f'<h2>{titles[name]}</h2><img alt="{titles[name]}" src="data:image/png;base64,{data}">')
    for label, members in groups.items():
        run = next((run for run in members if recorded_steps(run)), None)
        if run is None:
            continue
        body.append(f"<h2>Tokens of {escape(label)}</h2><p class='n'>{escape(str(run))}</p>{LEGEND}")
        steps = spread(list(recorded_steps(run)))
        for step in reversed(steps):
            samples = read_samples(recorded_steps(run)[step])
            shown = "".join(sample_html(sample) for sample in samples[:num_samples])
            opened = " open" * (step == steps[-1])
            body.append(
                f"<details{opened}><summary>Step {step}</summary>{shown}"
                f"<h3>Tokens the teacher finds least likely</h3>{unlikely_html(samples)}</details>"
            )
    head = f"<meta charset='utf-8'><title>megatron-tropd runs</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write curves.png, p_trust.png (where recorded) and report.html."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder to write to (default: FIRST_RUN/report)")
    parser.add_argument("--smooth", type=int, help="steps of the running mean (default: a 50th of the longest run)")
    parser.add_argument("--samples", type=int, default=4, help="samples shown per step (default: 4)")
    options = parser.parse_args(arguments)
    try:
        groups = group_runs(options.runs)
    except ValueError as error:
        parser.error(str(error))
    longest = max(max(curves_of(run, "loss"), default=0) for run in options.runs)
    window = max(1, options.smooth if options.smooth is not None else longest // 50)
    pictures = {"curves": _png(plot_curves(groups, window))}
    if (trust := plot_trust(groups)) is not None:
        pictures["p_trust"] = _png(trust)
    out = options.out or options.runs[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture)
    page = report_html(groups, pictures, window, options.samples)
    (out / "report.html").write_text(page, encoding="utf-8")
    print(f"{out / 'report.html'}: {len(options.runs)} runs in {len(groups)} groups")


if __name__ == "__main__":
    main()
