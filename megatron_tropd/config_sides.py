"""Whether a job can have two sides, ranks that train and ranks that generate, as the config says. Imports no torch."""

from __future__ import annotations

from megatron_tropd.config import Config
from megatron_tropd.config_require import require


def num_generators(config: Config, command: str) -> int:
    """Ranks that generate and judge for others; 0 where every rank does everything."""
    return (config.parallel.generator_ranks or 0) if command == "train" and config.training.one_step_off else 0


def check_sides(config: Config, world_size: int) -> None:
    """What `train` needs for ``training.one_step_off``. Raises ConfigError."""
    training, parallel, rollout = config.training, config.parallel, config.rollout
    count = parallel.generator_ranks
    require(
        training.one_step_off or count is None,
        f"parallel.generator_ranks={count} needs training.one_step_off=true: without it every rank generates",
    )
    if not training.one_step_off:
        return
    require(
        count is not None,
        "training.one_step_off needs parallel.generator_ranks, the number of ranks that generate and judge",
    )
    require(
        count is None or 0 < count < world_size,
        f"parallel.generator_ranks {count} of {world_size} processes leaves none for one of the sides: choose fewer, "
        "at least 1, or start more processes (torchrun --nproc-per-node)",
    )
    require(
        parallel.teacher_schedule == "ahead",
        "training.one_step_off lets the teacher judge on other ranks than the student trains on: set "
        "parallel.teacher_schedule=ahead (and parallel.teacher_tensor_model_parallel_size, "
        "teacher_pipeline_model_parallel_size for its layout there)",
    )
    require(
        rollout.tensor_model_parallel_size is not None,
        "training.one_step_off generates with a copy of the student: set rollout.tensor_model_parallel_size, which "
        "divides parallel.generator_ranks",
    )
    refused = {
        "training.steps_per_rollout": training.steps_per_rollout != 1,
        "rollout.partial_tokens": rollout.partial_tokens is not None,
        "lora.rank": config.lora.rank > 0,
        "teachers": bool(config.teachers),
        "parallel.context_parallel_size": parallel.context_parallel_size != 1,
        "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size != 1,
        "parallel.expert_model_parallel_size": parallel.expert_model_parallel_size != 1,
        "parallel.teacher_expert_model_parallel_size": parallel.teacher_expert_model_parallel_size not in (None, 1),
        "objective seq-kd": config.objective == "seq-kd",
        "objective_options.entropy_share": config.objective in ("entropy-opd", "reopold-two-stage")
        or config.objective_options.entropy_share is not None,
    }
    for name, is_set in refused.items():
        require(not is_set, f"{name} is not offered with training.one_step_off: leave one of them out")
