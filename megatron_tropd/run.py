"""A run put together from its config: layout, tokenizer, models, optimizer, folder; resumed where it stopped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd import distributed
from megatron_tropd.ahead import TeacherAhead
from megatron_tropd.checkpoint import Description, find_checkpoint, load_checkpoint, save_checkpoint
from megatron_tropd.config import Config, ConfigError, ModelConfig, architecture
from megatron_tropd.config_checks import layout_sizes, teacher_sizes, validate
from megatron_tropd.config_drift import snapshot
from megatron_tropd.config_layout_checks import expert_sizes, teacher_expert_sizes, virtual_pipeline_size
from megatron_tropd.config_parser import config_text
from megatron_tropd.determinism import enable_determinism
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.exports import drop_exports, export_reference, export_student, exports
from megatron_tropd.guard import Guard
from megatron_tropd.hf_config import HuggingFaceError, is_huggingface
from megatron_tropd.integrity import write_durably
from megatron_tropd.layer_spec import use_transformer_engine
from megatron_tropd.models import build_model, build_teacher, padded_vocab_size
from megatron_tropd.monitor import Monitor
from megatron_tropd.objectives import Objective
from megatron_tropd.optimization import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_tropd.pair import StudentTeacherStage
from megatron_tropd.relabel import relabel_vocabulary
from megatron_tropd.replicas import ReplicaCheck
from megatron_tropd.special_tokens import map_special_tokens
from megatron_tropd.step import Learner
from megatron_tropd.teachers import TeachersAhead, base_as_teacher
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.tokenizer_builder import build_tokenizers, check_tokenizer
from megatron_tropd.trackers import require_trackers
from megatron_tropd.watchdog import Watchdog
from megatron_tropd.weight_gather import WeightGather
from megatron_tropd.weights import adapt, load_weights_of
from megatron_tropd.writing import BackgroundWriter, on_main

# isort: split
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What every command needs once the process groups stand."""

    config: Config
    layout: Layout
    tokenizer: Tokenizer
    folder: Path
    teacher_tokenizer: Tokenizer
    """The student's, where ``tokenizer.teacher`` is not set."""
    monitor: Monitor
    stop_requested: bool = False
    """SIGTERM has arrived on this rank."""
    base: dict[str, Any] = field(default_factory=dict)
    """With LoRA: the weights that the adapters are trained on, as `describe_base` has them."""

    @cached_property
    def background(self) -> BackgroundWriter | None:
        """Writes checkpoints while training goes on; None with ``training.async_save=false``."""
        return BackgroundWriter() if self.config.training.async_save else None

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def max_sequence_length(self) -> int:
        """Longest trajectory, tokens: prompt budget + response budget."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def max_teacher_length(self) -> int:
        """The same as the teacher reads it, which may have a longer prompt."""
        longest = self.config.teacher_context.max_prompt_length
        return max(self.max_sequence_length, (longest or 0) + self.config.rollout.max_response_length)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights: fp32 on the CPU, bf16 on GPUs, unless the config says otherwise."""
        auto = torch.float32 if ON_CPU else torch.bfloat16
        types = {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}
        return types[self.config.training.precision]

    def should_stop(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on every rank."""
        flag = torch.tensor(float(self.stop_requested), device=self.layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @cached_property
    def snapshot(self) -> dict[str, Any]:
        """The config with the hashes of its input files, as a checkpoint keeps it."""
        return snapshot(self.config)

    def keep_config(self) -> None:
        """Write ``config.yaml`` into the run folder, once nothing in there is another run's."""
        if self.layout.is_main:
            write_durably(self.folder / "config.yaml", config_text(self.config))

    def describe(self, step: int) -> Description:
        """What a checkpoint of this run's student at ``step`` is of."""
        return Description(
            step=step,
            seed=self.config.training.seed,
            vocab_size=vocab_size(self.config.student, self.tokenizer),
            tokenizer=self.tokenizer.fingerprint,
            architecture=architecture(self.config.student),
            config=self.snapshot,
            adapter=self.config.lora.shape() | self.base,
        )


def vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """True vocabulary size of a model."""
    return model.vocab_size or tokenizer.vocab_size


@contextmanager
def open_run(config: Config, command: str) -> Iterator[Run]:
    """Check the config, start the process groups, catch SIGTERM; tear everything down at the end.

    A config or tokenizer error is raised on every rank before any group exists.
    """
    validate(config, distributed.world_size(), command)
    require_trackers(config)
    _refuse_what_is_not_here(config)
    tokenizer, teacher_tokenizer = build_tokenizers(config.tokenizer)
    if command in ("train", "sft") and exports(config):
        export_reference(config, vocab_size=vocab_size(config.student, tokenizer))
    tensor_parallel_size, pipeline_parallel_size = layout_sizes(config, command)
    expert_parallel_size, expert_tensor_size = expert_sizes(config, command, tensor_parallel_size)
    if config.training.deterministic:
        enable_determinism()
    layout = distributed.initialize(
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size if command in ("train", "sft") else 1,
        seed=config.training.seed,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        sequence_parallel=config.parallel.sequence_parallel and tensor_parallel_size > 1,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config, command),
        expert_model_parallel_size=expert_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size,
    )
    folder = Path(config.output_dir)
    run = Run(config, layout, tokenizer, folder, teacher_tokenizer, Monitor(config, layout, folder, command))

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        run.stop_requested = True

    previous = signal.signal(signal.SIGTERM, request_stop)
    watchdog = Watchdog(
        layout,
        timeout_seconds=60 * config.parallel.distributed_timeout_minutes,
        on_end=run.monitor.journal.report_hang,
    )
    watchdog.start()
    try:
        with run.monitor:
            if command not in ("train", "sft") and not run.checkpoints.exists():
                run.keep_config()
            yield run
    finally:
        watchdog.stop()
        signal.signal(signal.SIGTERM, previous)
        distributed.finish(layout)


