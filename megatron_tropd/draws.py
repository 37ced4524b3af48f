"""Counter-based random numbers: a draw is a function of what it is for, not of when or where it is made.

A draw is one word of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
keyed on the run's seed and counted by (position, stream, sample id). A sample id is unique over the run and
contains the step (``step * global_batch_size + index``), which makes this METHOD 1's draw keyed on (seed,
step, sample id, position). So a draw is the same on every rank and device, in every batch, and after a
resume.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_WORD = 0xFFFFFFFF
_BLOCK = 2**14
"""Draws made at once: what the rounds pass through stays in the cache."""


class Stream(IntEnum):
    """What a draw decides; streams never share a number. Changing a value changes every run."""

    GATE = 0
    """The trust gate, by position of the token in the trajectory."""
    SAMPLING = 1
    """The token the engine samples, by position of the token in the trajectory."""
    PREFIX_LENGTH = 2
    """The length of a teacher prefix drawn uniformly (position 0)."""
    PREFIX_FRACTION = 3
    """Whether a rollout gets a teacher prefix (position 0)."""
    PROMPT_ORDER = 4
    """The order of the prompts; sample id = epoch + 2^32 x source, position = prompt."""
    MIXTURE = 5
    """Which source comes when; sample id = block of a mixture, position 0 its offset, then its places."""


def uniforms(seed: int, stream: Stream, sample_ids: torch.Tensor | int, positions: torch.Tensor | int) -> torch.Tensor:
    """Draws in [0, 1), fp32, multiples of 2^-24 (so never 1), one for each pair of sample id and position.

    ``sample_ids`` and ``positions`` are int64 tensors of any shapes that broadcast, or ints (positions in [0,
    2^32)); the result has the broadcast shape, on the tensors' device. No number depends on the others asked
    for with it.
    """
    sample_ids, positions = _as_tensors(sample_ids, positions)
    zeros = torch.zeros_like(sample_ids + positions)
    flat_ids, flat_positions = (sample_ids + zeros).flatten(), (positions + zeros).flatten()
    blocks = [slice(start, start + _BLOCK) for start in range(0, zeros.numel(), _BLOCK)]
    draws = [_uniforms(seed, stream, flat_ids[block], flat_positions[block]) for block in blocks]
    return torch.cat(draws).view(zeros.shape) if draws else zeros.float()


def _uniforms(seed: int, stream: Stream, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    counter = torch.stack(
        [
            positions & _WORD,
            torch.full_like(positions, int(stream)),
            sample_ids & _WORD,
            (sample_ids >> 32) & _WORD,
        ]
    )
    word = philox_4x32(counter, key=(seed & _WORD, (seed >> 32) & _WORD))[0]
    return (word >> 8).float() * 2.0**-24


def philox_4x32(counter: torch.Tensor, *, key: tuple[int, int]) -> torch.Tensor:
    """Philox-4x32-10: four 32-bit words, int64 ``[4, ...]``, from a counter of that shape and a 64-bit key.

    Words are held in int64 because that is the widest integer with arithmetic on every device.
    """
    # A round multiplies words 0 and 2 and exchanges the halves of the products: both at once, stacked.
    even, odd = counter[0::2], counter[1::2]
    multipliers, *round_keys = _constants(key, counter.device, counter.dim() - 1)
    for round_key in round_keys:
        high, low = _multiply(even, multipliers)
        even = high.flip(0) ^ odd ^ round_key
        odd = low.flip(0)
    return torch.stack([even, odd], dim=1).flatten(0, 1)


@lru_cache(maxsize=16)
def _constants(key: tuple[int, int], device: torch.device, num_dims: int) -> tuple[torch.Tensor, ...]:
    """Multipliers and every round's key, int64 ``[2, 1, ...]``; kept: a GPU would wait for each copy."""
    rounds = [
        [(word + index * increment) & _WORD for word, increment in zip(key, _KEY_INCREMENTS, strict=True)]
        for index in range(_NUM_ROUNDS)
    ]
    constants = torch.tensor([_MULTIPLIERS, *rounds], device=device)
    return constants.view(_NUM_ROUNDS + 1, 2, *[1] * num_dims).unbind()


def _multiply(words: torch.Tensor, multipliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of 32 x 32 bit products, by 16-bit halves of the multiplier: all below 2^49."""
    upper = words * (multipliers >> 16)
    lower = words * (multipliers & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def _as_tensors(sample_ids: torch.Tensor | int, positions: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 tensors, an int on the other's device."""
    if not isinstance(sample_ids, torch.Tensor):
        device = positions.device if isinstance(positions, torch.Tensor) else None
        sample_ids = torch.tensor(sample_ids, dtype=torch.int64, device=device)
    if not isinstance(positions, torch.Tensor):
        positions = torch.tensor(positions, dtype=torch.int64, device=sample_ids.device)
    return sample_ids, positions
