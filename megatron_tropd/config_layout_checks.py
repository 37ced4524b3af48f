"""Whether experts can be spread, and pipeline stages interleaved, as the config says. Imports no torch."""

from __future__ import annotations

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_require import require


def expert_sizes(config: Config, command: str, tensor: int) -> tuple[int, int]:
    """(Ranks that a model's experts are spread over, ranks that share each of them), ``tensor`` being the tensor
    parallel size of the layout that ``command`` starts with."""
    parallel = config.parallel
    if command not in ("train", "sft"):
        return 1, tensor
    shared_by = parallel.expert_tensor_parallel_size
    return parallel.expert_model_parallel_size, tensor if shared_by is None else shared_by


def teacher_expert_sizes(config: Config, command: str, tensor: int) -> tuple[int, int]:
    """The same of a teacher that judges ahead, in its own layout with ``tensor``."""
    own = config.parallel.teacher_expert_model_parallel_size
    spread, shared_by = expert_sizes(config, command, tensor)
    return spread if own is None or command not in ("train", "sft") else own, shared_by


def virtual_pipeline_size(config: Config, command: str) -> int:
    """Model chunks of each pipeline rank in the layout that ``command`` starts with."""
    return config.parallel.virtual_pipeline_model_parallel_size if command in ("train", "sft") else 1


