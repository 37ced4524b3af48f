"""Rollouts to micro-batches: the shift, by hand; and what may not depend on the split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tropd.batch import answers_as_rollouts, build_batch, split_for_rank
from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.prompt import Prompt
from megatron_tropd.types import Batch, Rollout, RolloutRequest, TokenRegion

PAD = 99
NONE, GUIDANCE, ON_POLICY = TokenRegion.NONE, TokenRegion.GUIDANCE, TokenRegion.ON_POLICY


def make_rollout(sample_id: int, prompt: list[int], prefix: list[int], response: list[int]) -> Rollout:
    request = RolloutRequest(sample_id, Prompt(str(sample_id), "", tuple(prompt), ""), tuple(prefix))
    # A log-prob that says where it belongs: -(token / 10).
    return Rollout(request, tuple(response), tuple(-token / 10 for token in response), finished=True)


def build(rollouts: list[Rollout], **options: Any) -> Batch:
    defaults: dict[str, Any] = {
        "step": 3,
        "seed": 5,
        "micro_batch_size": len(rollouts),
        "num_micro_batches": 1,
        "pad_id": PAD,
        "max_sequence_length": 64,
    }
    return build_batch(rollouts, **{**defaults, **options})


def random_rollouts(num_rollouts: int, seed: int = 0) -> list[Rollout]:
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(2, 50) for _ in range(generator.randint(low, high))]

    return [make_rollout(100 + index, tokens(1, 9), tokens(0, 6), tokens(0, 12)) for index in range(num_rollouts)]


def rows_by_sample(batches: list[Batch]) -> dict[int, dict[str, list[Any]]]:
    """What each sample got: every row cut to the trajectory's positions, with nothing but padding cut off."""
    rows = {}
    for micro_batch in _micro_batches(batches):
        for row, sample_id in enumerate(micro_batch.sample_ids):
            if sample_id < 0:
                assert not micro_batch.regions_BS[row].any()
                continue
            length = int((micro_batch.tokens_BS[row] != PAD).sum())
            fields = {name: value for name, value in vars(micro_batch).items() if torch.is_tensor(value)}
            fields = {name: tensor for name, tensor in fields.items() if name.endswith("_BS")}
            for name in ("labels_BS", "regions_BS", "weights_BS", "rollout_log_probs_BS"):
                assert not fields[name][row, length:].any()
            rows[sample_id] = {name: tensor[row, :length].tolist() for name, tensor in fields.items()}
    return rows


def _micro_batches(batches: list[Batch]) -> Iterator[Any]:
    for batch in batches:
        yield from batch.micro_batches


def test_rows_are_packed_by_positions() -> None:
    rollouts = [make_rollout(index, [1], [], [2] * length) for index, length in enumerate([9, 4, 4, 3, 1, 1, 1])]
    packed = build(rollouts, micro_batch_tokens=10).micro_batches
    assert [one.sample_ids for one in packed] == [(0,), (1, 2), (3, 4, 5), (6,)]
    assert [tuple(one.tokens_BS.shape) for one in packed] == [(1, 9), (2, 4), (3, 3), (1, 1)]
    whole = rows_by_sample([build(rollouts)])
    assert rows_by_sample([build(rollouts, micro_batch_tokens=10)]) == whole
    padded = build(rollouts, micro_batch_tokens=10, pad_to_multiple_of=4).micro_batches
    assert [tuple(one.tokens_BS.shape) for one in padded] == [(1, 12), (2, 4), (2, 4), (2, 4)]
    assert build([], micro_batch_tokens=10).micro_batches[0].sample_ids == (-1,)


