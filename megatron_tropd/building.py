"""What a run is made of: student, teacher, both as the stages that learn, with optimizer and scheduler; its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_tropd import distributed
from megatron_tropd.ahead import TeacherAhead
from megatron_tropd.apart import TeacherApart
from megatron_tropd.batch import build_batch
from megatron_tropd.config import ModelConfig
from megatron_tropd.config_checks import teacher_sizes
from megatron_tropd.config_layout_checks import teacher_expert_sizes
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.guard import Guard
from megatron_tropd.hf_config import is_huggingface
from megatron_tropd.models import build_model, build_teacher, padded_vocab_size
from megatron_tropd.objectives import Objective
from megatron_tropd.optimization import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_tropd.pair import StudentTeacherStage
from megatron_tropd.relabel import relabel_vocabulary
from megatron_tropd.replicas import ReplicaCheck
from megatron_tropd.run import Run, vocab_size
from megatron_tropd.special_tokens import map_special_tokens
from megatron_tropd.step import Learner
from megatron_tropd.teachers import Judges, TeachersAhead, base_as_teacher
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.tokenizer_builder import check_tokenizer
from megatron_tropd.types import Batch, Rollout
from megatron_tropd.weight_gather import WeightGather
from megatron_tropd.weights import adapt, load_weights_of

# isort: split
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)


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
    num_ids, padded_num_ids = teacher_vocab_sizes(run)
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


def teacher_vocab_sizes(run: Run) -> tuple[int, int]:
    """The teacher's true vocabulary, and its size padded for the layout that the student trains in."""
    config = run.config.teacher
    assert config is not None
    num_ids = vocab_size(config, run.teacher_tokenizer)
    return num_ids, padded_vocab_size(
        num_ids,
        divisible_by=config.make_vocab_size_divisible_by,
        tensor_parallel_size=run.config.parallel.tensor_model_parallel_size,
    )


def student_padded_vocab_size(run: Run) -> int:
    """The student's, in the layout that it trains in."""
    return padded_vocab_size(
        vocab_size(run.config.student, run.tokenizer),
        divisible_by=run.config.student.make_vocab_size_divisible_by,
        tensor_parallel_size=run.config.parallel.tensor_model_parallel_size,
    )


def teacher_apart(run: Run) -> TeacherApart:
    """The student's end of a teacher on the job's other side."""
    assert run.config.teacher is not None
    _, padded_num_ids = teacher_vocab_sizes(run)
    return TeacherApart(
        run.layout,
        hidden_size=run.config.teacher.hidden_size,
        dtype=run.dtype,
        padded_num_ids=padded_num_ids,
        hidden=run.config.parallel.teacher_hidden,
    )


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
    ahead: Judges | None = None
    if loads_teacher and not shares_schedule:
        ahead = load_teachers_ahead(run) if run.layout.link is None else teacher_apart(run)
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
        vocab_size=shared_vocab_size(run, with_teacher=with_teacher),
        ahead=ahead,
        guard=Guard(config.guard),
        replicas=ReplicaCheck(config.guard.replica_check_interval, run.layout),
        phases=run.monitor.phases,
    )


def batch_of_step(
    run: Run, rollouts: Sequence[Rollout], step: int, *, data_parallel_size: int, **options: Any
) -> Batch:
    """``build_batch`` as the config says, with its other ``options``, for one of so many data-parallel ranks."""
    training = run.config.training
    return build_batch(
        rollouts,
        step=step,
        seed=training.seed,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        sequence_packing=training.sequence_packing,
        num_micro_batches=training.global_batch_size // (training.micro_batch_size * data_parallel_size),
        pad_id=run.tokenizer.pad_id,
        max_sequence_length=run.max_sequence_length,
        normalization=training.normalization,
        **options,
    )


def shared_vocab_size(run: Run, *, with_teacher: bool) -> int:
    """Ids that the models and tokenizers of a run share: the only ones that are sampled and judged."""
    config = run.config
    sizes = [run.tokenizer.vocab_size, vocab_size(config.student, run.tokenizer)]
    if with_teacher and config.teacher is not None:
        sizes += [vocab_size(config.teacher, run.teacher_tokenizer), run.teacher_tokenizer.vocab_size]
    return min(sizes)
