"""Parameters of a model and of one rank's slice of it, counted as Megatron lays them out.

Letters: ``H`` hidden size, ``Q`` width of all query heads, ``K`` width of all key heads, ``D`` width of one head, ``F``
feed-forward width, ``V`` padded vocabulary. Tensor parallelism divides Q, K, F and V; norms and the router are whole on
every rank.
"""

from __future__ import annotations

import math

from megatron_tropd.config import ModelConfig


def head_widths(model: ModelConfig) -> tuple[int, int, int]:
    """(Q, K, D): width of all query heads, of all key heads, and of one head."""
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return model.num_attention_heads * width, groups * width, width


def padded_vocabulary(model: ModelConfig, tensor: int) -> int:
    """V: the rows of the embedding over all tensor-parallel ranks. ``model.vocab_size`` must be set."""
    assert model.vocab_size is not None
    multiple = model.make_vocab_size_divisible_by * tensor
    return math.ceil(model.vocab_size / multiple) * multiple


def layer_parameters(model: ModelConfig, tensor: int = 1, experts: int | None = None) -> int:
    """Parameters of one transformer layer on one of ``tensor`` ranks: attention, feed-forward or experts, norms.

    ``experts``: ranks that the experts are cut and spread over; None: ``tensor``.
    """
    hidden = model.hidden_size
    queries, keys, width = head_widths(model)
    per_norm = 2 if model.normalization == "LayerNorm" else 1
    attention = (queries + 2 * keys) * (hidden + model.add_qkv_bias) // tensor + queries * hidden // tensor
    norms = per_norm * (2 * hidden + 2 * width * model.qk_layernorm)
    return attention + norms + _feed_forward_parameters(model, tensor, experts or tensor)


def _feed_forward_parameters(model: ModelConfig, tensor: int, experts: int) -> int:
    if model.num_moe_experts is None:
        return (3 if model.swiglu else 2) * model.hidden_size * model.ffn_hidden_size // tensor
    return layer_expert_parameters(model, experts) + model.num_moe_experts * model.hidden_size


def layer_expert_parameters(model: ModelConfig, experts: int) -> int:
    """Those of one layer's experts on one of the ``experts`` ranks that they are cut and spread over; without the
    router. 0 for a dense model."""
    if model.num_moe_experts is None or model.moe_ffn_hidden_size is None:
        return 0
    matrices = 3 if model.swiglu else 2
    return model.num_moe_experts * matrices * model.hidden_size * model.moe_ffn_hidden_size // experts


def active_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one layer that a token is multiplied with: of experts, the chosen ones alone."""
    whole = layer_parameters(model)
    if model.num_moe_experts is None or model.moe_ffn_hidden_size is None:
        return whole
    one_expert = (3 if model.swiglu else 2) * model.hidden_size * model.moe_ffn_hidden_size
    return whole - (model.num_moe_experts - model.moe_router_topk) * one_expert


def stage_layers(model: ModelConfig, pipeline: int) -> list[int]:
    """Layers of every pipeline stage."""
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    given = [value for value in (first, last) if value is not None]
    others = pipeline - len(given)
    each = (model.num_layers - sum(given)) // others if others else 0
    stages = [each] * pipeline
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    return stages


def stage_parameters(model: ModelConfig, tensor: int, pipeline: int, experts: int | None = None) -> list[int]:
    """Parameters on a rank of every pipeline stage; ``experts`` as in `layer_parameters`.

    The first stage holds the embedding, the last the final norm and the output layer, which with tied weights is the
    embedding again: on one stage the same tensor, on two a copy.
    """
    counts = [layers * layer_parameters(model, tensor, experts) for layers in stage_layers(model, pipeline)]
    table = padded_vocabulary(model, tensor) // tensor * model.hidden_size
    counts[0] += table
    if model.untie_embeddings_and_output_weights or pipeline > 1:
        counts[-1] += table
    counts[-1] += model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    return counts


def model_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model with its true vocabulary, as model cards count them."""
    assert model.vocab_size is not None
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    norm = model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    return model.num_layers * layer_parameters(model) + tables * model.vocab_size * model.hidden_size + norm
