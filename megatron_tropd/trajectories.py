"""Where a step's trajectories come from, made for one step or, with the same weights, for several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_tropd.types import Rollout

Trajectories = Callable[[int, int], list[Rollout]]
"""(step, number of the batch) to this data-parallel rank's trajectories. The step decides what a schedule says, the
batch which prompts and random draws are next; they differ after a rollback alone."""


class TrajectoryQueue:
    """Trajectories up to the next multiple of ``steps_per_rollout``, handed out a step at a time.

    What waits in it is in no checkpoint: a run that is to continue bit for bit stops at such a multiple.
    """

    def __init__(self, make: Trajectories, steps_per_rollout: int, train_iters: int):
        self._make, self._steps, self._end = make, steps_per_rollout, train_iters
        self._waiting: deque[list[Rollout]] = deque()
        self._made_at = 0

    def take(self, step: int, batch: int) -> tuple[list[Rollout], int]:
        """Those of ``step``, and how many optimizer steps ago they were made (0: with the weights of now)."""
        if not self._waiting:
            self._made_at = step
            count = min(self._steps - step % self._steps, self._end - step)
            self._waiting.extend(self._make(step + index, batch + index) for index in range(count))
        return self._waiting.popleft(), step - self._made_at

    def is_empty(self) -> bool:
        """Whether the next step makes its own."""
        return not self._waiting

    def clear(self) -> None:
        """Forget them: the weights have become others."""
        self._waiting.clear()
