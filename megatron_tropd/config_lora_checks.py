"""Checks of the config section about LoRA adapters. Imports no torch."""

from __future__ import annotations

from megatron_tropd.config import Config, resolved_schedule
from megatron_tropd.config_require import require


def check_lora(config: Config, command: str) -> None:
    """What `validate` asks of ``config.lora``. Raises ConfigError."""
    lora = config.lora
    require(
        lora.rank > 0 or not lora.base_is_teacher,
        "lora.base_is_teacher needs adapters to switch off: set lora.rank (16 is usual)",
    )
    if not lora.rank:
        return
    require(lora.alpha > 0, f"lora.alpha must be above 0, found {lora.alpha}")
    require(
        0 < len(lora.target_modules) == len(set(lora.target_modules)),
        f"lora.target_modules must name linear layers, each once, found {list(lora.target_modules)}",
    )
    in_experts = sorted({"linear_fc1", "linear_fc2"} & set(lora.target_modules))
    require(
        config.student.num_moe_experts is None or not in_experts,
        f"lora.target_modules names {in_experts}, which in this student are the experts': set "
        "lora.target_modules=[linear_qkv, linear_proj]",
    )
    require(
        config.student.fp8 is None,
        f"student.fp8 {config.student.fp8} is Transformer Engine's linear layers, and adapters need Megatron's: leave "
        "student.fp8 out, or set lora.rank=0",
    )
    parallel = config.parallel
    for name in ("virtual_pipeline_model_parallel_size", "expert_model_parallel_size"):
        size = getattr(parallel, name)
        require(size == 1, f"parallel.{name} {size} is not offered with adapters: set it to 1, or lora.rank=0")
    require(
        not config.optimizer.overlap_param_gather,
        "optimizer.overlap_param_gather is not offered with adapters, whose weights are few: set it to false",
    )
    if lora.base_is_teacher:
        _check_base_as_teacher(config, command)


def _check_base_as_teacher(config: Config, command: str) -> None:
    parallel = config.parallel
    require(
        config.teacher == config.student,
        "with lora.base_is_teacher the teacher is the student without its adapters: leave the teacher section out",
    )
    require(
        config.tokenizer.teacher is None,
        "lora.base_is_teacher: student and teacher have one tokenizer, leave tokenizer.teacher out",
    )
    require(not config.teachers, "lora.base_is_teacher: the base is the one teacher, leave teachers out")
    own = {
        "teacher_tensor_model_parallel_size": parallel.teacher_tensor_model_parallel_size,
        "teacher_pipeline_model_parallel_size": parallel.teacher_pipeline_model_parallel_size,
        "offload_teacher": parallel.offload_teacher or None,
    }
    for name, value in own.items():
        require(
            value is None or command == "generate",
            f"parallel.{name}={value}: lora.base_is_teacher has the teacher in the student's weights and layout",
        )
    require(
        command != "train"
        or config.teacher_context.is_set
        or bool(config.objective_options.task_reward)
        or resolved_schedule(config) != "none",
        "lora.base_is_teacher without more for the teacher to read leaves nothing to learn: both models start equal. "
        "Set teacher_context, objective_options.task_reward or guidance",
    )
