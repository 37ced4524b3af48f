"""`--dry-run` of `train` and `generate`: what would stop a run, all of it at once, and the plan of one that can start.

Nothing is started: no process group, no rank, no folder. Nothing is written but the index of a store of answers that
has none, which the run would write too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_tropd.answer_shards import check_header
from megatron_tropd.answers import AnswerStore, UnfinishedStoreError
from megatron_tropd.checkpoint import Description, check_same, latest_checkpoint, read_description, resolve
from megatron_tropd.config import Config, ModelConfig, architecture, resolved_schedule
from megatron_tropd.config_checks import problems, teacher_sizes
from megatron_tropd.config_layout_checks import expert_sizes, teacher_expert_sizes
from megatron_tropd.config_sides import num_generators
from megatron_tropd.exports import export_reference, exports
from megatron_tropd.generate import answer_header
from megatron_tropd.hf_config import is_huggingface
from megatron_tropd.huggingface import check_architecture, open_weights
from megatron_tropd.megatron_lm import check_arguments, iteration_in
from megatron_tropd.planner import (
    Sizes,
    element_bytes,
    generation_engine,
    generation_layout,
    generation_memory,
    job_memory,
    micro_batch_rows,
    model_parameters,
    rollout_layout,
    stage_adapter_parameters,
    stage_parameters,
    student_layout,
    teacher_layout,
)
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_sources import read_prompt_file, read_training_prompts, refuse_unshared
from megatron_tropd.run import vocab_size
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.tokenizer_builder import build_tokenizers, check_tokenizer


@dataclass
class Findings:
    """What a dry run found."""

    problems: list[str] = field(default_factory=list)
    """What would stop the run."""
    warnings: list[str] = field(default_factory=list)
    """What has to be there, or be known, before it starts."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A ValueError, which is what this package refuses with, becomes a problem."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(str(error))

    def warn_of(self, skipped: Mapping[str, int]) -> None:
        """Prompts that are too long, by file."""
        for path, number in skipped.items():
            if number:
                self.warnings.append(f"{path}: {number} prompts are over their length budget and are skipped")


def dry_run(config: Config, command: str, world_size: int | None = None) -> int:
    """Print the plan of ``command``, or every problem; returns the exit status, 1 where there is a problem.

    ``command`` is train or generate; ``world_size`` the number of processes; None: WORLD_SIZE, or without it one model
    replica.
    """
    if world_size is None:
        world_size = _implied_world_size(config, command)
    generates = command == "generate"
    found = check_generation(config, world_size) if generates else check(config, world_size)
    for warning in found.warnings:
        print(f"warning: {warning}")
    if found.problems:
        count = f"{len(found.problems)} problem" + "s" * (len(found.problems) > 1)
        print("\n".join([f"this run cannot start, {count}:", *(f"  - {problem}" for problem in found.problems)]))
        return 1
    print(describe_generation(config, world_size) if generates else describe(config, world_size))
    return 0


def _implied_world_size(config: Config, command: str) -> int:
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if command == "generate":
        return max(1, math.prod(teacher_sizes(config)))
    parallel, generators = config.parallel, num_generators(config, "train")
    student = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if generators:
        return max(1, student) + generators
    # Whole replicas of the student, of a teacher in a layout of its own, of either's experts, and of an inference copy.
    context, copy = parallel.context_parallel_size, config.rollout.tensor_model_parallel_size or 1
    tensor, pipeline = teacher_sizes(config)
    experts = (
        parallel.pipeline_model_parallel_size
        * math.prod(expert_sizes(config, "train", parallel.tensor_model_parallel_size)),
        pipeline * math.prod(teacher_expert_sizes(config, "train", tensor)),
    )
    return max(1, math.lcm(student * context, tensor * pipeline * context, copy, *experts))


