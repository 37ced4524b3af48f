"""Counter-based draws: the published test vectors, and that a draw depends on nothing but what it is for."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tropd.draws import Stream, philox_4x32, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # The three philox4x32 vectors at 10 rounds of Random123's kat_vectors file.
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(philox_4x32(torch.tensor(counter), key=key).tolist()) == expected
    many = torch.tensor(counter).view(4, 1, 1).expand(4, 2, 3)
    assert (philox_4x32(many, key=key) == torch.tensor(expected).view(4, 1, 1)).all()


def test_a_draw_is_the_top_24_bits_of_the_first_word() -> None:
    # Seed 0, stream GATE = 0, sample 0, position 0 is the first published vector: 0x6627E8D5 >> 8 = 0x6627E8.
    draw = uniforms(0, Stream.GATE, 0, 0)
    assert draw.dtype == torch.float32 and draw.shape == ()
    assert draw.item() == 0x6627E8 / 2**24


def test_seed_sample_and_position_each_fill_their_words() -> None:
    # Counter: position, stream, low and high half of the sample id. Key: low and high half of the seed.
    seed, sample_id, position = 0x299F31D0_A4093822, 0x03707344_13198A2E, 0x243F6A88
    counter = torch.tensor([position, int(Stream.SAMPLING), 0x13198A2E, 0x03707344])
    word = philox_4x32(counter, key=(0xA4093822, 0x299F31D0))[0]
    assert uniforms(seed, Stream.SAMPLING, sample_id, position).item() == int(word >> 8) / 2**24


def test_a_draw_does_not_depend_on_what_is_drawn_with_it() -> None:
    samples, positions = torch.tensor([5, 0, 2**40 + 5, 900]), torch.arange(50)
    together = uniforms(7, Stream.GATE, samples.unsqueeze(1), positions)
    assert together.shape == (4, 50)
    for row, sample in enumerate(samples.tolist()):
        assert torch.equal(together[row], uniforms(7, Stream.GATE, sample, positions))
        assert torch.equal(together[row, 20:30], uniforms(7, Stream.GATE, sample, torch.arange(20, 30)))
    for position in (0, 17, 49):
        assert torch.equal(together[:, position], uniforms(7, Stream.GATE, samples, position))
    assert together[2, 3] == uniforms(7, Stream.GATE, 2**40 + 5, 3)


def test_every_part_of_the_key_changes_the_draw() -> None:
    positions = torch.arange(100)
    reference = uniforms(1, Stream.GATE, 3, positions)
    for other in (
        uniforms(2, Stream.GATE, 3, positions),
        uniforms(1 + 2**32, Stream.GATE, 3, positions),
        uniforms(1, Stream.SAMPLING, 3, positions),
        uniforms(1, Stream.GATE, 4, positions),
        uniforms(1, Stream.GATE, 3 + 2**32, positions),
        uniforms(1, Stream.GATE, 3, positions + 1),
    ):
        assert (other == reference).sum() == 0


def test_many_draws_are_made_in_blocks_without_a_seam() -> None:
    # 40 000 draws are more than two blocks of 2^14 = 16 384.
    positions = torch.arange(40_000)
    draws = uniforms(1, Stream.GATE, 0, positions)
    assert torch.equal(draws[16_380:16_390], uniforms(1, Stream.GATE, 0, positions[16_380:16_390]))
    assert uniforms(1, Stream.GATE, torch.arange(0), 3).shape == (0,)


def test_draws_are_uniform_and_below_one() -> None:
    num_draws, num_bins = 200_000, 20
    draws = uniforms(11, Stream.GATE, torch.arange(400).unsqueeze(1), torch.arange(500)).flatten()
    assert draws.min() >= 0.0 and draws.max() < 1.0
    # Mean of n uniforms: 1/2, standard deviation sqrt(1/12n) = 0.00065. Chi-square of 20 bins: 19, sd 6.2.
    assert abs(draws.double().mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / num_draws)
    counts = torch.histc(draws, bins=num_bins, min=0.0, max=1.0)
    assert ((counts - num_draws / num_bins) ** 2 / (num_draws / num_bins)).sum() < 19 + 4 * 6.2
    # Neighbouring positions and samples are uncorrelated: the sd of a correlation of n pairs is 1/sqrt(n).
    grid = draws.view(400, 500)
    for left, right in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(num_draws)
