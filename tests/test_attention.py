"""The local layers' attention against Megatron's ``DotProductAttention``, in value and gradient."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.ranks import run_ranks

HEADS, WIDTH, BATCH = 8, 16, 3


def _config(groups: int, dtype: torch.dtype, scale: float | None) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=groups,
        softmax_scale=scale, attention_dropout=0.0, hidden_dropout=0.0, bf16=dtype is torch.bfloat16,
        params_dtype=dtype, masked_softmax_fusion=False,
    )  # fmt: skip


def _attend(kind: Any, config: Any, layout: Any, given: list[torch.Tensor], mask: torch.Tensor | None) -> Any:
    """Context and the gradients of queries, keys and values, in fp32."""
    from megatron.core.transformer.enums import AttnMaskType

    attention = kind(
        config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", cp_comm_type=None,
        softmax_scale=config.softmax_scale, pg_collection=layout.groups,
    )  # fmt: skip
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    context = attention(*leaves, mask, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=None)
    weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(context.dtype)
    (context * weights).sum().backward()
    return [context.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def _compare() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_tropd.attention import CausalAttention
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    generator = torch.Generator().manual_seed(0)
    # Training; then as the engine does it: one token, and several, after a cache.
    sizes = [(9, 9), (1, 1), (1, 7), (3, 7)]
    for groups, (num_queries, num_keys), dtype, scale in itertools.product(
        (HEADS, 2, 1), sizes, (torch.float32, torch.bfloat16), (None, 0.5)
    ):
        config = _config(groups, dtype, scale)
        query = torch.randn(num_queries, BATCH, HEADS, WIDTH, generator=generator).to(dtype)
        key, value = (torch.randn(num_keys, BATCH, groups, WIDTH, generator=generator).to(dtype) for _ in range(2))
        mask = None
        if num_queries < num_keys:
            mask = torch.ones(num_keys, num_keys).triu(1).bool()[None, None, -num_queries:]
        found = _attend(CausalAttention, config, layout, [query, key, value], mask)
        wanted = _attend(DotProductAttention, config, layout, [query, key, value], mask)
        tolerance = 1e-5 if dtype is torch.float32 else 3e-2
        for name, one, other in zip(("context", "query", "key", "value"), found, wanted, strict=True):
            assert one.shape == other.shape
            error = (one - other).abs().max() / other.abs().max().clamp(min=1.0)
            assert error < tolerance, (name, groups, num_queries, num_keys, dtype, scale, error)


def test_attention_is_megatrons_in_value_and_gradient() -> None:
    run_ranks(1, _compare)


def _saved_elements() -> int:
    from megatron_tropd.attention import causal_attention

    saved = []
    query, key, value = (torch.randn(256, 1, 2, 4, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda _: None):
        causal_attention(query, key, value)
    return max(saved)


def test_no_matrix_of_all_pairs_is_kept() -> None:
    (largest,) = run_ranks(1, _saved_elements)
    assert largest == 2 * 256 * 4
