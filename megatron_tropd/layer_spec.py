"""Which modules a model's layers are made of: TransformerEngine's where it works, Megatron's local ones elsewhere."""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_tropd.attention import CausalAttention
from megatron_tropd.config import ModelConfig
from megatron_tropd.distributed import ON_CPU
from megatron_tropd.experts import BalancedRouter
from megatron_tropd.paged_attention import PagedSelfAttention, have_flash_attention

# isort: split
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

logger = logging.getLogger(__name__)


def choose_layer_spec(
    config: ModelConfig,
    transformer_config: TransformerConfig,
    pipeline_rank: int,
    vp_stage: int | None = None,
    *,
    megatron_linears: bool = False,
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its chunk ``vp_stage``; says in the log which kind they are.

    ``megatron_linears``: Megatron's own linear layers among TransformerEngine's norms and attention.
    """
    if use_transformer_engine():
        logger.info("layer spec: transformer-engine%s", ", Megatron's linear layers" if megatron_linears else "")
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,
            qk_layernorm=config.qk_layernorm,
        )
        _use_paged_attention(spec, transformer_config)
        _balance_experts(spec, config)
        if megatron_linears:
            _replace_linears(spec.submodules, is_dense=config.num_moe_experts is None)
        return spec
    logger.info("layer spec: local (transformer-engine is not usable here)")
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    _use_paged_attention(spec, transformer_config)
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    if config.num_moe_experts is not None:
        # Megatron renames this norm on disk to where TE fuses it in a dense layer; before experts TE keeps it apart.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    _balance_experts(spec, config)
    for submodules in (spec.submodules, spec.submodules.self_attention.submodules):
        for name, value in vars(submodules).items():
            if value is WrappedTorchNorm:
                setattr(submodules, name, torch_norm)
    num_layers = get_num_layers_to_build(transformer_config, vp_stage=vp_stage, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=torch_norm)


def _use_paged_attention(spec: ModuleSpec, transformer_config: TransformerConfig) -> None:
    """Where flash-attn's kernels cannot run, attention that can do dynamic batching without them."""
    if not have_flash_attention(transformer_config.params_dtype):
        spec.submodules.self_attention.module = PagedSelfAttention


def _balance_experts(spec: ModuleSpec, config: ModelConfig) -> None:
    """Give the layer's experts the router that has a load-balancing loss, where it has a coefficient."""
    if config.moe_aux_loss_coeff:
        spec.submodules.mlp.keywords["submodules"].router = BalancedRouter


def _replace_linears(layer: Any, *, is_dense: bool) -> None:
    """TransformerEngine's norm + linear in one, and its row-parallel linear, by a norm and Megatron's linear layers."""
    from megatron.core.extensions.transformer_engine import TENorm

    attention = layer.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = ColumnParallelLinear, RowParallelLinear
    layer.input_layernorm = TENorm
    on_disk = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if is_dense:
        mlp = get_submodules(layer.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = ColumnParallelLinear, RowParallelLinear
        layer.pre_mlp_layernorm = TENorm
        on_disk["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = on_disk


def use_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can run here."""
    # transformer-engine without its CUDA libraries fails on import with errors of many kinds, so the question asked
    # is Megatron's own: did the extension classes load?
    if ON_CPU:
        return False
    from megatron.core.models.gpt import gpt_layer_specs

    return bool(gpt_layer_specs.HAVE_TE)


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """torch's LayerNorm or RMSNorm. Under sequence parallelism each rank normalises other positions, so the weights
    carry the mark by which Megatron sums their gradients over tensor-parallel ranks; its own wrapper refuses that."""
    kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