def check(config: Config, world_size: int) -> Findings:
    """Every check of `train` that needs no process group: sizes, tokenizer, prompts, answers, weights, folders."""
    found, tokenizers = _begin(config, world_size, "train")
    if tokenizers is None:
        return found
    tokenizer, teacher_tokenizer = tokenizers
    _check_data(config, tokenizer, teacher_tokenizer, found)
    legacy = config.training.allow_legacy_checkpoints
    for name, model, own in (("student", config.student, tokenizer), *_teachers(config, teacher_tokenizer)):
        _check_weights(name, model, own, found, allow_legacy=legacy)
    _check_resume(config, tokenizer, found)
    if exports(config):
        with found.collect():
            export_reference(config, vocab_size=vocab_size(config.student, tokenizer))
    return found


def check_generation(config: Config, world_size: int) -> Findings:
    """The same of `generate`: of the teachers alone, and whether the store can be begun or continued."""
    found, tokenizers = _begin(config, world_size, "generate")
    if tokenizers is None:
        return found
    tokenizer, teacher_tokenizer = tokenizers
    with found.collect():
        mixture, skipped = read_training_prompts(config, tokenizer, for_teacher=True)
        refuse_unshared(mixture.prompts, tokenizer, teacher_tokenizer)
        found.warn_of(skipped)
    for name, model, own in _teachers(config, teacher_tokenizer):
        _check_weights(name, model, own, found, allow_legacy=config.training.allow_legacy_checkpoints)
    guidance = config.guidance
    if guidance.answers is None or config.teacher is None:
        return found  # which is among the problems
    store = Path(guidance.answers)
    if not store.exists():
        _check_writable("guidance.answers", store.parent, found)
        return found
    with found.collect():
        check_header(store, answer_header(config, tokenizer), guidance.answers_per_shard)
        found.warnings.append(f"guidance.answers {store} is there: what it lacks is added, and nothing else done")
    return found


def _begin(config: Config, world_size: int, command: str) -> tuple[Findings, tuple[Tokenizer, Tokenizer] | None]:
    """What every command needs, and the student's and the teacher's tokenizer; None: no file of text can be read."""
    found = Findings(problems=problems(config, world_size, command))
    _check_writable("output_dir", Path(config.output_dir), found)
    with found.collect():
        return found, build_tokenizers(config.tokenizer)
    return found, None


def _teachers(config: Config, tokenizer: Tokenizer) -> list[tuple[str, ModelConfig, Tokenizer]]:
    """(Name of its section, model, tokenizer) of every teacher."""
    teacher = config.teacher
    if teacher is None:
        return []
    named = {f"teachers.{name}": replace(teacher, load=folder) for name, folder in config.teachers.items()}
    return [(name, model, tokenizer) for name, model in {"teacher": teacher, **named}.items()]


