"""The numerics guard: a loss or gradient that explodes is refused before the optimizer moves.

What it remembers (the recent steps, the refusals, how far the data is ahead of the steps) is part of a checkpoint, so a
resumed run takes the same decisions. Imports no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from megatron_tropd.config_watch import GuardConfig


class RefusedStepError(ValueError):
    """A step that must not move the weights; the optimizer has not moved."""

    outcome = "refused step"
    """How the run's exit report calls it."""

    def __init__(self, message: str, samples: Sequence[int] = ()):
        super().__init__(message)
        self.samples = tuple(samples)
        """Ids of the samples to look at, over all ranks; empty for all."""


class ExplodingError(RefusedStepError):
    """The loss or the gradient norm is far above that of the recent steps."""


class Guard:
    """Judges each step by the running medians of |loss| and gradient norm over the last accepted steps.

    Hand in numbers that are equal on every rank: then every rank decides the same.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self._recent: deque[tuple[float, float]] = deque(maxlen=config.window)
        self.num_refused = 0
        """Steps refused so far over the whole run, restarts included."""
        self.batches_ahead = 0
        """The batch of step n is number n plus this: every rollback goes back in steps, never in prompts."""

    @property
    def is_active(self) -> bool:
        """Whether any limit is set."""
        return self.config.max_loss_ratio is not None or self.config.max_grad_norm_ratio is not None

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise ExplodingError where a ratio to the running median is above its limit; else remember the step.

        ``loss`` in nats, of any sign: its absolute value is judged. Silent until half of ``window`` steps are known.
        """
        limits = {
            "loss": (abs(loss), self.config.max_loss_ratio),
            "grad_norm": (grad_norm, self.config.max_grad_norm_ratio),
        }
        for index, (name, (value, limit)) in enumerate(limits.items()):
            if limit is None or 2 * len(self._recent) < self.config.window:
                continue
            usual = median(values[index] for values in self._recent)
            if value > limit * usual:
                raise ExplodingError(
                    f"step {step}: the {'|loss|' if name == 'loss' else 'gradient norm'} is {value:.4g}, more than "
                    f"guard.max_{name}_ratio {limit:g} times its median over the last {len(self._recent)} steps, "
                    f"{usual:.4g}. The optimizer has not moved. Look at the samples in the run's refused/ folder; "
                    "guard.on_refused=skip or rollback goes on without them, a higher ratio accepts them."
                )
        self._recent.append((abs(loss), grad_norm))

    def count_refusal(self, error: RefusedStepError) -> None:
        """Count a refused step; raises ``error``, with the reason, where the run has to end."""
        self.num_refused += 1
        limit = self.config.max_refused_steps
        if self.config.on_refused == "stop":
            raise error
        if self.num_refused > limit:
            raise RefusedStepError(
                f"{error} This is refused step {self.num_refused} of the run, more than guard.max_refused_steps "
                f"{limit}: find out what is wrong before raising it",
                error.samples,
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, exact."""
        return {
            "recent": [list(values) for values in self._recent],
            "num_refused": self.num_refused,
            "batches_ahead": self.batches_ahead,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; a shorter ``window`` keeps the newest steps. An empty one starts anew."""
        recent = [(float(loss), float(grad_norm)) for loss, grad_norm in state.get("recent", [])]
        self._recent = deque(recent, maxlen=self.config.window)
        self.num_refused = int(state.get("num_refused", 0))
        self.batches_ahead = int(state.get("batches_ahead", 0))
