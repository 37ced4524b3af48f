"""The tokens of highest entropy over a global batch, by hand, and alone in the batch that is trained on."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_tropd.batch import build_batch
from megatron_tropd.objectives import preset
from megatron_tropd.prompt import Prompt
from megatron_tropd.sampling import entropies
from megatron_tropd.selection import top_entropy_tokens
from megatron_tropd.types import Rollout, RolloutRequest, TokenRegion
from tests.ranks import run_ranks

ALONE = SimpleNamespace(size=lambda: 1)
"""A group of one rank, of which only the size is read."""


def rollout(sample_id: int, at_tokens: list[float], prefix: tuple[int, ...] = ()) -> Rollout:
    request = RolloutRequest(sample_id, Prompt(str(sample_id), "", (2, 3), ""), prefix)
    response = tuple(range(10, 10 + len(at_tokens)))
    return Rollout(request, response, (-1.0,) * len(response), True, tuple(at_tokens))


def test_the_highest_entropies_of_all_samples_are_kept() -> None:
    rollouts = [rollout(7, [0.1, 2.0, 0.5]), rollout(3, [1.0, 0.2]), rollout(5, [])]
    kept, threshold = top_entropy_tokens(rollouts, 0.4, ALONE)
    assert {sample: mask.tolist() for sample, mask in kept.items()} == {
        7: [False, True, False],
        3: [True, False],
        5: [],
    }
    assert threshold == 1.0
    everything, threshold = top_entropy_tokens(rollouts, 1.0, ALONE)
    assert all(mask.all() for mask in everything.values()) and threshold == pytest.approx(0.1)
    assert top_entropy_tokens([rollout(5, [])], 0.2, ALONE) == ({5: pytest.approx(np.zeros(0))}, 0.0)


def test_equal_entropies_go_by_sample_then_position() -> None:
    kept, _ = top_entropy_tokens([rollout(9, [1.0, 1.0]), rollout(4, [1.0, 1.0])], 0.75, ALONE)
    assert kept[4].tolist() == [True, True] and kept[9].tolist() == [True, False]


def _select_spread(size: int) -> list[tuple[int, list[bool], float]]:
    import torch.distributed as dist

    generator = random.Random(0)
    rollouts = [
        rollout(index, [generator.choice([0.0, 0.5, generator.random()]) for _ in range(generator.randrange(9))])
        for index in range(12)
    ]
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
    rank = dist.get_rank()
    kept, threshold = top_entropy_tokens(rollouts[rank % size :: size], 0.3, groups[rank // size])
    return [(sample, mask.tolist(), threshold) for sample, mask in kept.items()]


def test_the_choice_does_not_depend_on_how_samples_are_spread() -> None:
    alone, *_ = run_ranks(4, _select_spread, 1)
    assert sum(map(sum, (mask for _, mask, _ in alone))) == -(-3 * sum(len(mask) for _, mask, _ in alone) // 10)
    for size in (2, 4):
        spread = [found for rank in run_ranks(4, _select_spread, size)[:size] for found in rank]
        assert sorted(spread) == alone


def test_tokens_left_out_are_of_no_region_and_not_counted() -> None:
    rollouts = [rollout(0, [0.9, 0.1, 0.8], prefix=(5,)), rollout(1, [0.2, 0.3])]
    selected, _ = top_entropy_tokens(rollouts, 0.4, ALONE)
    options = {"step": 0, "seed": 1, "micro_batch_size": 2, "num_micro_batches": 1, "pad_id": 0}
    (found,) = build_batch(rollouts, max_sequence_length=16, selected=selected, **options).micro_batches
    none, guidance, policy = TokenRegion.NONE, TokenRegion.GUIDANCE, TokenRegion.ON_POLICY
    assert found.sample_ids == (0, 1)
    assert found.regions_BS.tolist() == [[none, guidance, policy, none, policy], [none] * 5]
    assert found.num_loss_terms == 3 and found.loss_positions_N.tolist() == [1, 2, 4]
    (found,) = build_batch(
        rollouts, max_sequence_length=16, selected=selected, normalization="sequences", **options
    ).micro_batches
    assert found.num_loss_terms == 1
    assert found.weights_BS[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])


def test_entropy_is_that_of_the_softmax() -> None:
    logits_BV = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0, -torch.inf], [90.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(entropies(logits_BV), [np.log(4), np.log(2), 0.0], atol=1e-6)
    assert entropies(logits_BV).dtype == torch.float32


def test_the_second_stage_starts_at_the_switch() -> None:
    objective = preset("reopold-two-stage")
    first, second = objective.at(0.49), objective.at(0.5)
    assert (first.outlier, first.entropy_share) == ("mask", 1.0)
    assert second == objective and (second.outlier, second.entropy_share) == ("clip", 0.2)
    assert replace(first, outlier="clip", entropy_share=0.2) == objective
    assert preset("entropy-opd").at(0.0).entropy_share == 0.2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("opd", {"entropy_share": 0.0}, "entropy_share must be above 0 and at most 1"),
        ("opd", {"switch": 1.0}, "switch must be at least 0 and below 1"),
        ("opd", {"switch": 0.5}, "no outliers to mask before switch"),
        ("seq-kd", {"entropy_share": 0.5}, "learns from no on-policy token"),
    ],
)
def test_options_without_meaning_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, **options)
