"""Which layouts of a run fit on so many GPUs, how long a step of each would take, and what limits it.

python tools/plan_run.py --student qwen3-8b --teacher qwen3-32b --gpu H100 --gpus 16 --write run.yaml

A prediction from published figures of the GPUs and stated assumptions (docs/scaling.md), not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.config import (
    Config,
    ConfigError,
    DataConfig,
    GuidanceConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    TokenizerConfig,
    TrainingConfig,
    resolved_schedule,
)
from megatron_tropd.config_checks import problems
from megatron_tropd.config_model_checks import one_stage
from megatron_tropd.config_parser import load_config
from megatron_tropd.planner.hardware import GPUS, Assumptions
from megatron_tropd.planner.layouts import MOST, plans
from megatron_tropd.planner.parameters import model_parameters
from megatron_tropd.planner.plan import WORTH, Plan, order
from megatron_tropd.planner.shapes import SHAPES, find_model
from megatron_tropd.planner.sizes import Sizes

LENGTHS = {
    "max_prompt_length": (1024, "tokens"),
    "max_response_length": (8192, "tokens"),
    "global_batch_size": (512, "sequences of a step"),
    "samples_per_prompt": (4, "rollouts of a prompt"),
}
"""Option to its default and meaning, where no config says it."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = f"a Hugging Face folder, a YAML file with a model's fields, or one of {', '.join(SHAPES)}"
    parser.add_argument("--config", help="plan this run's models, lengths and batch; only its layout is changed")
    parser.add_argument("--student", help=what)
    parser.add_argument("--teacher", help=what)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, 8 in a node")
    for option, (default, text) in LENGTHS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, help=f"{text}: {default} (not with --config)")
    parser.add_argument(
        "--one-step-off",
        action="store_true",
        help="list jobs too in which some GPUs generate while others train (training.one_step_off: rollouts are a step "
        "old); with a config that has it, these alone are listed",
    )
    for field in fields(Assumptions):
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=float, default=field.default, help="assumed: %(default)s")
    parser.add_argument("--top", type=int, default=10, help="layouts to list")
    parser.add_argument("--write", type=Path, help="write a config of one layout to this file")
    parser.add_argument("--layout", type=int, default=1, help="which row to write and to show in detail")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Plan, print, write; the exit status is 1 where nothing fits, 2 for what has to be corrected."""
    options = parse(arguments)
    try:
        if options.gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, found {options.gpus}")
        if options.write is not None and not options.write.parent.is_dir():
            raise ConfigError(f"--write {options.write}: there is no folder {options.write.parent}, make it first")
        assumed = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
        config = _config(options)
        _refuse_in_any_layout(config)
        two_sided = replace(config, training=replace(config.training, one_step_off=True))
        if options.one_step_off:
            _refuse_in_any_layout(two_sided)
        missing = [rank for rank in config.monitoring.profile_ranks if rank >= options.gpus]
        if config.monitoring.profile and missing:
            raise ConfigError(f"monitoring.profile_ranks {missing} are not among {options.gpus} ranks: choose others")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpu = GPUS[options.gpu]
    found = plans(config, options.gpus, gpu, assumed)
    if options.one_step_off and not config.training.one_step_off:
        found = sorted([*found, *plans(two_sided, options.gpus, gpu, assumed)], key=order)[:MOST]
    if not found:
        print(
            f"no layout fits on {options.gpus} {gpu.name} of {gpu.memory / 1e9:.0f} GB: take more GPUs, shorter "
            "sequences, or a batch that more data-parallel sizes divide"
        )
        return 1
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        assert model is not None
        print(f"{name}: {model_parameters(model) / 1e9:.2f} B parameters")
    print(
        f"{len(found)}{' or more' * (len(found) == MOST)} layouts fit on {options.gpus} {gpu.name} of "
        f"{gpu.memory / 1e9:.0f} GB ({assumed.memory_reserve / 1e9:.0f} kept free): tensor x pipeline x data, with\n"
        "sequence parallelism where tensor > 1. Predicted seconds, fastest first, but chunks, spread experts and a "
        f"copy\ncount as {WORTH:.0%} more each:\n\n" + _table(found[: options.top])
    )
    if not 1 <= options.layout <= len(found):
        print(f"error: --layout {options.layout} is not one of the {len(found)} that fit", file=sys.stderr)
        return 2
    chosen = found[options.layout - 1]
    print(f"\nlayout {options.layout}, limited by its {chosen.time.limit}:\n\n{_detail(chosen)}\n")
    if options.write is not None:
        header = f"# Planned for {options.gpus} {gpu.name} by tools/plan_run.py: predicted, not measured.\n"
        text = yaml.safe_dump(_without_defaults(chosen.config, Config), sort_keys=False)
        options.write.write_text(header + text, encoding="utf-8")
        check = f"python -m megatron_tropd train {options.write} --dry-run --world-size={options.gpus}"
        print(f"wrote {options.write}; check it with `{check}`")
    for note in _not_priced(chosen.config):
        print(f"not in these seconds: {note}")
    return 0


def _not_priced(config: Config) -> list[str]:
    fp8 = [name for name, model in (("student", config.student), ("teacher", config.teacher)) if model and model.fp8]
    notes = {
        f"fp8 of the {' and the '.join(fp8)}: products are counted as bf16's": bool(fp8),
        "prefixes of teacher answers, which shorten generation until the schedule has brought them to nothing": (
            resolved_schedule(config) != "none" and config.objective != "seq-kd"
        ),
    }
    return [note for note, applies in notes.items() if applies]


def _refuse_in_any_layout(config: Config) -> None:
    """Raise ConfigError for what is wrong with the run itself: with a micro-batch of one on one rank, or on one of each
    side."""
    two_sided = config.training.one_step_off
    simplest = replace(
        config,
        student=one_stage(config.student),
        teacher=one_stage(config.teacher) if config.teacher is not None else None,
        parallel=ParallelConfig(teacher_schedule="ahead", generator_ranks=1 if two_sided else None),
        rollout=replace(config.rollout, tensor_model_parallel_size=1 if two_sided else None),
        training=replace(config.training, micro_batch_size=1),
        monitoring=replace(config.monitoring, profile=False),
    )
    if found := problems(simplest, 2 if two_sided else 1, "train"):
        raise ConfigError("this run cannot start in any layout:\n" + "\n".join(f"  - {problem}" for problem in found))


def _config(options: argparse.Namespace) -> Config:
    given = [name for name in ("student", "teacher", *LENGTHS) if getattr(options, name) is not None]
    if options.config is not None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"--config {options.config} says what {names} would: leave out the one or the other")
        config = load_config(options.config)
        if config.teacher is None or None in (config.student.vocab_size, config.teacher.vocab_size):
            raise ConfigError(f"{options.config}: planning needs student.vocab_size, and a teacher with vocab_size")
        return config
    if options.student is None or options.teacher is None:
        raise ConfigError("give --student and --teacher, or --config")
    student, teacher = _model(options.student), _model(options.teacher)
    assert student.load is not None
    lengths = {name: default if (value := getattr(options, name)) is None else value
               for name, (default, _) in LENGTHS.items()}  # fmt: skip
    return Config(
        student=student,
        teacher=teacher,
        data=DataConfig(train="data/train.jsonl", max_prompt_length=lengths["max_prompt_length"], long_prompts="skip"),
        output_dir="runs/planned",
        guidance=GuidanceConfig(answers="data/teacher_answers.jsonl"),
        rollout=RolloutConfig(
            samples_per_prompt=lengths["samples_per_prompt"], max_response_length=lengths["max_response_length"]
        ),
        tokenizer=TokenizerConfig(kind="huggingface", model=student.load),
        training=TrainingConfig(global_batch_size=lengths["global_batch_size"]),
    )


def _model(name: str) -> ModelConfig:
    """The model with a place for its weights."""
    model = find_model(name)
    if model.load is not None:
        return model
    return replace(model, load=f"checkpoints/{name if name in SHAPES else Path(name).stem}")


def _without_defaults(section: Any, cls: type) -> dict[str, Any]:
    """The fields that differ from their defaults, as YAML has them."""
    values: dict[str, Any] = {}
    for field in fields(cls):
        value = getattr(section, field.name)
        if is_dataclass(value):
            if inner := _without_defaults(value, type(value)):
                values[field.name] = inner
        elif value != (field.default if field.default_factory is MISSING else field.default_factory()):
            values[field.name] = value
    return values


def _table(found: list[Plan]) -> str:
    has_sides = any(plan.time.hidden for plan in found)
    rows: list[tuple[str, ...]] = [
        ("", "student", "teacher", "micro-batch", "engine rows", "GB", "step s", "rollout", "teacher", "student",
         "bubble", "other", *["hidden"] * has_sides, "limit")
    ]  # fmt: skip
    for number, plan in enumerate(found, start=1):
        time, training = plan.time, plan.config.training
        other = time.gradients + time.optimizer + time.transfer + time.refit
        parts = [plan.peak / 1e9, time.total, time.rollout, time.teacher, time.student, time.bubble, other]
        parts += [-time.hidden or 0.0] * has_sides
        rows.append(
            (
                str(number),
                _student(plan),
                _teacher(plan),
                f"{training.micro_batch_size}" + " rec." * training.recompute,
                str(plan.config.rollout.max_batch_size),
                *(f"{part:.1f}" for part in parts),
                time.limit,
            )
        )
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _sizes(sizes: Sizes) -> str:
    return f"{sizes.tensor}x{sizes.pipeline}x{sizes.data}"


def _student(plan: Plan) -> str:
    parallel, copy = plan.config.parallel, plan.config.rollout.tensor_model_parallel_size
    chunks, context = parallel.virtual_pipeline_model_parallel_size, parallel.context_parallel_size
    spread = _spread(parallel.expert_model_parallel_size)
    parts = {f"context {context}": context > 1, f"{chunks} chunks": chunks > 1, spread: spread != "",
             f"copy {copy}": copy is not None}  # fmt: skip
    return ", ".join([_sizes(plan.sizes[0]), *(text for text, is_set in parts.items() if is_set)])


def _spread(size: int | None) -> str:
    return f"experts over {size}" if (size or 1) > 1 else ""


def _teacher(plan: Plan) -> str:
    parallel = plan.config.parallel
    if parallel.teacher_schedule == "shared":
        return "shared"
    if plan.config.training.one_step_off:
        return f"one step off {_sizes(plan.sizes[1])}, {parallel.generator_ranks} GPUs"
    spread = _spread(parallel.teacher_expert_model_parallel_size)
    parts = (f"ahead {_sizes(plan.sizes[1])}", spread, "on host" * parallel.offload_teacher)
    return ", ".join(part for part in parts if part)


def _detail(plan: Plan) -> str:
    kinds = plan.memory
    rows: list[tuple[str, ...]] = [("GB on a rank of", *kinds)]
    for name in next(iter(kinds.values())).components():
        rows.append((name.replace("_", " "), *(f"{kind.components()[name] / 1e9:.2f}" for kind in kinds.values())))
    rows.append(("peak", *(f"{kind.peak / 1e9:.2f}" for kind in kinds.values())))
    return _aligned(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
