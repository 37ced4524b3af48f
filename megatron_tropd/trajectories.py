"""Where a step's trajectories come from, made for one step or, with the same weights, for several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from megatron_tropd.types import Rollout


@dataclass(frozen=True)
class Trajectories:
    """What a step learns from on this data-parallel rank."""

    rollouts: list[Rollout]
    metrics: dict[str, float] = field(default_factory=dict)
    """What is told of how they were made, equal on every rank."""
    seconds_before: float = 0.0
    """What getting them took before the step that takes them began: a part of that step all the same."""


class TrajectorySource(Protocol):
    """Hands out trajectories, step after step; every data-parallel rank calls every method together."""

    def take(self, step: int, batch: int) -> Trajectories:
        """Those of ``step``. The step decides what a schedule says, the number of the batch which prompts and random
        draws are next; they differ after a rollback alone."""
        ...

    def can_pause(self) -> bool:
        """Whether a run that is saved now continues bit for bit."""
        ...

    def refused(self) -> None:
        """The step that took them was refused, and the weights stay."""
        ...

    def clear(self) -> None:
        """Forget what is in the making: the weights have become others."""
        ...

    def files(self, *, last: bool = False) -> dict[str, str]:
        """What a checkpoint has to keep: text by the name of a file in its folder. ``last``: the run stops here."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Continue from what ``files`` left in the folder of a checkpoint."""
        ...


class TrajectoryQueue:
    """Trajectories up to the next multiple of ``steps_per_rollout``, handed out a step at a time.

    What waits in it is in no checkpoint: a run that is to continue bit for bit stops at such a multiple.
    """

    def __init__(self, make: Callable[[int, int], Trajectories], steps_per_rollout: int, train_iters: int):
        """``make`` takes (step, number of the batch), as ``take`` does."""
        self._make, self._steps, self._end = make, steps_per_rollout, train_iters
        self._waiting: deque[Trajectories] = deque()
        self._made_at = 0

    def take(self, step: int, batch: int) -> Trajectories:
        """See ``TrajectorySource``."""
        if not self._waiting:
            self._made_at = step
            count = min(self._steps - step % self._steps, self._end - step)
            self._waiting.extend(self._make(step + index, batch + index) for index in range(count))
        made, age = self._waiting.popleft(), step - self._made_at
        rollouts = made.rollouts
        if age:
            rollouts = [replace(rollout, versions=(self._made_at,) * len(rollout.response)) for rollout in rollouts]
        return Trajectories(rollouts, made.metrics | {"rollout_age": float(age)})

    def can_pause(self) -> bool:
        """Whether the next step makes its own."""
        return not self._waiting

    def refused(self) -> None:
        """The next step takes others anyway."""

    def clear(self) -> None:
        """Forget them: the weights have become others."""
        self._waiting.clear()

    def files(self, *, last: bool = False) -> dict[str, str]:
        """None: a run is saved between rollouts."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Nothing was kept."""


def first_to_end(rollouts: Sequence[Rollout], count: int, max_response_length: int) -> list[Rollout]:
    """The ``count`` that ended with the fewest new tokens, the lower sample id first where they are equal; in the order
    of ``rollouts``.

    Ended: by an end token, or with a full budget. At least ``count`` have.
    """
    ended = sorted(
        (rollout for rollout in rollouts if has_ended(rollout, max_response_length)),
        key=lambda rollout: (len(rollout.response), rollout.request.sample_id),
    )
    assert len(ended) >= count
    chosen = {rollout.request.sample_id for rollout in ended[:count]}
    return [rollout for rollout in rollouts if rollout.request.sample_id in chosen]


def has_ended(rollout: Rollout, max_response_length: int) -> bool:
    """Whether there is nothing left to generate."""
    request = rollout.request
    written = len(request.prefix) + len(request.earlier) + len(rollout.response)
    return rollout.finished or written >= max_response_length
