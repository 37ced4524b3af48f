"""The study: its data, its configs, its statistics by hand, and a small one from end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.study import make_chains, run_study, study_report
from megatron_tropd.config_checks import validate
from megatron_tropd.config_parser import load_config

STUDY = Path(__file__).resolve().parent.parent / "examples" / "study"


def test_chains_are_worked_out_right_and_differ() -> None:
    chains = make_chains.make_chains(4, 2, 500, seed=1)
    assert len({chain["prompt"] for chain in chains}) == 500
    for chain in chains:
        assert eval(chain["prompt"].removesuffix("=")) == int(chain["answer"])
        steps = chain["solution"].split(";")
        assert len(steps) == 3 and steps[-1].endswith(f"={chain['answer']}")
        for step in steps:
            left, _, right = step.rpartition("=")
            assert eval(left) == int(right)
    with pytest.raises(ValueError, match="there are only 200"):
        make_chains.make_chains(2, 1, 201, seed=1)


def test_every_run_is_a_config_that_can_start() -> None:
    study = yaml.safe_load((STUDY / "study.yaml").read_text())
    specs = list(run_study.method_specs(study, 1))
    assert len({spec.key for spec in specs}) == len(specs) > 40
    different = {(spec.task, spec.method): spec for spec in specs if spec.task == study["sensitivity"]["task"]}
    for spec in [
        *different.values(),
        run_study.teacher_spec(study, "addition"),
        run_study.base_spec(study, "chain_sum", "half", 3),
    ]:
        config = load_config(STUDY / f"{spec.task}.yaml", spec.overrides)
        validate(config, 1, spec.command)


def _line(method: str, seed: int, accuracy: float, grad_norm: float = 1.0) -> dict[str, Any]:
    return {
        "task": "addition", "student": "half", "seed": seed, "method": method, "accuracy": accuracy, "steps": 10,
        "evaluations": {"0": 0.0, "10": accuracy}, "curves": {"grad_norm": [9.0, 9.0, 9.0, 9.0, grad_norm]},
    }  # fmt: skip


def test_intervals_are_paired_by_seed() -> None:
    lines = [_line("OPD", seed, accuracy) for seed, accuracy in ((1, 0.2), (2, 0.5), (3, 0.8))]
    lines += [_line("TrOPD", seed, accuracy) for seed, accuracy in ((1, 0.3), (2, 0.6), (3, 0.9), (4, 0.1))]
    runs = study_report.by_setting(lines)["addition", "half"]
    difference = study_report.paired_difference(runs["TrOPD"], runs["OPD"])
    assert (difference.mean, difference.half_width, difference.count) == pytest.approx((0.1, 0.0, 3))
    # 0.2, 0.5, 0.8: standard error 0.3 / sqrt(3), and t(0.975, 2) = 4.303
    assert study_report.estimate([0.2, 0.5, 0.8]).half_width == pytest.approx(4.3027 * 0.3 / math.sqrt(3), rel=1e-4)
    assert math.isnan(study_report.estimate([0.4]).half_width)
    with pytest.raises(ValueError, match="no run of this kind"):
        study_report.paired_difference(runs["TrOPD"], {})
    table = study_report.difference_table({("addition", "half"): runs}, [("addition", "half")], ["TrOPD", "JSD"])
    assert "| TrOPD | **+10.0 ± 0.0** | **+10.0 ± 0.0** |" in table
    assert "| JSD |  |  |" in table
    # A second setting where TrOPD gains 0.3, 0.2 and 0.1: means 0.2, 0.15, 0.1 of the two.
    other = {
        "OPD": {seed: _line("OPD", seed, 0.5) for seed in (1, 2, 3)},
        "TrOPD": {seed: _line("TrOPD", seed, 0.9 - seed / 10) for seed in (1, 2, 3)},
    }
    settings = {("addition", "half"): runs, ("addition", "third"): other}
    found = study_report.mean_difference(settings, list(settings), "TrOPD")
    assert found is not None and (found.mean, found.count) == pytest.approx((0.15, 3))
    assert found.half_width == pytest.approx(4.3027 * 0.05 / math.sqrt(3), rel=1e-4)


def test_adams_steps_after_gradients_that_were_much_smaller() -> None:
    """The factors that docs/study.md names: first moment over root of the second, n steps into the larger ones."""

    def largest(beta2: float) -> float:
        return max((1 - 0.9**n) / math.sqrt(1 - beta2**n) for n in range(1, 1000))

    assert largest(0.999) == pytest.approx(6.6, abs=0.05) and largest(0.95) == pytest.approx(1.1, abs=0.05)


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_reports(tmp_path: Path) -> None:
    short = ["--training.train_iters=4", "--training.global_batch_size=8", "--training.micro_batch_size=8"]
    shorter = [*short, "--training.eval_samples=8"]
    study = {
        "seeds": [1],
        "tasks": {"chain_sum": {"data": ["--digits=1", "--num-train=64"], "teacher": short, "base": short}},
        "students": {"half": shorter},
        "methods": {"OPD": ["--objective=opd"]},
        "sensitivity": {"task": "chain_sum", "student": "half", "method": "OPD", "variants": {}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [
        sys.executable,
        "-m",
        "examples.study.run_study",
        "--study=study.yaml",
        "--results=results.jsonl",
        "--docs=.",
    ]

    def start() -> list[dict[str, Any]]:
        environment = {**os.environ, "PYTHONPATH": str(STUDY.parent.parent)}
        finished = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    lines = start()
    found = sorted((line["student"], line["seed"], line["method"]) for line in lines)
    wanted = [("teacher", 0, "SFT")] + [("half", 1, name) for name in ("OPD", "SFT", "base")]
    assert found == sorted(wanted)
    opd = next(line for line in lines if line["method"] == "OPD")
    assert opd["steps"] == 4
    assert len(opd["curves"]["grad_norm"]) == 4
    assert set(opd["evaluations"]) == {"0", "1", "2", "3", "4"}
    assert "| OPD |" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study-curves.png").stat().st_size > 10_000
    before = (tmp_path / "results.jsonl").read_text()
    assert start() == lines  # nothing is run again
    assert (tmp_path / "results.jsonl").read_text() == before
