"""Whether a configuration can run: every check across fields, before anything starts. Imports no torch."""

from __future__ import annotations

import difflib
import math
from dataclasses import is_dataclass
from pathlib import Path

from megatron_tropd.config import OBJECTIVES, Config, ModelConfig, resolved_schedule
from megatron_tropd.config_context import check_context_parallel, context_parallel_size
from megatron_tropd.config_data_checks import check_data
from megatron_tropd.config_layout_checks import check_experts, check_interleaved
from megatron_tropd.config_lora_checks import check_lora
from megatron_tropd.config_model_checks import check_inference_copy, check_model, one_stage
from megatron_tropd.config_require import collecting, require
from megatron_tropd.config_rollout_checks import check_pace
from megatron_tropd.config_sides import check_sides, num_generators
from megatron_tropd.engine_choice import check_engine


def validate(config: Config, world_size: int, command: str) -> None:
    """Every check across fields that needs no file and no process group. Raises ConfigError.

    ``command`` is train, sft, generate or evaluate; ``world_size`` the number of processes.
    """
    _check_numbers(config)
    parallel = config.parallel
    generators = num_generators(config, command)
    if command == "train":
        check_sides(config, world_size)
        world_size -= generators  # from here on that of the ranks that train
    tp, pp = layout_sizes(config, command)
    require(tp >= 1 and pp >= 1, f"parallel sizes must be at least 1, found tensor {tp} and pipeline {pp}")
    require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into tensor_model_parallel_size {tp} x pipeline_model_parallel_size "
        f"{pp} = {tp * pp}: start a multiple of {tp * pp} processes (torchrun --nproc-per-node)",
    )
    cp = context_parallel_size(config, command)
    ahead = [teacher_sizes(config)] if config.teacher is not None and parallel.teacher_schedule == "ahead" else []
    check_context_parallel(config, world_size, cp, [(tp, pp), *ahead])
    require(
        parallel.tensor_model_parallel_size > 1 or not parallel.sequence_parallel,
        "parallel.sequence_parallel spreads positions over tensor-parallel ranks, and there is only one: set "
        "tensor_model_parallel_size above 1, or sequence_parallel=false",
    )
    if command != "generate":
        check_model("student", student_architecture(config, command), tp, pp)
    if config.rollout.tensor_model_parallel_size is not None:
        check_inference_copy(config, generators or world_size)
    _check_teacher_layout(config, generators or world_size)
    require(
        config.teacher is not None or command not in ("train", "generate"),
        f"`{command}` needs a teacher: add a teacher section with its architecture and load",
    )
    _check_rollout(config)
    _check_profile(config, world_size)
    _check_evaluation(config)
    check_data(config)
    check_interleaved(config, command, pipeline=pp, data=world_size // (tp * pp * cp))
    sizes = {"student": (world_size, tp, pp), "teacher": (generators or world_size, *teacher_sizes(config))}
    check_experts(config, command, **sizes)
    check_engine(config, command, pipeline=pp)
    check_lora(config, command)
    if command in ("train", "sft"):
        _check_training(config, world_size // (tp * pp * cp), command)
    if command == "train":
        copy_size, replicas = config.rollout.tensor_model_parallel_size, world_size // (tp * pp * cp)
        check_pace(config, replicas if copy_size is None else (generators or world_size) // copy_size)
    if command in ("train", "generate"):
        _check_guidance(config, command)
    if command == "evaluate":
        require(
            config.data.validation is not None or len(config.evaluation.files) > 0,
            "`evaluate` needs data.validation or evaluation.files, JSONL of prompts with answers",
        )


def _check_teacher_layout(config: Config, world_size: int) -> None:
    parallel = config.parallel
    given = {
        "teacher_tensor_model_parallel_size": parallel.teacher_tensor_model_parallel_size,
        "teacher_pipeline_model_parallel_size": parallel.teacher_pipeline_model_parallel_size,
        "offload_teacher": parallel.offload_teacher or None,
        "teacher_hidden": parallel.teacher_hidden if parallel.teacher_hidden != "device" else None,
    }
    for name, value in given.items():
        require(
            value is None or parallel.teacher_schedule == "ahead",
            f"parallel.{name}={value} needs parallel.teacher_schedule=ahead: in the shared schedule the teacher lives "
            "where the student does",
        )
    context = config.teacher_context
    require(
        not context.is_set or parallel.teacher_schedule == "ahead",
        "teacher_context needs parallel.teacher_schedule=ahead: in the shared one both models read the same tokens",
    )
    require(
        not config.teachers or parallel.teacher_schedule == "ahead",
        "teachers needs parallel.teacher_schedule=ahead: in the shared schedule there is one",
    )
    require(not config.teachers or config.teacher is not None, "teachers needs a teacher section: their architecture")
    require("" not in config.teachers, 'teachers: "" is the name of `teacher` itself: give another')
    for name in ("prompt_template", "system_prompt"):
        template = getattr(context, name)
        require(template is None or template.strip() != "", f"teacher_context.{name} is empty: leave it out")
    if config.teacher is None:
        return
    tp, pp = teacher_sizes(config)
    require(tp >= 1 and pp >= 1, f"parallel sizes must be at least 1, found the teacher's tensor {tp}, pipeline {pp}")
    require(
        world_size % (tp * pp) == 0,
        f"{world_size} processes cannot be split into the teacher's tensor {tp} x pipeline {pp} = {tp * pp}: change "
        "parallel.teacher_tensor_model_parallel_size, teacher_pipeline_model_parallel_size or the number of processes",
    )
    check_model("teacher", config.teacher, tp, pp)


def teacher_sizes(config: Config) -> tuple[int, int]:
    """Tensor and pipeline parallel size of the teacher."""
    parallel = config.parallel
    tp = parallel.teacher_tensor_model_parallel_size
    pp = parallel.teacher_pipeline_model_parallel_size
    return (
        parallel.tensor_model_parallel_size if tp is None else tp,
        parallel.pipeline_model_parallel_size if pp is None else pp,
    )


def layout_sizes(config: Config, command: str) -> tuple[int, int]:
    """Tensor and pipeline parallel size of the layout a command starts with: `generate` runs the teacher alone,
    `evaluate` the student where it generates."""
    if command == "generate":
        return teacher_sizes(config)
    if command == "evaluate" and config.rollout.tensor_model_parallel_size is not None:
        return config.rollout.tensor_model_parallel_size, 1
    return config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size


def student_architecture(config: Config, command: str) -> ModelConfig:
    """The student in the layout that a command starts with."""
    if command == "evaluate" and config.rollout.tensor_model_parallel_size is not None:
        return one_stage(config.student)
    return config.student


def problems(config: Config, world_size: int, command: str) -> list[str]:
    """Everything that `validate` would refuse, one message each, in its order; empty for a config that can run."""
    with collecting() as found:
        try:
            validate(config, world_size, command)
        except (ArithmeticError, TypeError):
            # A size that is 0 or missing has been found; what is computed from it cannot be checked.
            if not found:
                raise
    return found


_LOWEST = {
    "parallel.context_parallel_size": 1,
    "parallel.distributed_timeout_minutes": 0.05,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "lora.rank": 0,
    "tasks.level": 0,
    "tasks.seed": 0,
    "tasks.num_train": 1,
    "tasks.num_validation": 1,
    "teacher_context.max_prompt_length": 1,
    "evaluation.num_samples": 1,
    "evaluation.temperature": 0,
    "evaluation.program_memory_mb": 64,
    "training.eval_interval": 0,
    "training.eval_samples": 1,
    "training.save_interval": 0,
    "training.keep_checkpoints": 0,
    "training.keep_every": 0,
    "training.max_log_prob_gap": 0,
    "training.log_rollouts": 0,
    "training.log_tokens": 0,
    "training.log_tokens_interval": 1,
    "rollout.refit_check_interval": 0,
    "guard.max_loss_ratio": 1,
    "guard.max_grad_norm_ratio": 1,
    "guard.window": 2,
    "guard.max_refused_steps": 0,
    "guard.max_dumped_samples": 0,
    "guard.replica_check_interval": 0,
    "monitoring.log_interval": 0,
    "monitoring.profile_step_start": 0,
}


def _check_numbers(config: Config) -> None:
    """What a single number may be, wherever nothing else has to be known."""
    for section_name, section in vars(config).items():
        for name, value in vars(section).items() if is_dataclass(section) else ():
            full_name = f"{section_name}.{name}"
            if isinstance(value, float) and not math.isfinite(value):
                require(False, f"{full_name} must be a finite number, found {value}")
            lowest = _LOWEST.get(full_name)
            if lowest is not None and value is not None and value < lowest:
                require(False, f"{full_name} must be at least {lowest}, found {value}")
    optimizer = config.optimizer
    require(
        not optimizer.optimizer_cpu_offload or optimizer.use_distributed_optimizer,
        "optimizer.optimizer_cpu_offload needs optimizer.use_distributed_optimizer=true",
    )
    require(
        not optimizer.optimizer_cpu_offload or config.training.precision != "fp32",
        "optimizer.optimizer_cpu_offload is for bf16 weights (training.precision=bf16): Megatron offloads no fp32 ones",
    )
    require(
        0 < optimizer.optimizer_offload_fraction <= 1,
        f"optimizer.optimizer_offload_fraction must be in (0, 1], found {optimizer.optimizer_offload_fraction}; "
        "nothing is offloaded with optimizer.optimizer_cpu_offload=false",
    )
    require(
        optimizer.min_lr <= optimizer.lr,
        f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}: lower it",
    )
    require(
        optimizer.use_distributed_optimizer or not optimizer.overlap_param_gather,
        "optimizer.overlap_param_gather is about the sharded optimizer: set use_distributed_optimizer=true, or "
        "leave it out",
    )
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(optimizer, name)
        require(0 <= beta < 1, f"optimizer.{name} must be in [0, 1), found {beta}")


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    require(rollout.temperature >= 0, f"rollout.temperature must be >= 0, found {rollout.temperature}")
    require(0 < rollout.top_p <= 1, f"rollout.top_p must be in (0, 1], found {rollout.top_p}")
    for name in ("samples_per_prompt", "max_response_length", "max_batch_size"):
        require(getattr(rollout, name) >= 1, f"rollout.{name} must be at least 1, found {getattr(rollout, name)}")
    require(config.data.max_prompt_length >= 1, "data.max_prompt_length must be at least 1")
    dynamic = rollout.dynamic
    for name in ("block_size_tokens", "max_tokens"):
        require(getattr(dynamic, name) >= 1, f"rollout.dynamic.{name} must be at least 1")
    gb = dynamic.buffer_size_gb
    require(gb is None or gb > 0, f"rollout.dynamic.buffer_size_gb must be above 0, found {gb}")


def _check_profile(config: Config, world_size: int) -> None:
    monitoring = config.monitoring
    start, end = monitoring.profile_step_start, monitoring.profile_step_end
    require(
        start < end,
        f"monitoring.profile_step_end {end} must be above monitoring.profile_step_start {start}: it is the first step "
        "that is not profiled",
    )
    absent = [rank for rank in monitoring.profile_ranks if not 0 <= rank < world_size]
    require(
        not (monitoring.profile and absent),
        f"monitoring.profile_ranks names {absent}, and there are only the ranks 0 to {world_size - 1}: correct it",
    )


def _check_evaluation(config: Config) -> None:
    evaluation, names = config.evaluation, [Path(file).stem for file in config.evaluation.files]
    require(
        evaluation.num_samples == 1 or evaluation.temperature > 0,
        f"evaluation.num_samples {evaluation.num_samples} at temperature 0 would be the same response every time: set "
        "evaluation.temperature (0.6 is usual), or num_samples=1",
    )
    require(0 < evaluation.top_p <= 1, f"evaluation.top_p must be in (0, 1], found {evaluation.top_p}")
    require(evaluation.program_seconds > 0, "evaluation.program_seconds must be above 0")
    for k in evaluation.pass_at:
        require(
            1 <= k <= evaluation.num_samples,
            f"evaluation.pass_at {k} needs 1 <= k <= evaluation.num_samples {evaluation.num_samples}",
        )
    budget, longest = evaluation.max_response_length, config.rollout.max_response_length
    require(
        budget is None or 1 <= budget <= longest,
        f"evaluation.max_response_length {budget} must be between 1 and rollout.max_response_length {longest}, which "
        "the models are built for",
    )
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(not repeated, f"evaluation.files has two files named {repeated}: their metrics would collide; rename one")


def _check_training(config: Config, dp: int, command: str) -> None:
    training = config.training
    samples = config.rollout.samples_per_prompt if command == "train" else 1
    require(training.train_iters >= 1, f"training.train_iters must be at least 1, found {training.train_iters}")
    require(training.micro_batch_size >= 1, "training.micro_batch_size must be at least 1")
    target = training.target_accuracy
    require(
        target is None or (0 <= target <= 1 and training.eval_interval >= 1 and config.data.validation is not None),
        f"training.target_accuracy={target} must be a share in [0, 1], and needs data.validation and a "
        "training.eval_interval of at least 1: it is what evaluations during training are compared with",
    )
    require(training.steps_per_rollout >= 1, "training.steps_per_rollout must be at least 1")
    require(
        training.steps_per_rollout == 1 or training.save_interval % training.steps_per_rollout == 0,
        f"training.save_interval {training.save_interval} must be a multiple of training.steps_per_rollout "
        f"{training.steps_per_rollout}: rollouts in use are in no checkpoint, so one is written between them",
    )
    chunk = training.head_chunk_size
    require(chunk is None or chunk >= 1, f"training.head_chunk_size must be at least 1, found {chunk}")
    require(
        training.output_head != "logits" or (chunk is None and not training.fp32_logits),
        "training.fp32_logits and training.head_chunk_size are about the fused heads: set training.output_head=fused",
    )
    tokens, longest = training.micro_batch_tokens, config.data.max_prompt_length + config.rollout.max_response_length
    require(
        tokens is None or tokens >= longest,
        f"training.micro_batch_tokens {tokens} is less than the longest sequence, data.max_prompt_length + "
        f"rollout.max_response_length = {longest}: raise the one or lower the others",
    )
    require(
        tokens is not None or not training.sequence_packing,
        "training.sequence_packing needs training.micro_batch_tokens, the most positions of a micro-batch",
    )
    micro_batch_size = training.micro_batch_size if tokens is None else 1
    rows = micro_batch_size * dp
    unit = math.lcm(rows, samples)
    size = training.global_batch_size
    require(size >= 1, f"training.global_batch_size must be at least 1, found {size}")
    below, above = size // unit * unit, (size // unit + 1) * unit
    require(
        size % unit == 0,
        f"training.global_batch_size {size} must be a multiple of "
        + (f"micro_batch_size {micro_batch_size} x " if tokens is None else "")
        + f"data-parallel size {dp}"
        + (f" and of rollout.samples_per_prompt {samples}" if samples > 1 else "")
        + f": try {f'{below} or ' if below else ''}{above}",
    )
    if command == "train" and config.objective not in OBJECTIVES:
        require(False, _unknown_objective(config.objective))  # a search, which the planner has no time for


def _unknown_objective(name: str) -> str:
    near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
    return f"unknown objective {name!r}: did you mean {near!r}? Valid: {', '.join(OBJECTIVES)}"


def _check_guidance(config: Config, command: str) -> None:
    guidance, budget = config.guidance, config.rollout.max_response_length
    if command == "generate":
        require(guidance.answers is not None, "`generate` needs guidance.answers, the file or folder to write")
        require(
            guidance.answers_per_shard >= 0,
            f"guidance.answers_per_shard must be at least 1, or 0 for one file; found {guidance.answers_per_shard}",
        )
        return
    require(
        guidance.answers is not None or resolved_schedule(config) == "none",
        f"guidance.schedule {resolved_schedule(config)} needs teacher answers: set guidance.answers (written by "
        "`python -m megatron_tropd generate`), or guidance.schedule=none",
    )
    require(
        config.objective != "seq-kd" or resolved_schedule(config) != "none",
        "objective seq-kd learns from teacher answers alone, and guidance.schedule=none leaves none: use "
        "guidance.schedule=constant",
    )
    longest = guidance.max_prefix_length
    require(
        longest is None or 0 <= longest <= budget,
        f"guidance.max_prefix_length {longest} must be between 0 and rollout.max_response_length {budget}",
    )
    fraction = guidance.fraction
    require(fraction is None or 0 <= fraction <= 1, f"guidance.fraction must be in [0, 1], found {fraction}")
    require(guidance.min_on_policy_tokens >= 0, "guidance.min_on_policy_tokens must be >= 0")