def test_packed_sequences_stand_behind_one_another_in_micro_batches_of_like_size() -> None:
    rollouts = random_rollouts(9)
    whole = rows_by_sample([build(rollouts)])
    packed = build(rollouts, micro_batch_tokens=40, sequence_packing=True, pad_to_multiple_of=4).micro_batches
    found = {}
    for one in packed:
        assert one.packed_lengths is not None
        assert one.tokens_BS.shape == (1, sum(one.packed_lengths)) and one.tokens_BS.numel() % 4 == 0
        ends = torch.tensor(one.packed_lengths).cumsum(0)
        for row, (sample, end, length) in enumerate(zip(one.sample_ids, ends, one.packed_lengths, strict=True)):
            mine = slice(int(end) - length, int(end))
            fields = {name: values[0, mine].tolist() for name, values in vars(one).items() if name in whole[100]}
            if sample < 0:
                assert fields["tokens_BS"] == [PAD] * length and length < 4
            else:
                found[sample] = fields
            positions = one.loss_positions_N[one.rows_N == row]
            assert positions.tolist() == [p for p in range(mine.start, mine.stop) if one.regions_BS[0, p]]
    assert found == whole
    sizes = [one.tokens_BS.numel() for one in packed]
    needed = sum(len(rows["tokens_BS"]) for rows in whole.values())
    assert len(sizes) == -(-needed // 40) and max(sizes) <= 40 and max(sizes) - min(sizes) < 16
    assert sum(one.num_loss_terms for one in packed) == build(rollouts).micro_batches[0].num_loss_terms
    (nothing,) = build([], micro_batch_tokens=40, sequence_packing=True, pad_to_multiple_of=4).micro_batches
    assert nothing.packed_lengths == (1, 3) and not nothing.loss_positions_N.numel()


def test_packing_a_lone_padding_row_and_the_teachers_own_view() -> None:
    prompts = [Prompt("0", "", (10, 11), "", teacher_tokens=(12, 13, 10, 11)), Prompt("1", "", (14,), "")]
    requests = [RolloutRequest(index, prompt, ()) for index, prompt in enumerate(prompts)]
    rollouts = [Rollout(request, (20, 30), (-1.0, -1.0), finished=True) for request in requests]
    (one,) = build(rollouts, micro_batch_tokens=16, sequence_packing=True, pad_to_multiple_of=4).micro_batches
    assert one.tokens_BS.tolist() == [[10, 11, 20, 14, 20, PAD, PAD, PAD]]
    assert one.packed_lengths == (3, 2, 3)
    assert one.loss_positions_N.tolist() == [1, 2, 3, 4]
    assert one.teacher_tokens_BS is not None and one.teacher_positions_N is not None
    assert one.teacher_tokens_BS.tolist() == [[12, 13, 10, 11, 20, 14, 20, 0]]
    assert one.teacher_packed_lengths == (5, 2, 1)
    assert one.teacher_positions_N.tolist() == [3, 4, 5, 6]


def test_the_worked_example_of_the_docstring() -> None:
    # types.MicroBatch: prompt p0 p1 = 10 11, prefix g0 = 20, response r0 r1 = 30 31, padded to 6.
    batch = build([make_rollout(7, [10, 11], [20], [30, 31])], pad_to_multiple_of=6)
    (micro_batch,) = batch.micro_batches
    assert batch.step == 3
    assert micro_batch.tokens_BS.tolist() == [[10, 11, 20, 30, PAD, PAD]]
    assert micro_batch.labels_BS.tolist() == [[0, 20, 30, 31, 0, 0]]
    assert micro_batch.regions_BS.tolist() == [[0, 1, 2, 2, 0, 0]]
    assert micro_batch.rollout_log_probs_BS.tolist() == [pytest.approx([0, 0, -3.0, -3.1, 0, 0])]
    assert micro_batch.weights_BS.tolist() == [[0, 1, 1, 1, 0, 0]]
    assert micro_batch.sample_ids == (7,)
    assert micro_batch.num_loss_terms == 3
    # The draw at t is that of the trajectory's token t + 1: g0 is token 2, r0 token 3, r1 token 4.
    assert torch.equal(micro_batch.uniforms_BS[0, 1:4], uniforms(5, Stream.GATE, 7, torch.tensor([2, 3, 4])))


def test_a_continued_sample_carries_loss_on_its_new_tokens_alone() -> None:
    # The worked example, whose r0 was written in an earlier step: of prefix and r0 nothing is learned again.
    whole = make_rollout(7, [10, 11], [20], [30, 31])
    request = replace(whole.request, earlier=(30,))
    (micro_batch,) = build([replace(whole, request=request, response=(31,), log_probs=(-3.1,))]).micro_batches
    assert micro_batch.tokens_BS.tolist() == [[10, 11, 20, 30]]
    assert micro_batch.labels_BS.tolist() == [[0, 0, 0, 31]]
    assert micro_batch.regions_BS.tolist() == [[0, 0, 0, 2]]
    assert micro_batch.rollout_log_probs_BS.tolist() == [pytest.approx([0, 0, 0, -3.1])]
    assert micro_batch.num_loss_terms == 1 and micro_batch.stale_BS is None
    assert torch.equal(micro_batch.uniforms_BS[0, 3:], uniforms(5, Stream.GATE, 7, torch.tensor([4])))
    # The teacher's own prompt moves everything by its length.
    prompt = replace(whole.request.prompt, teacher_tokens=(10, 10, 11))
    request = replace(request, prompt=prompt)
    (micro_batch,) = build([replace(whole, request=request, response=(31,), log_probs=(-3.1,))]).micro_batches
    assert micro_batch.teacher_tokens_BS.tolist() == [[10, 10, 11, 20, 30]]
    assert micro_batch.teacher_positions_N.tolist() == [4]


def test_tokens_of_other_weights_than_the_steps_are_stale() -> None:
    rollouts = [replace(make_rollout(7, [10], [20], [30, 31, 32]), versions=(1, 2, 3)), make_rollout(8, [10], [], [30])]
    (micro_batch,) = build(rollouts, step=3).micro_batches
    assert micro_batch.stale_BS.tolist() == [[False, True, True, False], [False] * 4]
    (micro_batch,) = build([replace(rollouts[1], versions=(3,))], step=3).micro_batches
    assert micro_batch.stale_BS is None


def test_types() -> None:
    (micro_batch,) = build([make_rollout(7, [10, 11], [20], [30, 31])]).micro_batches
    for name in ("tokens_BS", "labels_BS", "regions_BS"):
        assert getattr(micro_batch, name).dtype == torch.int64
    for name in ("uniforms_BS", "rollout_log_probs_BS", "weights_BS"):
        assert getattr(micro_batch, name).dtype == torch.float32


def test_rows_of_like_length_share_a_micro_batch_and_padding_ends_at_its_longest() -> None:
    # Tokens 3, 9, 4, 8 -> positions 2, 8, 3, 7. Longest first: samples 1 and 3 pad to 8, then 2 and 0 to 3.
    lengths = [3, 9, 4, 8]
    rollouts = [make_rollout(index, [5], [], [6] * (length - 1)) for index, length in enumerate(lengths)]
    first, second = build(rollouts, micro_batch_size=2, num_micro_batches=2).micro_batches
    assert first.sample_ids == (1, 3) and first.tokens_BS.shape == (2, 8)
    assert second.sample_ids == (2, 0) and second.tokens_BS.shape == (2, 3)
    # Rounded up to a multiple of 4: 8 and 4.
    padded = build(rollouts, micro_batch_size=2, num_micro_batches=2, pad_to_multiple_of=4).micro_batches
    assert [micro_batch.tokens_BS.shape[1] for micro_batch in padded] == [8, 4]


def test_sequence_weights_are_means_over_the_positions_of_each_sequence() -> None:
    # Three response positions (1 guidance + 2 on-policy), one, and none at all: two sequences count.
    rollouts = [
        make_rollout(0, [10, 11], [20], [30, 31]),
        make_rollout(1, [10, 11], [], [30]),
        make_rollout(2, [10, 11], [], []),
    ]
    (micro_batch,) = build(rollouts, normalization="sequences").micro_batches
    third = pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert micro_batch.weights_BS.tolist() == [third, [0, 1, 0, 0], [0, 0, 0, 0]]
    assert micro_batch.num_loss_terms == 2
    for normalization in ("tokens", "kept"):
        (micro_batch,) = build(rollouts, normalization=normalization).micro_batches
        assert micro_batch.weights_BS.tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
        assert micro_batch.num_loss_terms == 3 + 1 + 0


def test_missing_rollouts_become_rows_of_padding() -> None:
    batch = build([make_rollout(4, [10], [], [30])], micro_batch_size=2, num_micro_batches=2, pad_to_multiple_of=2)
    first, second = batch.micro_batches
    assert first.sample_ids == (4, -1) and first.num_loss_terms == 1
    assert first.tokens_BS.tolist() == [[10, PAD], [PAD, PAD]]
    assert second.sample_ids == (-1, -1) and second.num_loss_terms == 0
    assert second.tokens_BS.tolist() == [[PAD, PAD], [PAD, PAD]]
    # A rank may have no rollout at all, and still has the same micro-batches, of one position at least.
    empty = build([], micro_batch_size=2, num_micro_batches=3).micro_batches
    assert [micro_batch.tokens_BS.shape for micro_batch in empty] == [(2, 1)] * 3


def test_a_trajectory_of_a_single_token_predicts_nothing() -> None:
    (micro_batch,) = build([make_rollout(0, [10], [], [])], normalization="sequences").micro_batches
    assert micro_batch.tokens_BS.tolist() == [[PAD]] and micro_batch.num_loss_terms == 0


@pytest.mark.parametrize("normalization", ["tokens", "sequences", "kept"])
def test_what_a_sample_gets_does_not_depend_on_the_split(normalization: str) -> None:
    rollouts = random_rollouts(24)
    lengths = [len(r.request.prompt.tokens) + len(r.request.prefix) + len(r.response) for r in rollouts]
    reference = build(rollouts, normalization=normalization)
    expected = rows_by_sample([reference])
    assert len(expected) == 24
    num_loss_terms = reference.micro_batches[0].num_loss_terms
    for size in (1, 2, 3, 4):
        for micro_batch_size in (1, 2, 5):
            batches = [
                build(
                    split_for_rank(rollouts, lengths, rank=rank, size=size),
                    normalization=normalization,
                    micro_batch_size=micro_batch_size,
                    num_micro_batches=-(-24 // size // micro_batch_size) + 1,
                )
                for rank in range(size)
            ]
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            assert rows_by_sample(batches) == expected
            assert sum(part.num_loss_terms for part in _micro_batches(batches)) == num_loss_terms


def test_the_order_of_the_rollouts_does_not_matter() -> None:
    rollouts = random_rollouts(12)
    forward = build(rollouts, micro_batch_size=4, num_micro_batches=3)
    backward = build(rollouts[::-1], micro_batch_size=4, num_micro_batches=3)
    for one, other in zip(forward.micro_batches, backward.micro_batches, strict=True):
        assert one.sample_ids == other.sample_ids
        assert torch.equal(one.tokens_BS, other.tokens_BS)
        assert torch.equal(one.uniforms_BS, other.uniforms_BS)


def test_every_trajectory_can_be_read_back() -> None:
    rollouts = random_rollouts(20, seed=1)
    rows = rows_by_sample([build(rollouts)])
    for rollout in rollouts:
        row = rows.get(rollout.request.sample_id)
        prompt, prefix, response = rollout.request.prompt.tokens, rollout.request.prefix, rollout.response
        trajectory = [*prompt, *prefix, *response]
        assert row is not None
        assert row["tokens_BS"] == trajectory[:-1]
        regions = [NONE] * (len(prompt) - 1) + [GUIDANCE] * len(prefix) + [ON_POLICY] * len(response)
        assert row["regions_BS"] == regions
        labels = [label for label, region in zip(row["labels_BS"], regions, strict=True) if region != NONE]
        assert labels == [*prefix, *response]
        log_probs = row["rollout_log_probs_BS"][len(prompt) - 1 + len(prefix) :]
        assert log_probs == pytest.approx(rollout.log_probs)


def test_shares_are_equal_in_number_and_balanced_in_length() -> None:
    # Longest first to the least loaded: 9 -> rank 0; 8 -> rank 1; 7 -> rank 1 (8 < 9), now full; 1 -> rank 0.
    items, lengths = ["a", "b", "c", "d"], [1, 7, 9, 8]
    assert split_for_rank(items, lengths, rank=0, size=2) == ["a", "c"]
    assert split_for_rank(items, lengths, rank=1, size=2) == ["b", "d"]
    generator = random.Random(0)
    lengths = [generator.randint(10, 1000) for _ in range(64)]
    shares = [split_for_rank(range(64), lengths, rank=rank, size=8) for rank in range(8)]
    assert sorted(index for share in shares for index in share) == list(range(64))
    assert {len(share) for share in shares} == {8}
    sums = [sum(lengths[index] for index in share) for share in shares]
    assert max(sums) < 1.05 * min(sums)
    assert split_for_rank(items, [0, 0, 0, 0], rank=0, size=1) == items


def test_answers_are_trajectories_of_guidance_alone() -> None:
    prompts = [Prompt("a", "1+1=", (3, 4), "2"), Prompt("b", "2+2=", (3, 5), "44")]
    rollouts = answers_as_rollouts(prompts, encode=lambda text: [int(c) for c in text], eos_id=1, first_sample_id=40)
    assert [rollout.request.sample_id for rollout in rollouts] == [40, 41]
    assert rollouts[1] == Rollout(RolloutRequest(41, prompts[1], (4, 4, 1)), (), (), finished=True)
    (micro_batch,) = build(rollouts).micro_batches
    # Sample 41, the longer: 3 5 4 4 1 -> reads 3 5 4 4, predicts - 4 4 1.
    assert micro_batch.sample_ids == (41, 40)
    assert micro_batch.tokens_BS.tolist() == [[3, 5, 4, 4], [3, 4, 2, PAD]]
    assert micro_batch.labels_BS.tolist() == [[0, 4, 4, 1], [0, 2, 1, 0]]
    assert micro_batch.regions_BS.tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]
    assert micro_batch.num_loss_terms == 5


def test_refusals() -> None:
    rollout = make_rollout(17, [10, 11], [20], [30, 31])
    with pytest.raises(ValueError, match="sample 17: 5 tokens, but the models are built for 4"):
        build([rollout], max_sequence_length=4)
    assert build([rollout], max_sequence_length=5)
    with pytest.raises(ValueError, match="sample 3: its prompt has no tokens"):
        build([make_rollout(3, [], [], [30])])
    with pytest.raises(ValueError, match="3 rollouts do not fit 1 micro-batches of 2: training.global_batch_size"):
        build([rollout] * 3, micro_batch_size=2)
    with pytest.raises(ValueError, match="5 sequences do not divide over 2 data-parallel ranks"):
        split_for_rank(range(5), [1] * 5, rank=0, size=2)
    # Uneven: at most three each, the longest first.
    shares = [split_for_rank(range(5), [9, 1, 1, 1, 1], rank=rank, size=2, even=False) for rank in (0, 1)]
    assert shares == [[0, 4], [1, 2, 3]]
    assert split_for_rank([], [], rank=1, size=2, even=False) == []
    with pytest.raises(ValueError, match="prompt 'x' has no reference answer"):
        answers_as_rollouts([Prompt("x", "?", (3,), "")], encode=lambda _: [], eos_id=1, first_sample_id=0)
    with pytest.raises(AssertionError, match="sample 17: one log-prob for each response token"):
        build([Rollout(rollout.request, (30, 31), (-1.0,), finished=True)])
