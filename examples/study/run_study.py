"""The study: every objective from the same starts, several seeds, two tasks, two students; then what TrOPD depends on.

    python -m examples.study.run_study                 # hours on two cores; start it again to go on where it stopped
    python -m examples.study.run_study --report        # tables and figures alone, from the committed results

What is run stands in study.yaml; each run is a command of the package on addition.yaml or chain_sum.yaml. Run folders
go to runs/study, one line a finished run to results.jsonl: a run whose line is there, made from the same configs, is
not run again. Seeds are the outermost loop, so a study that was cut short has fewer seeds of everything. The
tables go into docs/study.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tqdm import tqdm

from examples.addition import make_data
from examples.study import make_chains, study_report
from megatron_tropd.config import Config
from megatron_tropd.config_parser import load_config
from megatron_tropd.report import read_metrics

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/study")
DATA = {"addition": make_data.main, "chain_sum": make_chains.main}
"""What writes each task's prompts."""
NUM_EVALUATIONS = 5
SEEDS_APART = 1000
"""From the seed of a start to that of the next attempt."""
MOST_ATTEMPTS = 5
NUM_WINDOWS = 10
"""Points of a curve in results.jsonl, each the mean of a tenth of the run."""
CURVES = ("grad_norm", "student_entropy", "outlier_share", "reward", "on_policy_share", "response_length")


@dataclass(frozen=True)
class Spec:
    """One run: a command of the package on a task's config."""

    task: str
    student: str
    seed: int
    method: str
    command: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Of the run."""
        return RUNS / self.task / self.student / f"seed_{self.seed}" / self.method.replace(" ", "_").replace("%", "pc")

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What tells a line of results.jsonl from the others."""
        return self.task, self.student, self.seed, self.method

    def fingerprint(self, study: dict[str, Any]) -> str:
        """Of all that the result depends on, as far as the study's files say it."""
        text = (HERE / f"{self.task}.yaml").read_text(encoding="utf-8")
        task = study["tasks"][self.task]
        parts = [text, task["data"], task["teacher"], task["base"], self.command, self.overrides]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def teacher_spec(study: dict[str, Any], task: str) -> Spec:
    """SFT of the teacher; one for all seeds and students."""
    teacher = yaml.safe_load((HERE / f"{task}.yaml").read_text(encoding="utf-8"))["teacher"]
    architecture = [f"--student.{name}={json.dumps(value)}" for name, value in teacher.items()]
    return Spec(task, "teacher", 0, "SFT", "sft", ("--teacher=null", *architecture, *study["tasks"][task]["teacher"]))


def base_spec(study: dict[str, Any], task: str, student: str, seed: int) -> Spec:
    """The short SFT that every method starts from."""
    overrides = (*study["students"][student], *study["tasks"][task]["base"], f"--training.seed={seed}")
    return Spec(task, student, seed, "base", "sft", ("--teacher=null", *overrides))


def method_specs(study: dict[str, Any], seed: int) -> Iterator[Spec]:
    """Every method on every task and student, further SFT among them, and the variants; of one seed."""
    for task in study["tasks"]:
        for student in study["students"]:
            yield _distillation(study, task, student, seed, "SFT", ["--teacher=null"], command="sft")
            for method, overrides in study["methods"].items():
                yield _distillation(study, task, student, seed, method, overrides)
    sensitivity = study["sensitivity"]
    usual = study["methods"][sensitivity["method"]]
    for variant, overrides in sensitivity["variants"].items():
        yield _distillation(study, sensitivity["task"], sensitivity["student"], seed, variant, [*usual, *overrides])


def _distillation(
    study: dict[str, Any],
    task: str,
    student: str,
    seed: int,
    method: str,
    overrides: Sequence[str],
    command: str = "train",
) -> Spec:
    base, teacher = base_spec(study, task, student, seed).folder, teacher_spec(study, task).folder
    overrides = [*study["students"][student], f"--student.load={base}", *overrides, f"--training.seed={seed}"]
    if command == "train":
        overrides.append(f"--teacher.load={teacher}")
    return Spec(task, student, seed, method, command, tuple(overrides))


# ------------------------------------------------------------------------------------------------ one process, one run