def _refuse_what_is_not_here(config: Config) -> None:
    """ConfigError for options whose hardware or library this machine lacks."""
    if config.optimizer.optimizer_cpu_offload and ON_CPU:
        raise ConfigError(
            "optimizer.optimizer_cpu_offload moves state from GPUs to the host; PyTorch sees no GPU: set it to false"
        )
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.fp8 is not None and not use_transformer_engine():
            raise ConfigError(
                f"{name}.fp8 {model.fp8} needs a GPU and Transformer Engine, which do not work here: leave it out, or "
                "run in a container that has them"
            )


def load_student(run: Run) -> list[GPTModel]:
    """The student's slice on this rank, chunk by chunk, with the weights of ``student.load`` where it is set."""
    build = partial(build_model, recompute=run.config.training.recompute, megatron_linears=run.config.lora.rank > 0)
    return _load(
        run,
        run.layout,
        run.config.student,
        build,
        run.tokenizer,
        max_sequence_length=run.max_sequence_length,
        seed=run.config.training.seed,
    )


def load_teacher(run: Run, layout: Layout | None = None, name: str = "") -> list[GPTModel]:
    """The frozen teacher's slice on this rank, chunk by chunk, in the run's layout or its own. It speaks the student's
    ids.

    ``name`` is one of ``config.teachers``.
    """
    config = run.config.teacher
    assert config is not None  # validate() has refused a run without
    if name:
        config = replace(config, load=run.config.teachers[name])
    layout = layout or run.layout
    teachers = _load(
        run,
        layout,
        config,
        build_teacher,
        run.teacher_tokenizer,
        max_sequence_length=run.max_teacher_length,
        seed=run.config.training.seed + 1,
    )
    mapped = map_special_tokens(run.tokenizer, run.teacher_tokenizer, run.config.tokenizer.special_token_map)
    for teacher in teachers:
        relabel_vocabulary(teacher, mapped, layout.groups.tp)
    return teachers


def load_teachers_ahead(run: Run) -> TeachersAhead:
    """The frozen teachers in a layout of their own, where its sizes differ from the student's."""
    config, layout = run.config, run.layout
    if layout.virtual_pipeline_size > 1:
        layout = replace(layout, virtual_pipeline_size=1)  # a forward alone gains nothing by taking turns
    assert config.teacher is not None
    tensor_parallel_size, pipeline_parallel_size = teacher_sizes(config)
    expert_parallel_size, expert_tensor_size = teacher_expert_sizes(config, "train", tensor_parallel_size)
    sizes = (tensor_parallel_size, pipeline_parallel_size, expert_parallel_size)
    if sizes != (layout.tensor_parallel_size, layout.pipeline_size, layout.expert_parallel_size):
        layout = distributed.another_layout(
            run.layout,
            tensor_model_parallel_size=tensor_parallel_size,
            pipeline_model_parallel_size=pipeline_parallel_size,
            expert_model_parallel_size=expert_parallel_size,
            expert_tensor_parallel_size=expert_tensor_size,
        )
    num_ids = vocab_size(config.teacher, run.teacher_tokenizer)
    padded_num_ids = padded_vocab_size(
        num_ids,
        divisible_by=config.teacher.make_vocab_size_divisible_by,
        tensor_parallel_size=run.layout.tensor_parallel_size,
    )
    teachers = {}
    for name in ("", *config.teachers):
        with distributed.active(layout):
            (teacher,) = load_teacher(run, layout, name)
        teachers[name] = TeacherAhead(
            teacher,
            layout,
            run.layout,
            num_ids=num_ids,
            padded_num_ids=padded_num_ids,
            hidden=config.parallel.teacher_hidden,
            offload=config.parallel.offload_teacher,
        )
    return TeachersAhead(teachers)


