"""Held-out evaluation: responses by an engine, judged by verifiers, with confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_tropd.building import load_student
from megatron_tropd.checkpoint import latest_checkpoint
from megatron_tropd.config import Config
from megatron_tropd.config_checks import student_architecture
from megatron_tropd.config_tasks import EvaluationConfig
from megatron_tropd.distributed import Layout, from_main
from megatron_tropd.engines import Engines
from megatron_tropd.estimators import Sample, summarize
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_sources import read_prompt_file
from megatron_tropd.rollout import RolloutEngine
from megatron_tropd.run import Run, open_run, vocab_size
from megatron_tropd.sandbox import Limits
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.types import Rollout, RolloutRequest
from megatron_tropd.verify import VerifierOptions, check_task, verify


def evaluate_prompts(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    layout: Layout,
    tokenizer: Tokenizer,
    *,
    max_response_length: int,
    num_samples: int = 1,
    options: VerifierOptions | None = None,
) -> list[Sample]:
    """Answer every prompt ``num_samples`` times and judge the responses; the same list on every rank, by prompt.

    Every rank calls it with the same prompts; samples are spread over data-parallel ranks, and one rank of each model
    replica runs the verifiers. Sample j of prompt i has the sample id ``i * num_samples + j``, which keys its draws.
    ``estimators.summarize`` makes metrics of the result. Raises ValueError, on every rank and before anything is
    generated, where there are no prompts or one cannot be verified.
    """
    check_prompts(prompts, layout, options)
    requests = [
        RolloutRequest(index * num_samples + sample, prompt, ())
        for index, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]
    mine = requests[layout.data_parallel_rank :: layout.data_parallel_size]
    rollouts = engine.generate(mine, max_response_length=max_response_length)
    judged: list[tuple[int, Sample]] = []
    if layout.is_model_replica_leader:
        judged = [(r.request.sample_id, _judge(r, tokenizer, num_samples, options)) for r in rollouts]
    shares: list[list[tuple[int, Sample]]] = [[] for _ in range(layout.world_size)]
    dist.all_gather_object(shares, judged)
    return [sample for _, sample in sorted(chain(*shares), key=lambda pair: pair[0])]


def check_prompts(prompts: Sequence[Prompt], layout: Layout, options: VerifierOptions | None = None) -> None:
    """Raise ValueError on every rank where there is no prompt or a prompt has what its verifier cannot use."""
    problem = "" if prompts else "there are no prompts to evaluate: check data.validation"
    if layout.is_main:
        for prompt in prompts:
            if found := check_task(prompt.verifier, prompt.answer, prompt.details, options):
                problem = f"prompt {prompt.id!r} cannot be evaluated with the verifier {prompt.verifier}: {found}"
                break
    if problem := from_main(problem):
        raise ValueError(problem)


def _judge(rollout: Rollout, tokenizer: Tokenizer, num_samples: int, options: VerifierOptions | None) -> Sample:
    prompt = rollout.request.prompt
    response = tokenizer.decode(rollout.response)
    verdict = verify(prompt.verifier, response, prompt.answer, prompt.details, options)
    return Sample(
        id=prompt.id,
        sample=rollout.request.sample_id % num_samples,
        prompt=prompt.text,
        answer=prompt.answer,
        response=response,
        extracted=verdict.extracted,
        score=verdict.score,
        num_tokens=len(rollout.response),
        finished=rollout.finished,
    )


class Evaluator:
    """The held-out measures of a run; calls return the same metrics on every rank."""

    def __init__(self, run: Run, engines: Engines, *, vocab_size: int, num_prompts: int | None):
        """Reads ``data.validation`` and ``evaluation.files``, of each the first ``num_prompts`` prompts (None: all)."""
        config, self._run = run.config, run
        self._options = verifier_options(config.evaluation)
        self._prompts = {
            name: read_prompt_file(config, run.tokenizer, path)[0][:num_prompts]
            for name, path in _benchmarks(config).items()
        }
        for prompts in self._prompts.values():
            check_prompts(prompts, run.layout, self._options)
        self._engine = engines.build(
            replace(config.rollout, temperature=config.evaluation.temperature, top_p=config.evaluation.top_p),
            vocab_size=vocab_size,
            eos_id=run.tokenizer.eos_id,
            # Draws of their own: training samples with the seed itself, the teacher's answers with the next.
            seed=config.training.seed + 2,
        )

    def __call__(self) -> dict[str, float]:
        """``summarize`` of every benchmark; those of ``evaluation.files`` as ``NAME/...``; empty without prompts."""
        return self.measure()[0]

    def measure(self) -> tuple[dict[str, float], dict[str, list[Sample]]]:
        """The metrics of a call, and the judged samples of every benchmark by its name."""
        config = self._run.config
        samples = {
            name: evaluate_prompts(
                self._engine,
                prompts,
                self._run.layout,
                self._run.tokenizer,
                max_response_length=config.evaluation.max_response_length or config.rollout.max_response_length,
                num_samples=config.evaluation.num_samples,
                options=self._options,
            )
            for name, prompts in self._prompts.items()
        }
        metrics = {
            key if name == VALIDATION else f"{name}/{key}": value
            for name, found in samples.items()
            for key, value in summarize(found, config.evaluation.pass_at).items()
        }
        return metrics, samples


VALIDATION = "validation"
"""Name of ``data.validation`` among the benchmarks; its metrics have no prefix."""


def _benchmarks(config: Config) -> dict[str, str]:
    """Name to path of every file to evaluate on."""
    own = {VALIDATION: config.data.validation} if config.data.validation is not None else {}
    return own | {Path(path).stem: path for path in config.evaluation.files}


def verifier_options(evaluation: EvaluationConfig) -> VerifierOptions:
    """The limits that programs are judged under."""
    seconds = evaluation.program_seconds
    limits = Limits(
        cpu_seconds=max(1, round(seconds)),
        wall_seconds=seconds,
        memory_bytes=evaluation.program_memory_mb * 2**20,
    )
    return VerifierOptions(limits, evaluation.require_namespaces)


def evaluate(config: Config) -> None:
    """The `evaluate` command: the student's newest checkpoint of the run folder (else ``student.load``), as a table.

    Leaves ``<output_dir>/evaluation.json`` (the metrics) and ``<output_dir>/evaluation/NAME.jsonl`` (every sample).
    """
    with open_run(config, "evaluate") as run:
        newest = from_main(latest_checkpoint(run.checkpoints))
        if newest is not None:
            config = replace(config, student=replace(config.student, load=str(newest)))
        run.config = config = replace(config, student=student_architecture(config, "evaluate"))
        (model,) = load_student(run)
        engines = Engines(model, run.layout)
        size = vocab_size(config.student, run.tokenizer)
        metrics, samples = Evaluator(run, engines, vocab_size=size, num_prompts=None).measure()
        if run.layout.is_main:
            _print_table(config, metrics)
            (run.folder / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            _write_samples(run.folder / "evaluation", samples)


def _write_samples(folder: Path, samples: dict[str, list[Sample]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, found in samples.items():
        lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in found]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _print_table(config: Config, metrics: dict[str, float]) -> None:
    table = Table(title=f"{config.student.load or 'random weights'}: {', '.join(_benchmarks(config).values())}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        bounds = [metrics[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in metrics]
        table.add_row(name, f"{value:.4g}", " to ".join(f"{bound:.4g}" for bound in bounds))
    Console().print(table)
