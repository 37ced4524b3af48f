"""What LoRA adapters take, and what frozen weights do not. Letters as in ``parameters``; ``R`` the rank."""

from __future__ import annotations

from megatron_tropd.config import ModelConfig
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.planner.activations import LayerSpec
from megatron_tropd.planner.parameters import head_widths, stage_layers


def _widths(model: ModelConfig, tensor: int) -> dict[str, tuple[int, int]]:
    """(Input, output) features of the linear layers on one of ``tensor`` ranks."""
    queries, keys, _ = (width // tensor for width in head_widths(model))
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    return {
        "linear_qkv": (hidden, queries + 2 * keys),
        "linear_proj": (queries, hidden),
        "linear_fc1": (hidden, ffn * (2 if model.swiglu else 1)),
        "linear_fc2": (ffn, hidden),
    }


def stage_adapter_parameters(model: ModelConfig, lora: LoraConfig, tensor: int, pipeline: int) -> list[int]:
    """Parameters of the adapters on a rank of every pipeline stage; 0 without adapters."""
    widths = _widths(model, tensor)
    layer = lora.rank * sum(sum(widths[target]) for target in lora.target_modules)
    return [layers * layer for layers in stage_layers(model, pipeline)]


def added_activations(
    model: ModelConfig,
    lora: LoraConfig,
    stage: int,
    *,
    tensor: int,
    pipeline: int,
    tokens: int,
    element: int,
    layer_spec: LayerSpec,
    sequence_parallel: bool,
) -> int:
    """What adapters change of ``activation_bytes`` without recomputation: mostly less.

    An adapter saves its layer's input and A x; a frozen layer without one saves no input, a frozen norm not the
    normalised value, and in front of the first adapter nothing needs a gradient at all.
    """
    widths = _widths(model, tensor)
    cut = tensor if sequence_parallel else 1
    hidden = model.hidden_size // cut
    inputs = {name: hidden if name in ("linear_qkv", "linear_fc1") else width for name, (width, _) in widths.items()}
    dense = ("linear_qkv", "linear_proj") if model.num_moe_experts is not None else tuple(widths)
    per_token = element * lora.rank * len(lora.target_modules)
    per_token -= element * sum(inputs[name] for name in dense if name not in lora.target_modules)
    is_local_rms = layer_spec == "local" and model.normalization == "RMSNorm"
    if is_local_rms:
        queries, keys, _ = (width // tensor for width in head_widths(model))
        per_token -= 4 * (2 * hidden + (queries + keys if model.qk_layernorm else 0))
    changed = stage_layers(model, pipeline)[stage] * per_token
    if stage == pipeline - 1 and is_local_rms:
        changed -= 4 * hidden
    if stage == 0:
        changed -= (4 if is_local_rms else element) * hidden + 4
    return tokens * changed
