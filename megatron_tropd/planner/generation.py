"""Bytes on a rank of `generate`, where the engine has the teacher: larger than the student, in a layout of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_tropd.config import Config
from megatron_tropd.config_checks import teacher_sizes
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.config_parallel import ParallelConfig
from megatron_tropd.engine_choice import Choice
from megatron_tropd.planner.memory import chosen_engine, rank_memory
from megatron_tropd.planner.sizes import Sizes, student_layout


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes on one rank. All of it is there at once."""

    weights: int
    """Of one teacher: several are loaded one after the other."""
    kv_cache: int
    """Keys and values of ``rollout.max_batch_size`` sequences at their longest, or the most that the dynamic engine may
    have."""
    prefill: int
    """Transient tensors of one layer over the prompts read at once, and the logits of one position."""

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.weights + self.kv_cache + self.prefill

    def components(self) -> dict[str, int]:
        """Name to bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def generation_layout(config: Config, world_size: int) -> Sizes:
    """The layout in which `generate` has the teacher."""
    return student_layout(_teacher_alone(config, world_size), world_size)


def generation_engine(config: Config, world_size: int) -> Choice:
    """The engine of a GPU that the teacher is on."""
    alone = _teacher_alone(config, world_size)
    return chosen_engine(alone, student_layout(alone, world_size))


def generation_memory(config: Config, world_size: int) -> dict[str, GenerationMemory]:
    """Bytes on a rank of every pipeline stage, with all sequences as long as the config allows, by its name.

    The teacher's ``vocab_size`` must be set, and the config valid for ``generate`` with ``world_size``.
    """
    return {
        name: GenerationMemory(memory.student_weights, memory.kv_cache, memory.prefill)
        for name, memory in rank_memory(_teacher_alone(config, world_size), world_size).items()
    }


def _teacher_alone(config: Config, world_size: int) -> Config:
    """A job whose student is the teacher as `generate` has it: its layout, its prompts, full batches."""
    assert config.teacher is not None  # validate() has refused a run without
    tensor, pipeline = teacher_sizes(config)
    rows = config.rollout.max_batch_size * (world_size // (tensor * pipeline))
    longest = max(config.data.max_prompt_length, config.teacher_context.max_prompt_length or 0)
    return replace(
        config,
        student=config.teacher,
        teacher=None,
        lora=LoraConfig(),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        data=replace(config.data, max_prompt_length=longest),
        rollout=replace(config.rollout, tensor_model_parallel_size=None, over_sampling=1.0),
        training=replace(
            config.training, one_step_off=False, global_batch_size=rows, micro_batch_size=1, micro_batch_tokens=None
        ),
    )
