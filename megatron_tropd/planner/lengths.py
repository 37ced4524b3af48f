"""How many tokens a step reads, generates and learns from, with what cuts generation short.

Responses are taken as spread evenly about their mean, as far as that reaches to nothing or to the budget, and the
longest of a step as long as the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from megatron_tropd.config import Config
from megatron_tropd.planner.hardware import Assumptions

_POINTS = 256
"""Lengths that stand for all."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a sequence that a step learns from."""

    prompt: float
    earlier: float
    """Of the response, what steps before have learned from (``partial_learn_from=segments``): context."""
    response: float
    """What this step learns from."""

    @property
    def sequence(self) -> float:
        """Of the whole sequence."""
        return self.prompt + self.earlier + self.response


@dataclass(frozen=True)
class Generation:
    """One generation over all ranks."""

    sequences: float
    """In flight."""
    read: float
    """Mean tokens of a sequence that are prefilled: its prompt, and what of its response has been paused."""
    tokens: float
    """Mean tokens that a sequence is given in one round."""
    longest: float
    """The most that one is given."""
    context: float
    """Mean positions before a decoded token."""
    rounds: float = 1.0
    """How often all of this is done before enough have ended."""


def in_flight(config: Config) -> int:
    """Sequences of one generation over all ranks. With ``steps_per_rollout`` each step has its own all the same, one
    after another with the same weights."""
    return config.rollout.num_in_flight(config.training.global_batch_size)


def lengths(config: Config, assumed: Assumptions) -> Lengths:
    """What a step learns from."""
    prompt, rollout = config.data.max_prompt_length * assumed.mean_length, config.rollout
    spread = _responses(config, assumed)
    if config.objective != "seq-kd":
        if rollout.partial_tokens is not None and rollout.partial_learn_from == "segments":
            return Lengths(prompt, _paused(spread, rollout.partial_tokens), _piece(spread, rollout.partial_tokens))
        if rollout.partial_tokens is None and rollout.over_sampling > 1:
            spread = spread[: math.ceil(len(spread) / rollout.over_sampling)]
    return Lengths(prompt, 0.0, fmean(spread))


def generation(config: Config, assumed: Assumptions) -> Generation | None:
    """The student's; None where nothing is generated (`seq-kd`)."""
    if config.objective == "seq-kd":
        return None
    rollout, batch = config.rollout, config.training.global_batch_size
    prompt, budget = config.data.max_prompt_length * assumed.mean_length, rollout.max_response_length
    spread, most = _responses(config, assumed), rollout.partial_tokens
    sequences = in_flight(config)
    context = prompt + _before(spread)
    if most is None:
        longest = float(budget)
        if rollout.over_sampling > 1:  # it ends with the last winner
            longest = spread[math.ceil(len(spread) / rollout.over_sampling) - 1]
            spread = [min(length, longest) for length in spread]
            context = prompt + _before(spread)
        return Generation(sequences, prompt, fmean(spread), longest, context)
    piece, longest = _piece(spread, most), float(min(most, budget))
    rounds = 1
    if rollout.partial_learn_from == "finished":
        rounds = max(1, math.ceil(batch * fmean(spread) / (sequences * piece)))
    return Generation(sequences, prompt + _paused(spread, most), piece, longest, context, rounds)


def pieces(config: Config, assumed: Assumptions) -> float:
    """Steps that a response takes, on average: above 1 with ``partial_learn_from=segments``."""
    rollout = config.rollout
    if rollout.partial_tokens is None or rollout.partial_learn_from != "segments":
        return 1.0
    return _num_pieces(_responses(config, assumed), rollout.partial_tokens)


def _responses(config: Config, assumed: Assumptions) -> list[float]:
    """Lengths, ascending, each standing for as many responses."""
    budget = config.rollout.max_response_length
    mean = budget * assumed.mean_length
    width = min(mean, budget - mean)
    return [mean + width * (2 * (index + 0.5) / _POINTS - 1) for index in range(_POINTS)]


def _before(spread: list[float]) -> float:
    """Tokens of its response before a token, on average."""
    return fmean(length**2 for length in spread) / (2 * fmean(spread))


def _num_pieces(spread: list[float], most: int) -> float:
    return fmean(math.ceil(length / most) for length in spread)


def _piece(spread: list[float], most: int) -> float:
    return fmean(spread) / _num_pieces(spread, most)


def _paused(spread: list[float], most: int) -> float:
    """Tokens before a piece, on average over pieces."""
    counts = [math.ceil(length / most) for length in spread]
    return fmean(most * count * (count - 1) / 2 for count in counts) / fmean(counts)
