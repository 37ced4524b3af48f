"""Over-sampling within a generation: which requests end first, and from when on the others are not worth a token."""

from __future__ import annotations

import torch

NEVER = 2**31
"""More tokens than any response has."""


class Race:
    """Which ``enough`` requests of one call end with the fewest new tokens: no other is worth more tokens than those.

    Lives on the device: decoding does not wait for it.
    """

    def __init__(self, enough: int, num_ended: int, device: torch.device):
        """``num_ended`` requests have ended before the start, with no new token."""
        self._counts = torch.full((enough,), NEVER, device=device)
        self._counts[:num_ended] = 0

    @property
    def most(self) -> torch.Tensor:
        """New tokens beyond which a request is out of it; an int scalar."""
        return self._counts[-1]

    def add(self, counts: torch.Tensor) -> None:
        """New tokens of requests that have ended, ``NEVER`` of those that have not."""
        self._counts = torch.cat((self._counts, counts)).sort().values[: len(self._counts)]

    def is_over(self) -> bool:
        """Whether no request that has not begun can be among them. Waits for the device."""
        return int(self.most) == 0