def _load(
    run: Run,
    layout: Layout,
    config: ModelConfig,
    build: Callable[..., GPTModel],
    tokenizer: Tokenizer,
    *,
    max_sequence_length: int,
    seed: int,
) -> list[GPTModel]:
    size = vocab_size(config, tokenizer)
    chunks = [
        build(
            config,
            layout,
            vocab_size=size,
            max_sequence_length=max_sequence_length,
            dtype=run.dtype,
            seed=seed if config.load is None else None,
            chunk=chunk,
        )
        for chunk in range(layout.virtual_pipeline_size)
    ]
    if config.load is None:
        if not any(parameter.requires_grad for parameter in chunks[0].parameters()):
            logger.warning("teacher.load is not set: the teacher has random weights, and nothing worth learning")
        return chunks
    folder = Path(config.load)
    if is_huggingface(folder):
        check_tokenizer(tokenizer, folder, size)
    allow, whole = run.config.training.allow_legacy_checkpoints, torch.nn.ModuleList(chunks)
    load_weights_of(folder, whole, layout, config, vocab_size=size, tokenizer=tokenizer.fingerprint, allow_legacy=allow)
    return chunks


def build_learner(run: Run, objective: Objective, *, with_teacher: bool) -> Learner:
    """Student (and teacher) as pipeline stages under DDP, with optimizer and scheduler."""
    config = run.config
    shares_schedule = config.parallel.teacher_schedule == "shared"
    base_is_teacher = with_teacher and config.lora.base_is_teacher
    shared_base, loads_teacher = base_is_teacher and shares_schedule, with_teacher and not base_is_teacher
    ahead = load_teachers_ahead(run) if loads_teacher and not shares_schedule else None
    students = load_student(run)
    run.base = adapt(students, config, run.layout, vocab_size=vocab_size(config.student, run.tokenizer))
    teachers = load_teacher(run) if loads_teacher and shares_schedule else [None] * len(students)
    stages = [
        StudentTeacherStage(student, teacher, output_head=config.training.output_head, base_is_teacher=shared_base)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    if base_is_teacher and not shares_schedule:
        ahead = base_as_teacher(students[0], run.layout, hidden=config.parallel.teacher_hidden)
    chunks = wrap_data_parallel(stages, config.optimizer, run.layout, overlap=not ON_CPU)
    optimizer = build_optimizer(chunks, config.optimizer, run.layout, dtype=run.dtype)
    sizes = [vocab_size(config.student, run.tokenizer)]
    if with_teacher and config.teacher is not None:
        sizes += [vocab_size(config.teacher, run.teacher_tokenizer), run.teacher_tokenizer.vocab_size]
    return Learner(
        chunks=chunks,
        gather=WeightGather(chunks, overlap=config.optimizer.overlap_param_gather),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, train_iters=config.training.train_iters),
        layout=run.layout,
        objective=objective,
        normalization=config.training.normalization,
        fp32_logits=config.training.fp32_logits,
        head_chunk_size=config.training.head_chunk_size,
        max_log_prob_gap=config.training.max_log_prob_gap if with_teacher else None,
        vocab_size=min(run.tokenizer.vocab_size, *sizes),
        ahead=ahead,
        guard=Guard(config.guard),
        replicas=ReplicaCheck(config.guard.replica_check_interval, run.layout),
        phases=run.monitor.phases,
    )


def resume(run: Run, learner: Learner, restore: Callable[[Path], None]) -> int:
    """Continue from the run folder's newest checkpoint, whose path ``restore`` gets; returns the steps done, or 0."""
    if run.background is not None:
        run.background.finish()
    newest = find_checkpoint(run.checkpoints, fall_back=run.config.training.fall_back, is_main=run.layout.is_main)
    if newest is None:
        return 0
    allow = run.config.training.allow_config_changes
    step = load_checkpoint(newest, learner, run.describe(0), allow_config_changes=allow)
    restore(newest)
    run.monitor.journal.steps_done = step
    if run.layout.is_main:
        logger.info("resumed from %s", newest)
    if run.config.training.export_hf_on_save:
        export(run, learner, step)  # where a crash came between the checkpoint and its export
    return step


def save(run: Run, learner: Learner, step: int, files: Mapping[str, str]) -> None:
    """Checkpoint of ``step`` steps done, with ``training.async_save`` only begun; and its export where asked for."""
    training = run.config.training
    save_checkpoint(
        run.checkpoints,
        learner,
        run.describe(step),
        keep=training.keep_checkpoints,
        keep_every=training.keep_every,
        files=files,
        background=run.background,
    )
    if training.export_hf_on_save:
        try:
            export(run, learner, step, anew=True)
        except HuggingFaceError:
            if run.background is not None:
                run.background.finish()  # the run ends here, and the checkpoint in hand is whole
            raise


def export(run: Run, learner: Learner, step: int, *, anew: bool = False) -> None:
    """The student after ``step`` steps as a Hugging Face folder; one that is there is left alone, unless ``anew``."""
    config = run.config
    learner.gather.finish()
    size = vocab_size(config.student, run.tokenizer)
    export_student(torch.nn.ModuleList(learner.students), run.layout, config, step, vocab_size=size, anew=anew)
    if config.training.export_hf_on_save:
        on_main(lambda: drop_exports(run.folder, run.checkpoints, newest=step), run.layout.is_main)