def _check_writable(name: str, folder: Path, found: Findings) -> None:
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        found.problems.append(f"{name} {folder}: {existing} is a file, not a folder: choose another folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        found.problems.append(f"{name} {folder}: {existing} is not writable: choose another folder")


def _check_data(config: Config, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, found: Findings) -> None:
    data = config.data
    prompts: Sequence[Prompt] = []
    skipped: dict[str, int] = {}
    with found.collect():
        mixture, skipped = read_training_prompts(config, tokenizer)
        prompts = mixture.prompts
        refuse_unshared(prompts, tokenizer, teacher_tokenizer)
    with found.collect():
        if data.validation is not None:
            _, skipped[data.validation] = read_prompt_file(config, tokenizer, data.validation)
    found.warn_of(skipped)
    answers = config.guidance.answers
    if resolved_schedule(config) == "none" or answers is None:
        return
    if not Path(answers).exists():
        found.warnings.append(
            f"guidance.answers {answers} is not there yet: `python -m megatron_tropd generate` writes it"
        )
        return
    with found.collect():
        try:
            size = min(tokenizer.vocab_size, teacher_tokenizer.vocab_size)
            AnswerStore.read(answers, tokenizer.fingerprint, size).require(prompts)
        except UnfinishedStoreError as error:
            found.warnings.append(f"{error}, which has to come first")


def _check_weights(name: str, model: ModelConfig, tokenizer: Tokenizer, found: Findings, *, allow_legacy: bool) -> None:
    if model.load is None:
        found.warnings.append(f"{name}.load is not set: the {name} starts with random weights")
        return
    folder, size = Path(model.load), vocab_size(model, tokenizer)
    with found.collect():
        if not folder.exists():
            raise FileNotFoundError(f"{name}.load {folder} is not there: correct the path, or take the field out")
        if not is_huggingface(folder):
            if (iteration := iteration_in(folder)) is not None:
                check_arguments(iteration, model, allow_legacy=allow_legacy)
                return
            path = resolve(folder)
            description = read_description(path)
            seed, fingerprint = description.seed, tokenizer.fingerprint
            expected = Description(description.step, seed, size, fingerprint, architecture(model))
            check_same(path, replace(description, adapter={}), expected)
            if base := description.adapter.get("base"):
                _check_weights(name, replace(model, load=base), tokenizer, found, allow_legacy=allow_legacy)
            return
        check_architecture(folder, model, vocab_size=size)
        check_tokenizer(tokenizer, folder, size)
        if not list(folder.glob("*.safetensors*")):
            found.warnings.append(f"{name}.load {folder} has a config.json but no weights (*.safetensors) yet")
            return
        open_weights(folder, model, vocab_size=size)


def _check_resume(config: Config, tokenizer: Tokenizer, found: Findings) -> None:
    with found.collect():
        newest = latest_checkpoint(Path(config.output_dir) / "checkpoints")
        if newest is None:
            return
        description = read_description(newest)
        expected = Description(
            step=description.step,
            seed=config.training.seed,
            vocab_size=vocab_size(config.student, tokenizer),
            tokenizer=tokenizer.fingerprint,
            architecture=architecture(config.student),
            adapter=config.lora.shape(),
        )
        check_same(newest, description, expected)
        found.warnings.append(f"{config.output_dir} holds a run: it continues after step {description.step}")


# ----------------------------------------------------------------------------------------------------------- the plan


_MEMORY = "memory     estimated GB on a rank, {}, longest sequences, fused attention; without CUDA context and NCCL"


def describe(config: Config, world_size: int) -> str:
    """The plan of a valid config as text: layout, parameters, tokens of a step, memory of each pipeline stage."""
    config = with_vocab_sizes(config, *build_tokenizers(config.tokenizer))
    parallel, training, rollout = config.parallel, config.training, config.rollout
    generators = num_generators(config, "train")
    layout = student_layout(config, world_size - generators)
    own, generating = (find(config, generators or world_size) for find in (teacher_layout, rollout_layout))
    length = config.data.max_prompt_length + rollout.max_response_length
    rows, chunks = micro_batch_rows(config), parallel.virtual_pipeline_model_parallel_size
    num_micro_batches = math.ceil(training.global_batch_size / (rows * layout.data))
    packing = ""
    if training.micro_batch_tokens is not None:
        packing = f", fewer of more where sequences are shorter ({training.micro_batch_tokens:,} positions)"
    lines = [
        f"run        {config.objective}, {training.train_iters} steps, in {config.output_dir}",
        *(
            [f"sides      {layout.world} ranks train, {generators} generate and judge the step after"]
            if generators
            else []
        ),
        f"layout     {_sizes(layout)}"
        + ", sequence parallel" * parallel.sequence_parallel
        + f", {chunks} chunks a pipeline rank" * (chunks > 1),
        *([f"           teacher ahead: {_sizes(own)}"] if parallel.teacher_schedule == "ahead" else []),
        *([f"           rollouts on a copy: {_sizes(generating)}"] if rollout.tensor_model_parallel_size else []),
        *(
            f"{name:<11}{model_parameters(model) / 1e9:.3f} B parameters; on a rank of each stage "
            + ", ".join(f"{count / 1e9:.3f} B" for count in _stage_parameters(model, sizes))
            for name, model, sizes in (("student", config.student, layout), ("teacher", config.teacher, own))
            if model is not None
        ),
        *_adapters(config, layout),
        f"step       {training.global_batch_size} sequences = "
        f"{training.global_batch_size // rollout.samples_per_prompt} prompts x {rollout.samples_per_prompt} rollouts; "
        f"at most {training.global_batch_size * length:,} tokens ({length:,} each)",
        f"micro-batches  {num_micro_batches} of {rows} on each data-parallel rank{packing}",
        _MEMORY.format("fp32" if element_bytes(config) == 4 else "bf16"),
        *memory_table(config, world_size),
        "nothing was started",
    ]
    return "\n".join(lines)


def describe_generation(config: Config, world_size: int) -> str:
    """The plan of a valid config for `generate` as text: layout, engine, memory of each pipeline stage."""
    config = with_vocab_sizes(config, *build_tokenizers(config.tokenizer))
    assert config.teacher is not None
    layout, engine = generation_layout(config, world_size), generation_engine(config, world_size)
    kinds = generation_memory(config, world_size)
    lines = [
        f"run        generate: the teacher's answers to data.train, in {config.guidance.answers}",
        f"layout     {_sizes(layout)}",
        f"teacher    {model_parameters(config.teacher) / 1e9:.3f} B parameters; on a rank of each stage "
        + ", ".join(f"{count / 1e9:.3f} B" for count in _stage_parameters(config.teacher, layout)),
        f"engine     on GPUs {engine.kind} batching; on each data-parallel rank rollout.max_batch_size = "
        f"{config.rollout.max_batch_size} sequences at once; answers of at most "
        f"{config.rollout.max_response_length:,} tokens",
        _MEMORY.format("fp32" if element_bytes(config) == 4 else "bf16"),
        *_table({name: kind.components() | {"peak": kind.peak} for name, kind in kinds.items()}),
        "nothing was started",
    ]
    return "\n".join(lines)


def _stage_parameters(model: ModelConfig, sizes: Sizes) -> list[int]:
    return stage_parameters(model, sizes.tensor, sizes.pipeline, sizes.experts)


def _adapters(config: Config, layout: Sizes) -> list[str]:
    if not config.lora.rank:
        return []
    counts = stage_adapter_parameters(config.student, config.lora, layout.tensor, layout.pipeline)
    whole = sum(stage_adapter_parameters(config.student, config.lora, 1, 1))
    teacher = "; the teacher is the base" if config.lora.base_is_teacher else ""
    return [
        f"adapters   {whole / 1e6:.1f} M parameters of rank {config.lora.rank}; on a rank of each stage "
        + ", ".join(f"{count / 1e6:.1f} M" for count in counts)
        + teacher
    ]


def _sizes(layout: Sizes) -> str:
    context = f" x context {layout.context}" if layout.context > 1 else ""
    spread = "" if layout.experts is None else f", experts over {layout.experts} of a stage's"
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline}{context} x data {layout.data}"
    return f"{layout.world} ranks = {sizes}{spread}"


def with_vocab_sizes(config: Config, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> Config:
    """The config with both models' true vocabulary sizes written out."""
    student = replace(config.student, vocab_size=vocab_size(config.student, tokenizer))
    teacher = config.teacher
    if teacher is not None:
        teacher = replace(teacher, vocab_size=vocab_size(teacher, teacher_tokenizer))
    return replace(config, student=student, teacher=teacher)


def memory_table(config: Config, world_size: int) -> list[str]:
    """Components that are not 0 on some rank, in GB, one column for each kind of rank."""
    kinds = job_memory(config, world_size)
    return _table({name: kind.components() | {"peak": kind.peak} for name, kind in kinds.items()})


def _table(columns: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = {name: [column[name] for column in columns.values()] for name in next(iter(columns.values()))}
    return [
        f"  {'rank of':<16}" + "".join(f"{name:>20}" for name in columns),
        *(
            f"  {name.replace('_', ' '):<16}" + "".join(f"{value / 1e9:>20.3f}" for value in values)
            for name, values in rows.items()
            if any(values)
        ),
    ]
