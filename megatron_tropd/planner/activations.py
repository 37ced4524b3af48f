"""Bytes that a student's forward saves for its backward, and what lives inside a layer for a moment.

``e`` bytes of an element of the weights' type; other letters as in ``parameters``. The local layers' formula is held to
what autograd saves by a test; that of TransformerEngine's layers is read off their code and their paper.
"""

from __future__ import annotations

from typing import Literal

from megatron_tropd.config import ModelConfig
from megatron_tropd.planner.parameters import head_widths, stage_layers

LayerSpec = Literal["transformer-engine", "local"]
"""Whose layers, as `layer_spec` chooses them. Neither keeps an [S, S] matrix."""


def activation_bytes(
    model: ModelConfig,
    stage: int,
    *,
    tensor: int,
    pipeline: int,
    context: int = 1,
    batch: int,
    length: int,
    element: int,
    layer_spec: LayerSpec,
    recompute: bool,
    sequence_parallel: bool = False,
) -> int:
    """What the forward of one micro-batch saves for the backward on a rank of ``stage``; ``length`` is that of the
    rank's part of each sequence, ``context`` the number of parts.

    With recomputation the input of each layer alone. The last stage adds the final norm and the choice of the
    positions that carry loss, the first the token ids. Sequence parallelism divides what is as wide as the hidden
    state: a linear layer saves its input cut, and gathers it again in the backward.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198), whose count per layer that of TransformerEngine gives where
    there is no dropout.
    """
    tokens, hidden = batch * length, model.hidden_size // (tensor if sequence_parallel else 1)
    layers = stage_layers(model, pipeline)[stage]
    per_layer = layer_activations(model, tensor, context, batch * length, element, layer_spec, hidden)
    saved = layers * (tokens * hidden * element if recompute else per_layer)
    if stage == 0:
        saved += tokens * 8
    if stage == pipeline - 1:
        # The norm's output is not saved: only rows of it are read.
        saved += tokens * (norm_activations(model, hidden, element, layer_spec) - hidden * element + 16)
    return saved


def layer_activations(
    model: ModelConfig, tensor: int, context: int, tokens: int, element: int, layer_spec: LayerSpec, hidden: int
) -> int:
    """Saved by one layer. The input of a linear layer that follows a norm is the norm's output, counted there."""
    per_token = 2 * norm_activations(model, hidden, element, layer_spec)
    per_token += _attention_activations(model, tensor, context, element, layer_spec)
    return tokens * (per_token + _feed_forward_activations(model, tensor, element))


def norm_activations(model: ModelConfig, width: int, element: int, layer_spec: LayerSpec) -> int:
    """A norm and its output. Local RMSNorm computes in fp32 and keeps the input and the normalised value so."""
    if layer_spec == "local" and model.normalization == "RMSNorm":
        return (8 + element) * width + 4
    return 2 * element * width + (8 if model.normalization == "LayerNorm" else 4)


def _attention_activations(model: ModelConfig, tensor: int, context: int, element: int, layer_spec: LayerSpec) -> int:
    queries, keys, _ = (width // tensor for width in head_widths(model))
    heads = model.num_attention_heads // tensor
    groups = (model.num_query_groups or model.num_attention_heads) // tensor
    if layer_spec == "transformer-engine":
        norms = (queries + keys) * element + 4 * (heads + groups) if model.qk_layernorm else 0
        # Queries, keys, values, the result (which is the projection's input), and the softmax's log-sum.
        return (2 * queries + 2 * keys) * element + 4 * heads + norms
    norms = 0
    if model.qk_layernorm:
        # In fp32 the keys' norm saves a view of what the values are a view of too.
        norms = 8 * queries + (4 if element == 4 else 8) * keys + 4 * (heads + groups)
    if context > 1:
        if model.qk_layernorm and element == 4:
            norms += (queries + 2 * keys) * 4  # the view's whole, which without context parallelism the values keep
        # Queries, the result and again as the projection reads it; keys and values of the whole sequence.
        return (3 * queries + 2 * keys * context) * element + 4 * heads + norms
    # Queries and keys, the result and again as the projection reads it, the softmax's log-sum; the values are a view of
    # the projection's queries, keys and values, which it keeps.
    return (4 * queries + 3 * keys) * element + 4 * heads + norms


def _feed_forward_activations(model: ModelConfig, tensor: int, element: int) -> int:
    if model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None:
        width = model.moe_ffn_hidden_size // tensor
        # Each chosen expert: its row of the input, the gated product's parts, the product by the router's weight.
        return model.moe_router_topk * (element * (model.hidden_size + 6 * width) + 32)
    width = model.ffn_hidden_size // tensor
    # Gated: both halves (2), the activation, Megatron's copy of the linear half, the product. Else: in and out.
    return element * width * (5 if model.swiglu else 2)


def layer_transient(model: ModelConfig, tensor: int, tokens: int, element: int) -> int:
    """Live at once inside one layer without autograd: residual, norm, and the feed-forward's halves and product."""
    width = model.ffn_hidden_size
    if model.moe_ffn_hidden_size is not None:
        width = model.moe_ffn_hidden_size * model.moe_router_topk
    return tokens * element * (3 * model.hidden_size + (4 if model.swiglu else 2) * width // tensor)
