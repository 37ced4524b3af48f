"""The section `parallel`: how the models are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """The layout both models share, unless the teacher runs ahead. Data-parallel size = world size / (tensor x
    pipeline x context)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer and the vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages; each holds a slice of the student and of the teacher."""
    context_parallel_size: int = 1
    """Ranks that share the positions of each sequence while `train` and `sft` train, and where the teacher judges:
    activations take 1 / cp of the memory, attention exchanges keys and values. To generate, each is a replica."""
    sequence_parallel: bool = False
    """Between layers, spread the positions over the tensor-parallel ranks: their activations take 1/tp of the memory,
    for the same traffic. Switched off while generating."""
    virtual_pipeline_model_parallel_size: int = 1
    """Training: model chunks of each pipeline rank, which take turns (interleaved 1F1B): the bubble is that many times
    smaller, for as many times the messages. A teacher ahead is not cut so."""
    expert_model_parallel_size: int = 1
    """Training: ranks of a pipeline stage that the experts of a model with experts are spread over; they may be of
    different data-parallel replicas. `generate` and `evaluate` do not spread them."""
    expert_tensor_parallel_size: int | None = None
    """Training: ranks that share each expert, where experts are spread; None: tensor_model_parallel_size. 1 leaves
    experts whole."""
    teacher_schedule: Literal["shared", "ahead"] = "shared"
    """shared: the teacher's stage runs beside the student's, micro-batch by micro-batch. ahead: the teacher judges the
    whole rollout batch first, in a layout of its own if the sizes below are set; one hidden state for each response
    position waits for the student's schedule. The gradients are the same."""
    teacher_tensor_model_parallel_size: int | None = None
    """teacher_schedule=ahead, and `generate`: the teacher's; None: the student's."""
    teacher_pipeline_model_parallel_size: int | None = None
    """teacher_schedule=ahead, and `generate`: the teacher's; None: the student's."""
    teacher_expert_model_parallel_size: int | None = None
    """teacher_schedule=ahead: the teacher's; None: the student's."""
    teacher_hidden: Literal["device", "host"] = "device"
    """teacher_schedule=ahead: where hidden states wait, on the device or in pinned host memory."""
    offload_teacher: bool = False
    """teacher_schedule=ahead: the teacher's layers are in host memory but for the time of a pass."""
    generator_ranks: int | None = None
    """training.one_step_off: the last this many ranks of the job generate and judge, the others train."""
    distributed_timeout_minutes: float = 30.0
    """Where ranks wait longer than this for one that hangs, the job ends and names it."""
