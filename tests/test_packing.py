"""Packed sequences give the gradient and the metrics of padded ones, in every layout and both teacher schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data": ({"tp": 1, "pp": 1}, {}),
    "tensor": ({"tp": 2, "pp": 1}, {}),
    "pipeline": ({"tp": 1, "pp": 2}, {}),
    "sequence, recompute": ({"tp": 2, "pp": 1, "sequence_parallel": True}, {"recompute": True}),
    "data, ahead": ({"tp": 1, "pp": 1}, {"ahead": (1, 1)}),
    "tensor, ahead in another layout": ({"tp": 2, "pp": 1}, {"ahead": (1, 2)}),
    "pipeline, ahead": ({"tp": 1, "pp": 2}, {"ahead": (1, 2)}),
}


def _errors() -> dict[str, tuple[float, dict[str, float]]]:
    """By layout: the largest error of a parameter's gradient on this rank, relative to the whole one's norm, and the
    metric sums. The reference is the padded batch on two data-parallel ranks."""
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import forward_backward
    from tests import tiny

    rows = tiny.sequences()

    def gradients(sizes: dict[str, Any], options: dict[str, Any], packed: bool) -> Any:
        layout = tiny.start(**sizes)
        whole = OptimizerConfig(use_distributed_optimizer=False)  # on every rank
        learner = tiny.build_learner(layout, optimizer=whole, **options)
        sums, _ = forward_backward(learner, tiny.batch_for_rank(layout, rows, num_micro_batches=2, packed=packed))
        return tiny.whole_gradients(learner), sums

    wanted, wanted_sums = gradients({"tp": 1, "pp": 1}, {}, packed=False)
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    found = {"padded": (0.0, wanted_sums)}
    for name, (sizes, options) in LAYOUTS.items():
        mine, sums = gradients(sizes, options, packed=True)
        found[name] = (max(float((mine[key] - wanted[key]).norm() / norm) for key in mine), sums)
    return found


@pytest.fixture(scope="module")
def errors() -> list[dict[str, tuple[float, dict[str, float]]]]:
    return run_ranks(2, _errors, timeout=300)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_is_that_of_padded_sequences(name: str, errors: list[dict[str, Any]]) -> None:
    for rank in errors:
        error, sums = rank[name]
        assert error < 1e-5
        assert sums == pytest.approx(rank["padded"][1], rel=1e-4, abs=1e-4)


def _attend() -> None:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_tropd.attention import CausalAttention, causal_attention
    from megatron_tropd.pair import model_inputs
    from tests import tiny

    layout = tiny.start(tp=1, pp=1)
    lengths = (5, 1, 9)
    packed = model_inputs(torch.zeros(1, sum(lengths), dtype=torch.long), lengths)["packed_seq_params"]
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    causal = AttnMaskType.causal
    attention = CausalAttention(config, 1, causal, "self", softmax_scale=0.3, pg_collection=layout.groups)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    context = attention(*leaves, None, attn_mask_type=causal, packed_seq_params=packed).unflatten(1, (4, 8))
    weights = torch.randn(context.shape, generator=generator)
    (context * weights).sum().backward()
    start = 0
    for length in lengths:
        mine = slice(start, start := start + length)
        alone = [tensor[mine].clone().requires_grad_() for tensor in (query, key, value)]
        wanted = causal_attention(*(tensor.unsqueeze(1) for tensor in alone), scale=0.3).squeeze(1)
        (wanted * weights[mine]).sum().backward()
        torch.testing.assert_close(context[mine], wanted)
        for leaf, other in zip(leaves, alone, strict=True):
            torch.testing.assert_close(leaf.grad[mine], other.grad)


def test_a_packed_sequence_attends_to_itself_alone() -> None:
    run_ranks(1, _attend)