def run(spec: Spec) -> float:
    """Run to the end, with output into the run folder; returns the seconds it took. For a process of its own."""
    from megatron_tropd.trainer import sft, train

    spec.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(spec.folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    config = _config(spec)
    interval = config.training.eval_interval or max(config.training.train_iters // NUM_EVALUATIONS, 1)
    config = replace(config, training=replace(config.training, eval_interval=interval))
    started = time.perf_counter()
    {"sft": sft, "train": train}[spec.command](config)
    return time.perf_counter() - started


def _config(spec: Spec) -> Config:
    return load_config(HERE / f"{spec.task}.yaml", [*spec.overrides, f"--output_dir={spec.folder}"])


def summarize(spec: Spec, study: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One line of results.jsonl, from the run's metrics."""
    lines = read_metrics(spec.folder / "metrics.jsonl")
    evaluations = [line for line in lines if "accuracy" in line]
    steps = [line for line in lines if "loss" in line]
    count = min(NUM_WINDOWS, len(steps))
    windows = [steps[index * len(steps) // count : (index + 1) * len(steps) // count] for index in range(count)]
    curves = {
        name: [_mean(line.get(name) for line in window) for window in windows]
        for name in CURVES
        if any(line.get(name) is not None for line in steps)
    }
    return {
        "task": spec.task,
        "student": spec.student,
        "seed": spec.seed,
        "method": spec.method,
        "fingerprint": spec.fingerprint(study),
        "accuracy": round(evaluations[-1]["accuracy"], 4),
        "num_prompts": evaluations[-1]["num_prompts"],
        "steps": evaluations[-1]["step"],
        "seconds": round(seconds, 1),
        "evaluations": {str(line["step"]): round(line["accuracy"], 4) for line in evaluations},
        "curves": curves,
    }


def _mean(values: Iterator[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(f"{fmean(numbers):.4g}") if numbers else None


# ------------------------------------------------------------------------------------------------------- all of them


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing, only draw the tables and figures")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", help="what to run (default: study.yaml)")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="one line a run")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where tables and figures go (default: docs)")
    options = parser.parse_args()
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    results = Results(options.results)
    if not options.report:
        _run_all(study, results, options.workers)
    study_report.write_report(study, results.lines, options.docs)


class Results:
    """The lines of results.jsonl; of two for the same run the later one counts."""

    def __init__(self, path: Path):
        self._path = path
        self._lines = {_key(line): line for line in read_metrics(path)}

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All of them, each run once."""
        return list(self._lines.values())

    def has(self, spec: Spec, study: dict[str, Any]) -> bool:
        """Whether this run, from these configs, is there."""
        line = self._lines.get(spec.key)
        return line is not None and line["fingerprint"] == spec.fingerprint(study)

    def add(self, line: dict[str, Any]) -> None:
        """Append at once: an interrupted study loses the runs in hand alone."""
        self._lines[_key(line)] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _key(line: dict[str, Any]) -> tuple[str, str, int, str]:
    return line["task"], line["student"], line["seed"], line["method"]


def _run_all(study: dict[str, Any], results: Results, workers: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # other libraries', in the processes below
    waiting = {
        seed: [spec for spec in method_specs(study, seed) if not results.has(spec, study)] for seed in study["seeds"]
    }
    total = sum(len(specs) for specs in waiting.values())
    if not total:
        return
    context = multiprocessing.get_context("forkserver")  # imports Megatron once; every run is a fresh fork of that
    context.set_forkserver_preload(["megatron_tropd.trainer", "matplotlib.pyplot"])
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        tasks = list(study["tasks"])
        for task in tasks:
            _make_data(study, task)
        _run_starts(pool, [teacher_spec(study, task) for task in tasks], study, results, "teachers")
        for task in tasks:
            _generate(study, task)
        with tqdm(total=total, desc="study", unit="run") as bar:
            for specs in waiting.values():
                bases = {(s.task, s.student, s.seed): base_spec(study, s.task, s.student, s.seed) for s in specs}
                _run_starts(pool, list(bases.values()), study, results, "starts")
                for spec, seconds in _finished(pool, specs):
                    results.add(summarize(spec, study, seconds))
                    shutil.rmtree(spec.folder)
                    bar.update()


def _run_starts(
    pool: ProcessPoolExecutor, specs: list[Spec], study: dict[str, Any], results: Results, title: str
) -> None:
    """Models that others start from: their folders stay, and are made again where they are gone.

    One that ends below its training.target_accuracy, as some initial weights do, is made again from others.
    """
    specs = [spec for spec in specs if not _marker(spec, study).exists()]
    bar = tqdm(total=len(specs), desc=title, unit="run", disable=not specs)
    attempt, waiting = 0, {spec: spec for spec in specs}
    while waiting:
        for spec in waiting:
            shutil.rmtree(spec.folder, ignore_errors=True)  # of other configs, or unfinished
        attempt, failed = attempt + 1, {}
        if attempt > MOST_ATTEMPTS:
            sys.exit(
                f"{', '.join(str(spec.folder) for spec in waiting.values())}: below training.target_accuracy after "
                f"{MOST_ATTEMPTS} attempts: lower it, or raise training.train_iters, in study.yaml"
            )
        for tried, seconds in _finished(pool, list(waiting)):
            spec = waiting[tried]
            line = summarize(spec, study, seconds) | {"attempts": attempt}
            if line["accuracy"] < (_config(spec).training.target_accuracy or 0.0):
                another = f"--training.seed={spec.seed + SEEDS_APART * attempt}"
                failed[replace(spec, overrides=(*spec.overrides, another))] = spec
                continue
            if not results.has(spec, study):
                results.add(line)
            _marker(spec, study).touch()
            bar.update()
        waiting = failed
    bar.close()


def _marker(spec: Spec, study: dict[str, Any]) -> Path:
    return spec.folder / f"finished_{spec.fingerprint(study)}"


def _finished(pool: ProcessPoolExecutor, specs: list[Spec]) -> Iterator[tuple[Spec, float]]:
    """Run ``specs``, as many at a time as the pool has workers; each with its seconds as it ends."""
    futures = {pool.submit(run, spec): spec for spec in specs}
    for future in as_completed(futures):
        spec = futures[future]
        try:
            yield spec, future.result()
        except Exception as error:
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit(f"{spec.folder} failed: {error}\nIts output: {spec.folder / 'output.log'}")


def _make_data(study: dict[str, Any], task: str) -> None:
    folder = RUNS / task / "data"
    if not (folder / "train.jsonl").exists():
        DATA[task]([*study["tasks"][task]["data"], "--out", str(folder)])


def _generate(study: dict[str, Any], task: str) -> None:
    teacher = teacher_spec(study, task).folder
    subprocess.run(
        [sys.executable, "-m", "megatron_tropd", "generate", str(HERE / f"{task}.yaml"), f"--teacher.load={teacher}"],
        check=True,
    )


if __name__ == "__main__":
    main()
