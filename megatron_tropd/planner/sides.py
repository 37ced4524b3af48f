"""A job with two sides (``training.one_step_off``): memory and time of each, from those of jobs that have one.

What trains is a job without a teacher and without generation, but for what it keeps of the teacher; what generates is a
job without training. They work at the same time.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_tropd.config import Config
from megatron_tropd.config_model_checks import one_stage
from megatron_tropd.config_sides import num_generators
from megatron_tropd.planner.activations import LayerSpec
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.lengths import lengths
from megatron_tropd.planner.memory import RankMemory, copy_bytes, element_bytes, micro_batch_rows, rank_memory
from megatron_tropd.planner.parameters import padded_vocabulary
from megatron_tropd.planner.sizes import rollout_layout, student_layout, teacher_layout
from megatron_tropd.planner.timing import StepTime, link_between, micro_batch_seconds, rollout_seconds, step_time


def trainers_of(config: Config) -> Config:
    """The ranks that train, as a job of their own with the teacher ahead, in their layout."""
    parallel = replace(
        config.parallel,
        generator_ranks=None,
        teacher_tensor_model_parallel_size=None,
        teacher_pipeline_model_parallel_size=None,
        offload_teacher=False,
    )
    return _one_side(
        replace(config, parallel=parallel, rollout=replace(config.rollout, tensor_model_parallel_size=None))
    )


def generators_of(config: Config) -> Config:
    """The ranks that generate and judge, as a job of their own that trains in the teacher's layout."""
    parallel = config.parallel
    tensor, pipeline = parallel.teacher_tensor_model_parallel_size, parallel.teacher_pipeline_model_parallel_size
    own = replace(
        parallel,
        generator_ranks=None,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size if tensor is None else tensor,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size if pipeline is None else pipeline,
        teacher_hidden="device",
    )
    optimizer = replace(config.optimizer, optimizer_cpu_offload=False)
    return _one_side(replace(config, parallel=own, student=one_stage(config.student), optimizer=optimizer))


def _one_side(config: Config) -> Config:
    return replace(config, training=replace(config.training, one_step_off=False))


def job_memory(
    config: Config, world_size: int, *, layer_spec: LayerSpec = "transformer-engine"
) -> dict[str, RankMemory]:
    """``rank_memory`` of a job, whose ranks are of more kinds where it has two sides."""
    count = num_generators(config, "train")
    if not count:
        return rank_memory(config, world_size, layer_spec=layer_spec)
    trainers = trainer_memory(config, world_size - count, layer_spec=layer_spec)
    generators = generator_memory(config, count, layer_spec=layer_spec)
    return {f"trains, {name}": memory for name, memory in trainers.items()} | {
        f"generates, {name}": memory for name, memory in generators.items()
    }


def trainer_memory(
    config: Config, num_trainers: int, *, layer_spec: LayerSpec = "transformer-engine"
) -> dict[str, RankMemory]:
    """``rank_memory`` of the ranks that train."""
    trainers = trainers_of(config)
    evaluates = trainers_evaluate(config)
    last_stage = f"stage {student_layout(trainers, num_trainers).pipeline - 1}"
    return {
        name: replace(
            memory,
            teacher_weights=_head_bytes(config) if name == last_stage else 0,
            teacher_pass=0,
            kv_cache=memory.kv_cache if evaluates else 0,
            prefill=memory.prefill if evaluates else 0,
        )
        for name, memory in rank_memory(trainers, num_trainers, layer_spec=layer_spec).items()
    }


def trainers_evaluate(config: Config) -> bool:
    """Whether the ranks that train generate all the same, for evaluations."""
    return config.data.validation is not None or bool(config.evaluation.files)


def generator_memory(
    config: Config, count: int, *, layer_spec: LayerSpec = "transformer-engine"
) -> dict[str, RankMemory]:
    """``rank_memory`` of the ranks that generate and judge."""
    absent = (
        "student_weights",
        "gradients",
        "optimizer",
        "activations",
        "teacher_hidden",
        "head",
        "logits",
        "workspace",
    )
    return {
        name: replace(memory, student_copy=copy_bytes(config), **dict.fromkeys(absent, 0))
        for name, memory in rank_memory(generators_of(config), count, layer_spec=layer_spec).items()
    }


def _head_bytes(config: Config) -> int:
    """The teacher's output weight, cut for the ranks that train."""
    teacher, tensor = config.teacher, config.parallel.tensor_model_parallel_size
    if teacher is None:
        return 0
    return padded_vocabulary(teacher, tensor) // tensor * teacher.hidden_size * element_bytes(config)


def job_time(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """``step_time`` of a job, in which one side hides behind the other where there are two."""
    count = num_generators(config, "train")
    if not count:
        return step_time(config, world_size, gpu, assumed)
    train = trainer_time(config, world_size - count, gpu, assumed)
    rollout, teacher = generator_seconds(config, count, gpu, assumed)
    judges = teacher_layout(generators_of(config), count)
    ends = min(receiving_ranks(config, world_size - count), judges.data * judges.tensor)
    return replace(
        train,
        rollout=rollout,
        teacher=teacher,
        transfer=transfer_seconds(config, ends, world_size, gpu, assumed),
        refit=refit_seconds(config, world_size - count, world_size, gpu, assumed),
        hidden=min(train.total, rollout + teacher),
    )


def refit_seconds(config: Config, num_trainers: int, world_size: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Weights over the busiest link: what a rank that generates receives, or what one that trains sends, which has its
    part of all copies."""
    copied = copy_bytes(config)
    return max(copied, (world_size - num_trainers) * copied / num_trainers) / _link(world_size, gpu, assumed)


def trainer_time(config: Config, num_trainers: int, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """What the ranks that train do by themselves: forward, backward, bubble, gradients, optimizer."""
    alone = step_time(replace(trainers_of(config), teacher=None), num_trainers, gpu, assumed)
    return replace(alone, rollout=0.0, teacher=0.0, transfer=0.0, refit=0.0)


def generator_seconds(config: Config, count: int, gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    """(Generation, the teacher's pass over it) on the ranks that do both."""
    generators = generators_of(config)
    rollout = rollout_seconds(generators, rollout_layout(config, count), gpu, assumed)
    if config.teacher is None:
        return rollout, 0.0
    layout = teacher_layout(generators, count)
    one = micro_batch_seconds(generators, config.teacher, layout, 1, 2, gpu, assumed)
    passes = math.ceil(config.training.global_batch_size / micro_batch_rows(config) / layout.data)
    return rollout, (passes + layout.pipeline - 1) * one


def transfer_seconds(config: Config, ends: int, world_size: int, gpu: Gpu, assumed: Assumptions) -> float:
    """The teacher's hidden states, which ``ends`` ranks share in sending or receiving."""
    if config.teacher is None:
        return 0.0
    rows = config.training.global_batch_size * lengths(config, assumed).response / ends
    return rows * config.teacher.hidden_size * element_bytes(config) / _link(world_size, gpu, assumed)


def receiving_ranks(config: Config, num_trainers: int) -> int:
    """Those of the student's last stage."""
    layout = student_layout(trainers_of(config), num_trainers)
    return layout.replicas * layout.tensor


def _link(world_size: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Bytes/s between a rank of one side and a rank of the other."""
    return link_between(world_size, gpu) * assumed.network_efficiency
