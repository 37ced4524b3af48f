"""Sequences cut over context-parallel ranks: the same gradients, metrics and worst samples, in both schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tropd.packing import context_parallel_part, pack
from megatron_tropd.types import MicroBatch
from tests.ranks import run_ranks

LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    2: {
        "context": ({"tp": 1, "pp": 1, "cp": 2}, {}),
        "context, packed, recompute": ({"tp": 1, "pp": 1, "cp": 2}, {"packed": True, "recompute": True}),
        "context, ahead": ({"tp": 1, "pp": 1, "cp": 2}, {"ahead": (1, 1)}),
    },
    4: {
        "tensor": ({"tp": 2, "pp": 1, "cp": 2}, {}),
        "sequence, packed": ({"tp": 2, "pp": 1, "cp": 2, "sequence_parallel": True}, {"packed": True}),
        "pipeline": ({"tp": 1, "pp": 2, "cp": 2}, {}),
        "pipeline, ahead in another layout": ({"tp": 1, "pp": 2, "cp": 2}, {"ahead": (2, 1)}),
        "data, packed, ahead in another layout": ({"tp": 1, "pp": 1, "cp": 2}, {"ahead": (2, 1), "packed": True}),
    },
}
"""World size -> the arguments of `tiny.start` and of `tiny.build_learner`."""


def _errors(world_size: int) -> dict[str, tuple[float, dict[str, float], list[int]]]:
    """By layout: the largest error of a parameter's gradient on this rank, relative to the whole one's norm, the metric
    sums, and the samples with the largest loss. The reference has no context parallelism."""
    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.step import forward_backward
    from tests import tiny

    rows = tiny.sequences()

    def run(sizes: dict[str, Any], packed: bool = False, **options: Any) -> Any:
        layout = tiny.start(**sizes)
        whole = OptimizerConfig(use_distributed_optimizer=False)  # on every rank
        learner = tiny.build_learner(layout, optimizer=whole, **options)
        # One micro-batch for each pipeline stage: without pipeline parallelism samples have numbers of their own.
        batch = tiny.batch_for_rank(layout, rows, num_micro_batches=sizes["pp"], packed=packed)
        sums, scores = forward_backward(learner, batch)
        return tiny.whole_gradients(learner), sums, scores.worst("loss", 3)

    wanted, *facts = run({"tp": 2, "pp": world_size // 2})
    if world_size > 2:
        wanted = run({"tp": 1, "pp": 1})[0]
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    found = {"reference": (0.0, *facts)}
    for name, (sizes, options) in LAYOUTS[world_size].items():
        mine, *facts = run(sizes, **options)
        found[name] = (max(float((mine[key] - wanted[key]).norm() / norm) for key in mine), *facts)
    return found


@pytest.fixture(scope="module")
def errors() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, _errors, size, timeout=300) for size in LAYOUTS}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in LAYOUTS.items() for name in names])
def test_the_gradient_is_that_of_whole_sequences(size: int, name: str, errors: dict[int, list[dict[str, Any]]]) -> None:
    for rank in errors[size]:
        error, sums, worst = rank[name]
        assert error < 1e-5
        assert sums == pytest.approx(rank["reference"][1], rel=1e-4, abs=1e-4)
        if size == 2:
            assert worst == rank["reference"][2] and len(set(worst)) == 3


def _micro_batch(num_rows: int, num_positions: int) -> MicroBatch:
    """Tokens that say where they stand; loss at every odd one."""
    tokens = torch.arange(num_rows * num_positions).view(num_rows, num_positions)
    positions = tokens.flatten()[1::2]
    return MicroBatch(
        tokens_BS=tokens,
        labels_BS=tokens + 1,
        regions_BS=2 * (tokens % 2),
        uniforms_BS=tokens / 100,
        rollout_log_probs_BS=-tokens.float(),
        advantages_BS=None,
        weights_BS=torch.ones(num_rows, num_positions),
        padding_BS=torch.zeros(num_rows, num_positions, dtype=torch.bool),
        loss_positions_N=positions,
        rows_N=positions // num_positions,
        sample_ids=tuple(range(num_rows)),
        num_tokens=tokens.numel(),
        num_loss_terms=len(positions),
    )


def test_a_rank_has_a_chunk_from_the_front_and_one_from_the_back_of_every_sequence() -> None:
    parts = [context_parallel_part(_micro_batch(2, 8), rank=rank, size=2) for rank in range(2)]
    assert parts[0].tokens_BS.tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert parts[1].tokens_BS.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert parts[0].labels_BS.tolist() == [[1, 2, 7, 8], [9, 10, 15, 16]]
    assert parts[0].loss_positions_N.tolist() == [1, 3, 5, 7] and parts[0].rows_N.tolist() == [0, 0, 1, 1]
    assert [part.num_loss_terms for part in parts] == [8, 0]
    packed = pack(_micro_batch(2, 8), [4, 8], None)
    parts = [context_parallel_part(packed, rank=rank, size=2) for rank in range(2)]
    assert parts[0].tokens_BS.tolist() == [[0, 3, 8, 9, 14, 15]]
    assert parts[1].tokens_BS.tolist() == [[1, 2, 10, 11, 12, 13]]
    assert parts[1].packed_lengths == (4, 8)
    assert parts[1].loss_positions_N.tolist() == [0, 3, 5] and parts[1].rows_N.tolist() == [0, 1, 1]
