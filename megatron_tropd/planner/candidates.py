"""The layouts the planner tries. All it knows about which exist: each is offered only where ``config_checks`` accepts
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_tropd.config import Config, ConfigError, ModelConfig
from megatron_tropd.config_layout_checks import student_generates
from megatron_tropd.config_model_checks import check_inference_copy, check_model
from megatron_tropd.planner.hardware import Gpu

PIPELINE_SIZES = (1, 2, 4, 8, 16)
CONTEXT_SIZES = (1, 2, 4, 8)
"""A larger one only where nothing fits with those before it."""
CHUNKS = (1, 2, 4)
"""Interleaved model chunks of a pipeline rank."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)


def students(config: Config, world_size: int, gpu: Gpu, command: str, *, context: int) -> Iterator[Config]:
    """``config`` in every layout of the student, with the teacher where the student is.

    An inference copy is offered where the student itself has pipeline stages or spreads its experts.
    """
    student = config.student
    for tensor, pipeline in splits(student, gpu, world_size // context if world_size % context == 0 else 0):
        staged = in_stages(student, pipeline)
        is_even = staged.num_layers_in_first_pipeline_stage is None
        for chunks in CHUNKS if pipeline > 1 and context == 1 and is_even else (1,):
            for spread, shared_by in _expert_splits(config, gpu, world_size // pipeline, tensor):
                in_parts = pipeline > 1 or (spread > 1 and student.num_moe_experts is not None)
                has_choice = in_parts and context == 1 and student_generates(config, command)
                for copy in (None, *powers(gpu, world_size)) if has_choice else (None,):
                    parallel = replace(
                        config.parallel,
                        tensor_model_parallel_size=tensor,
                        pipeline_model_parallel_size=pipeline,
                        context_parallel_size=context,
                        sequence_parallel=tensor > 1,
                        virtual_pipeline_model_parallel_size=chunks,
                        expert_model_parallel_size=spread,
                        expert_tensor_parallel_size=shared_by,
                        teacher_schedule="shared",
                        teacher_tensor_model_parallel_size=None,
                        teacher_pipeline_model_parallel_size=None,
                        teacher_expert_model_parallel_size=None,
                        teacher_hidden="device",
                        offload_teacher=False,
                    )
                    rollout = replace(config.rollout, tensor_model_parallel_size=copy)
                    sized = replace(config, student=staged, parallel=parallel, rollout=rollout)
                    if copy is None or _passes(check_inference_copy, sized, world_size):
                        yield sized


def with_teachers(student: Config, world_size: int, gpu: Gpu) -> Iterator[Config]:
    """One of ``students`` with the teacher in its layout, and judging ahead in every layout of its own."""
    parallel, teacher = student.parallel, student.teacher
    if teacher is None:
        yield student
        return
    shared = in_stages(teacher, parallel.pipeline_model_parallel_size)
    if parallel.virtual_pipeline_model_parallel_size == 1 or shared.num_layers_in_first_pipeline_stage is None:
        yield replace(student, teacher=shared)
    ahead = replace(parallel, teacher_schedule="ahead")
    if student.lora.base_is_teacher:
        yield replace(student, teacher=shared, parallel=ahead)
        return
    if student.student.num_moe_experts is None and parallel.expert_model_parallel_size > 1:
        return  # only the teacher's experts are spread: ahead it has a size of its own for that
    for tensor, pipeline in splits(teacher, gpu, world_size // parallel.context_parallel_size):
        shared_by = parallel.expert_tensor_parallel_size or tensor
        ranks = min(gpu.per_node, world_size // pipeline)
        # Spread over a node or not at all.
        for spread in (None,) if teacher.num_moe_experts is None else sorted({1, max(1, ranks // shared_by)}):
            own = replace(
                ahead,
                teacher_tensor_model_parallel_size=tensor,
                teacher_pipeline_model_parallel_size=pipeline,
                teacher_expert_model_parallel_size=None if spread == parallel.expert_model_parallel_size else spread,
            )
            staged = replace(student, teacher=in_stages(teacher, pipeline), parallel=own)
            yield staged
            yield replace(staged, parallel=replace(own, offload_teacher=True, teacher_hidden="host"))


def engine_batches(rows: int) -> Iterator[int]:
    """``rows`` of a replica and ever smaller batches of the engine, down to 1: a half, a quarter, and between them."""
    size = rows
    while size > 1:
        yield size
        if size > 3:
            yield math.ceil(size * 3 / 4)
        size = math.ceil(size / 2)
    yield 1


def powers(gpu: Gpu, most: int) -> Iterator[int]:
    """1, 2, 4, ... within a node."""
    size = 1
    while size <= min(gpu.per_node, most):
        yield size
        size *= 2


def splits(model: ModelConfig, gpu: Gpu, world_size: int) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) sizes; tensor parallelism stays inside a node."""
    for tensor in powers(gpu, world_size):
        for pipeline in PIPELINE_SIZES:
            divides = world_size % (tensor * pipeline) == 0
            if divides and _passes(check_model, "", in_stages(model, pipeline), tensor, pipeline):
                yield tensor, pipeline


def in_stages(model: ModelConfig, pipeline: int) -> ModelConfig:
    """``model`` in as many stages: of as many layers each or, where they do not divide, with fewer in the first and the
    last, which have the embedding and the output layer too."""
    first = last = None
    if model.num_layers % pipeline:
        rest = model.num_layers - math.ceil(model.num_layers / pipeline) * (pipeline - 2)
        first, last = math.ceil(rest / 2), rest // 2
    return replace(model, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)


def _passes(check: Callable[..., None], *arguments: object) -> bool:
    try:
        check(*arguments)
    except ConfigError:
        return False
    return True


def _expert_splits(config: Config, gpu: Gpu, stage_ranks: int, tensor: int) -> Iterator[tuple[int, int | None]]:
    """(Ranks that experts are spread over, ranks that share each; None: the tensor-parallel ones).

    Experts are spread over a node or not at all.
    """
    yield 1, None
    if all(model is None or model.num_moe_experts is None for model in (config.student, config.teacher)):
        return
    ranks = min(gpu.per_node, stage_ranks)
    for shared_by in (None, 1) if tensor > 1 else (None,):
        spread = ranks // (shared_by or tensor)
        if spread > 1 and stage_ranks % ranks == 0:
            yield spread, shared_by
