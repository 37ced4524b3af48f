"""Weights that are gathered behind the next forward: the same steps, and whole before anything else reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks


def _train(sizes: dict[str, Any], model: dict[str, Any]) -> dict[bool, dict[str, Any]]:
    """Three steps, overlapped or not: their losses, the weights' hashes, and whether they were in shards before."""
    import dataclasses

    from megatron_tropd.config import OptimizerConfig
    from megatron_tropd.replicas import fingerprint
    from megatron_tropd.step import train_step
    from tests import tiny

    found = {}
    for overlap in (False, True):
        layout = tiny.start(**{"tp": 1, "pp": 1, **sizes})
        learner = tiny.build_learner(
            layout,
            student=dataclasses.replace(tiny.STUDENT, num_layers=4, **model),
            optimizer=OptimizerConfig(lr=1e-2, overlap_param_gather=overlap),
        )
        batch = tiny.batch_for_rank(layout, tiny.sequences(), num_micro_batches=2)
        losses = [train_step(learner, batch)["loss"] for _ in range(3)]
        before = fingerprint(learner.pair)
        learner.gather.finish()
        weights = fingerprint(learner.pair)
        found[overlap] = {
            "losses": losses,
            "hashes": weights.tolist(),
            "pending": not torch.equal(before, weights),
        }
    return found


@pytest.mark.parametrize(
    ("world_size", "sizes", "model"),
    [
        (2, {"ep": 2}, {"num_moe_experts": 4, "moe_ffn_hidden_size": 24}),
        (4, {"pp": 2, "vp": 2}, {}),
    ],
)
def test_overlapped_gathers_change_nothing(world_size: int, sizes: dict[str, Any], model: dict[str, Any]) -> None:
    ranks = run_ranks(world_size, _train, sizes, model)
    for found in ranks:
        assert found[True]["losses"] == found[False]["losses"]
        assert found[True]["hashes"] == found[False]["hashes"]
        assert not found[False]["pending"]
    assert any(found[True]["pending"] for found in ranks), "nothing was overlapped"