def check_interleaved(config: Config, command: str, *, pipeline: int, data: int) -> None:
    """Raise ConfigError where pipeline stages do not interleave; ``pipeline`` and ``data`` are parallel sizes."""
    chunks, training = virtual_pipeline_size(config, command), config.training
    require(chunks >= 1, f"parallel.virtual_pipeline_model_parallel_size must be at least 1, found {chunks}")
    if chunks <= 1:
        return
    require(
        pipeline > 1,
        f"parallel.virtual_pipeline_model_parallel_size {chunks} makes pipeline stages take turns, and there is only "
        "one: set parallel.pipeline_model_parallel_size above 1, or leave it out",
    )
    models = [("student", config.student)]
    if command == "train" and config.teacher is not None and config.parallel.teacher_schedule == "shared":
        models.append(("teacher", config.teacher))
    for name, model in models:
        uneven = [
            count
            for count in (model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage)
            if count is not None
        ]
        others = max(1, pipeline - len(uneven))
        counts = {*uneven, (model.num_layers - sum(uneven)) // others}
        require(
            all(count % chunks == 0 for count in counts),
            f"{name}: a pipeline rank's {' or '.join(map(str, sorted(counts)))} layers do not divide into "
            f"virtual_pipeline_model_parallel_size {chunks} chunks: use one that divides them, or another split",
        )
    number = training.global_batch_size // max(1, training.micro_batch_size * data)
    require(
        training.micro_batch_tokens is not None or number % pipeline == 0,
        f"interleaved stages take turns in groups of pipeline_model_parallel_size {pipeline} micro-batches, and each "
        f"data-parallel rank has {number}: choose a training.global_batch_size or micro_batch_size that makes them a "
        "multiple",
    )
    require(
        _can_generate(config, command),
        f"parallel.virtual_pipeline_model_parallel_size {chunks} cuts the student into chunks that cannot generate: "
        "give rollouts a copy of it (rollout.tensor_model_parallel_size), or set it to 1",
    )


def student_generates(config: Config, command: str) -> bool:
    """Whether the student generates during training; in `sft` it does to evaluate alone."""
    return command == "train" or config.data.validation is not None or bool(config.evaluation.files)


def _can_generate(config: Config, command: str) -> bool:
    """Whether there is a copy to generate with during training, or nothing to generate."""
    return config.rollout.tensor_model_parallel_size is not None or not student_generates(config, command)


def check_experts(
    config: Config, command: str, *, student: tuple[int, int, int], teacher: tuple[int, int, int]
) -> None:
    """Raise ConfigError where experts do not spread. ``student`` and ``teacher``: how many ranks have it, tensor and
    pipeline size."""
    parallel, training = config.parallel, command in ("train", "sft")
    ahead = parallel.teacher_schedule == "ahead"
    require(
        parallel.teacher_expert_model_parallel_size is None or ahead,
        "parallel.teacher_expert_model_parallel_size needs parallel.teacher_schedule=ahead: in the shared schedule the "
        "teacher lives where the student does",
    )
    models = [("student", config.student, student, expert_sizes(config, command, student[1]))]
    if command == "generate":
        models.clear()
    if config.teacher is not None and command in ("train", "generate"):
        models.append(("teacher", config.teacher, teacher, teacher_expert_sizes(config, command, teacher[1])))
    require(
        not training
        or (parallel.expert_model_parallel_size == 1 and parallel.teacher_expert_model_parallel_size in (None, 1))
        or any(model.num_moe_experts is not None for _, model, _, _ in models),
        f"parallel.expert_model_parallel_size {parallel.expert_model_parallel_size} spreads experts, and no model has "
        "any: set it to 1, or num_moe_experts of a model",
    )
    require(
        parallel.expert_tensor_parallel_size is None
        or parallel.expert_model_parallel_size > 1
        or (parallel.teacher_expert_model_parallel_size or 1) > 1,
        "parallel.expert_tensor_parallel_size is about experts that are spread: set "
        "parallel.expert_model_parallel_size above 1, or leave it out",
    )
    for name, model, (world_size, _, pipeline), (spread, shared_by) in models:
        _check_model(name, model, world_size // max(1, pipeline), spread, shared_by)
    _check_load_balancing(config)
    if not training:
        return
    require(
        parallel.expert_model_parallel_size == 1 or config.optimizer.use_distributed_optimizer,
        "parallel.expert_model_parallel_size above 1 needs optimizer.use_distributed_optimizer=true: the other "
        "optimizer's state cannot go from one layout of experts to another",
    )
    _, tensor, _ = student
    require(
        config.student.num_moe_experts is None or tensor == 1 or parallel.sequence_parallel,
        f"a student with experts trains with tensor_model_parallel_size {tensor} only where positions are spread too "
        "(Megatron asks for it): set parallel.sequence_parallel=true",
    )
    require(
        parallel.expert_model_parallel_size == 1
        or config.student.num_moe_experts is None
        or _can_generate(config, command),
        f"parallel.expert_model_parallel_size {parallel.expert_model_parallel_size} spreads the student's experts over "
        "replicas that do not decode in step, so such a student cannot generate: give rollouts a copy of it "
        "(rollout.tensor_model_parallel_size), or set it to 1",
    )


def _check_model(name: str, model: ModelConfig, stage_ranks: int, spread: int, shared_by: int) -> None:
    require(
        spread >= 1 and shared_by >= 1,
        f"parallel sizes must be at least 1, found expert {spread}, expert tensor {shared_by}",
    )
    require(
        stage_ranks % (spread * shared_by) == 0,
        f"the {stage_ranks} ranks of a pipeline stage of the {name} cannot be split into expert_model_parallel_size "
        f"{spread} x expert_tensor_parallel_size {shared_by}: change these or the number of processes",
    )
    if model.num_moe_experts is None or model.moe_ffn_hidden_size is None:
        return
    require(
        model.num_moe_experts % spread == 0,
        f"{name}.num_moe_experts {model.num_moe_experts} is not divisible by expert_model_parallel_size {spread}: use "
        "one that divides it",
    )
    require(
        model.moe_ffn_hidden_size % shared_by == 0,
        f"{name}.moe_ffn_hidden_size {model.moe_ffn_hidden_size} is not divisible by the {shared_by} tensor-parallel "
        "ranks that share an expert: use a tensor parallel size that divides it, or expert_tensor_parallel_size",
    )


def _check_load_balancing(config: Config) -> None:
    coefficient = config.student.moe_aux_loss_coeff
    require(coefficient >= 0, f"student.moe_aux_loss_coeff must be at least 0, found {coefficient}")
    require(
        coefficient == 0 or config.student.num_moe_experts is not None,
        f"student.moe_aux_loss_coeff {coefficient} balances experts, and the student has none: set it to 0",
    )
    require(
        coefficient == 0 or config.training.normalization != "kept",
        f"student.moe_aux_loss_coeff {coefficient} needs the loss's denominator before the forward, and with "
        "training.normalization=kept it is known after it: use tokens or sequences",
    )
    require(
        config.teacher is None or config.teacher.moe_aux_loss_coeff == 0,
        "teacher.moe_aux_loss_coeff is about training, and the teacher is frozen: leave it out",
    )
