"""A model's layout: how many ranks each kind of parallelism has, in a config of so many ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_checks import layout_sizes, teacher_sizes
from megatron_tropd.config_context import context_parallel_size
from megatron_tropd.config_layout_checks import expert_sizes, teacher_expert_sizes


@dataclass(frozen=True)
class Sizes:
    """One model's layout."""

    tensor: int
    pipeline: int
    data: int
    experts: int | None = field(default=None, compare=False)
    """Ranks of a stage that each layer's experts are cut and spread over; None: the tensor-parallel ones."""
    context: int = 1
    experts_shared_by: int | None = field(default=None, compare=False)
    """Of these, the ranks that each have a part of one expert."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which share the optimizer's state and generate each for themselves."""
        return self.context * self.data


def student_layout(config: Config, world_size: int) -> Sizes:
    """The student's layout on ``world_size`` ranks."""
    tensor, pipeline = layout_sizes(config, "train")
    experts = expert_sizes(config, "train", tensor)
    return _sizes(config, config.student, world_size, tensor, pipeline, experts)


def teacher_layout(config: Config, world_size: int) -> Sizes:
    """The teacher's, which is the student's unless the config gives it its own."""
    tensor, pipeline = teacher_sizes(config)
    experts = teacher_expert_sizes(config, "train", tensor)
    return _sizes(config, config.teacher or config.student, world_size, tensor, pipeline, experts)


def _sizes(
    config: Config, model: ModelConfig, world_size: int, tensor: int, pipeline: int, experts: tuple[int, int]
) -> Sizes:
    context = context_parallel_size(config, "train")
    sizes = Sizes(tensor, pipeline, world_size // (tensor * pipeline * context), context=context)
    if model.num_moe_experts is None:
        return sizes
    return replace(sizes, experts=math.prod(experts), experts_shared_by=experts[1])


def rollout_layout(config: Config, world_size: int) -> Sizes:
    """The layout that generates: that of the inference copy, where there is one, or the student's."""
    tensor = config.rollout.tensor_model_parallel_size
    return student_layout(config, world_size) if tensor is None else Sizes(tensor, 1, world_size // tensor)
