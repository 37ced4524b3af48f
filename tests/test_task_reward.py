"""The task's verdict as an advantage, by hand and over ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tropd.batch import build_batch
from megatron_tropd.prompt import Prompt
from megatron_tropd.task_reward import task_advantages
from megatron_tropd.types import Rollout, RolloutRequest
from tests.ranks import run_ranks

EOS = 1
ALONE = SimpleNamespace(size=lambda: 1)
"""A group of one rank, of which only the size is read."""


def decode(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def rollout(sample_id: int, prefix: tuple[int, ...], response: tuple[int, ...], answer: str) -> Rollout:
    request = RolloutRequest(sample_id, Prompt(str(sample_id // 2), "", (2, 3), answer), prefix)
    return Rollout(request, response, (-1.0,) * len(response), response[-1:] == (EOS,))


ROLLOUTS = [
    rollout(4, (), (5, 6, EOS), "5 6"),  # right
    rollout(5, (5,), (7, EOS), "5 6"),  # wrong
    rollout(6, (5,), (6,), "5 6"),  # right, prefix and response together; cut off by the budget
    rollout(7, (), (5, 6, EOS), "5 6"),  # right
    rollout(8, (), (5, EOS), ""),  # no reference answer: never right
    rollout(9, (), (EOS,), ""),
]
WANTED = {4: 0.25, 5: -0.25, 6: 0.0, 7: 0.0, 8: 0.0, 9: 0.0}
OPTIONS = {"eos_id": EOS, "samples_per_prompt": 2, "coefficient": 0.5}


def test_the_advantage_is_the_verdict_less_the_prompts_mean() -> None:
    assert task_advantages(ROLLOUTS, decode, group=ALONE, **OPTIONS) == (WANTED, pytest.approx(3 / 6))


def _on_each_rank() -> tuple[dict[int, float], float]:
    """Two replicas of two ranks; of each the first judges."""
    import torch.distributed as dist

    replica, place = divmod(dist.get_rank(), 2)
    return task_advantages(ROLLOUTS[replica::2], decode, judges=place == 0, group=dist.group.WORLD, **OPTIONS)


def test_the_samples_of_a_prompt_may_be_on_several_replicas() -> None:
    found = run_ranks(4, _on_each_rank)
    assert found[0] == found[1] and found[2] == found[3]
    (first, share), (second, other_share) = found[0], found[2]
    assert first | second == WANTED and set(first) == {4, 6, 8}
    assert share == other_share == pytest.approx(3 / 6)


def test_on_policy_positions_carry_it() -> None:
    (found,) = build_batch(
        ROLLOUTS[:2], step=0, seed=1, micro_batch_size=2, num_micro_batches=1, pad_id=0, max_sequence_length=16,
        advantages=WANTED,
    ).micro_batches  # fmt: skip
    assert found.sample_ids == (4, 5) and found.advantages_BS is not None
    assert found.advantages_BS.tolist() == [[0, 0.25, 0.25, 0.25], [0, 0, -0.25, -0.25]]
