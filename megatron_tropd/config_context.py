"""What context parallelism asks of a config."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tropd.config import Config
from megatron_tropd.config_require import require


def context_parallel_size(config: Config, command: str) -> int:
    """Ranks that share the positions of a sequence: 1 for the commands that only generate."""
    return config.parallel.context_parallel_size if command in ("train", "sft") else 1


def check_context_parallel(config: Config, world_size: int, cp: int, layouts: Sequence[tuple[int, int]]) -> None:
    """``cp``: the size of the layout that starts; ``layouts``: tensor and pipeline parallel size of each that shares
    it."""
    if cp == 1:
        return
    for tp, pp in layouts:
        require(
            world_size % (tp * pp * cp) == 0,
            f"{world_size} processes cannot be split into tensor {tp} x pipeline {pp} x "
            f"parallel.context_parallel_size {cp} = {tp * pp * cp}: start a multiple of {tp * pp * cp} processes "
            "(torchrun --nproc-per-node)",
        )
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        require(
            model is None or model.num_moe_experts is None,
            f"parallel.context_parallel_size {cp} is for dense models, and {name} has experts: set it to 1",
        )
    require(
        config.parallel.virtual_pipeline_model_parallel_size == 1,
        f"parallel.context_parallel_size {cp} is not offered with interleaved stages: set it or "
        "parallel.virtual_pipeline_model_parallel_size to 1",
    )
    require(
        config.rollout.tensor_model_parallel_size is None,
        f"rollout.tensor_model_parallel_size makes an inference copy, and parallel.context_parallel_size {cp} lets "
        "every rank of a sequence generate with the trainer's weights: leave one of them out",
    )
    require(
        config.rollout.over_sampling == 1 and config.rollout.partial_tokens is None,
        f"rollout.over_sampling and rollout.partial_tokens choose among all samples of a replica, which "
        f"parallel.context_parallel_size {cp} spreads over its ranks: set one of them off",
    )
    context = config.teacher_context
    require(
        context.prompt_template is None and context.system_prompt is None,
        f"parallel.context_parallel_size {cp} cuts student's and teacher's sequences at the same positions, which "
        "teacher_context moves: set it to 1, or leave teacher_context out",
    )
    require(
        config.training.log_tokens == 0,
        f"training.log_tokens writes whole samples, of which parallel.context_parallel_size {cp} leaves each rank a "
        "part: set the one to 0 or the other to 1",
    )
