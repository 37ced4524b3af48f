"""Whether a model's sizes go together and into its layout. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_require import require


def check_model(name: str, model: ModelConfig, tp: int, pp: int, tp_name: str = "tensor_model_parallel_size") -> None:
    """Raise ConfigError where ``model``, the config's section ``name``, is none, or not in this layout.

    ``tp_name`` is the option that the tensor parallel size comes from.
    """
    groups = model.num_attention_heads if model.num_query_groups is None else model.num_query_groups
    sizes = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": groups,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "kv_channels": model.kv_channels,
        "vocab_size": model.vocab_size,
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
    }
    for field_name, value in sizes.items():
        require(value is None or value >= 1, f"{name}.{field_name} must be at least 1, found {value}")
    shared = {"ffn_hidden_size": model.ffn_hidden_size, "num_attention_heads": model.num_attention_heads}
    for field_name, size in {**shared, "num_query_groups": groups}.items():
        require(
            size % tp == 0,
            f"{name}.{field_name} {size} is not divisible by {tp_name} {tp}: "
            f"use a tensor parallel size that divides it",
        )
    require(
        model.num_attention_heads % groups == 0,
        f"{name}.num_attention_heads {model.num_attention_heads} is not divisible by num_query_groups {groups}",
    )
    require(
        model.kv_channels is not None or model.hidden_size % model.num_attention_heads == 0,
        f"{name}.hidden_size {model.hidden_size} is not divisible by num_attention_heads "
        f"{model.num_attention_heads}: set {name}.kv_channels",
    )
    _check_experts(name, model)
    _check_pipeline(name, model, pp)


def _check_experts(name: str, model: ModelConfig) -> None:
    experts, width = model.num_moe_experts, model.moe_ffn_hidden_size
    require(
        (experts is None) == (width is None),
        f"{name}.num_moe_experts {experts} and {name}.moe_ffn_hidden_size {width} belong together: set both or neither",
    )
    if experts is not None and width is not None:
        require(
            model.moe_router_topk <= experts,
            f"{name}.moe_router_topk {model.moe_router_topk} is more than {name}.num_moe_experts {experts}",
        )


def _check_pipeline(name: str, model: ModelConfig, pp: int) -> None:
    uneven = {
        "num_layers_in_first_pipeline_stage": model.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": model.num_layers_in_last_pipeline_stage,
    }
    given = {field_name: value for field_name, value in uneven.items() if value is not None}
    require(pp > 1 or not given, f"{name}.{next(iter(given), '')} needs pipeline_model_parallel_size > 1")
    require(all(value >= 1 for value in given.values()), f"{name}: a pipeline stage needs at least one layer: {given}")
    layers, stages = model.num_layers - sum(given.values()), pp - len(given)
    require(
        layers >= stages and (layers == 0 if stages == 0 else layers % stages == 0),
        f"{name}.num_layers {model.num_layers} cannot be split over pipeline_model_parallel_size {pp}"
        + (f" with {given}" if given else "")
        + f": the remaining {layers} layers do not divide over {stages} stages; change num_layers or the uneven split "
        "(num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage)",
    )


def one_stage(model: ModelConfig) -> ModelConfig:
    """The same architecture without pipeline stages."""
    return replace(model, num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None)


def check_inference_copy(config: Config, world_size: int) -> None:
    """Raise ConfigError where the student cannot be copied to ``rollout.tensor_model_parallel_size``, which is set."""
    rollout, student = config.rollout, config.student
    tp, trainer_tp = rollout.tensor_model_parallel_size, config.parallel.tensor_model_parallel_size
    assert tp is not None
    require(tp >= 1, f"rollout.tensor_model_parallel_size must be at least 1, found {tp}")
    require(
        world_size % tp == 0,
        f"{world_size} processes cannot be split into rollout.tensor_model_parallel_size {tp}: use a size that divides "
        "their number",
    )
    check_model("student", one_stage(student), tp, 1, "rollout.tensor_model_parallel_size")
    width = student.moe_ffn_hidden_size
    require(
        width is None or width % tp == 0,
        f"student.moe_ffn_hidden_size {width} is not divisible by rollout.tensor_model_parallel_size {tp}: use a size "
        "that divides it",
    )
    require(
        student.make_vocab_size_divisible_by * trainer_tp % tp == 0,
        f"rollout.tensor_model_parallel_size {tp} does not divide student.make_vocab_size_divisible_by "
        f"{student.make_vocab_size_divisible_by} x parallel.tensor_model_parallel_size {trainer_tp}: the copy has the "
        "trainer's padded vocabulary, so take a multiple of it for make_vocab_size_divisible_by",
    )
