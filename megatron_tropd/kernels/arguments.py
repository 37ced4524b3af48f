"""What the kernels take, whichever language they are written in.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``E`` entries, ``V`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Columns:
    """Adjacent columns of one model's shard, and the rows of it that a pass works on."""

    logits_TV: torch.Tensor
    """Only the columns that exist; a view."""
    rows_N: torch.Tensor
    """Which row each of the N is."""


@dataclass(frozen=True)
class Coefficients:
    """a, b, c of every row and what log p, log q and log m need, all fp32 ``[N]``."""

    abc_N3: torch.Tensor
    """Contiguous ``[N, 3]``. Rows of three zeros get a dense gradient of exactly 0 without reading a logit."""
    student_log_sum_exp_N: torch.Tensor
    teacher_log_sum_exp_N: torch.Tensor | None
    """None: b = c = 0 everywhere, and the teacher is not read."""
    mixture_beta: float | None = None
    """The teacher's weight in m; None: the form with q."""

    def select(self, positions: torch.Tensor) -> Coefficients:
        """Those of some of the N rows, which may repeat."""
        teacher = self.teacher_log_sum_exp_N
        return replace(
            self,
            abc_N3=self.abc_N3[positions],
            student_log_sum_exp_N=self.student_log_sum_exp_N[positions],
            teacher_log_sum_exp_N=None if teacher is None else teacher[positions],
        )


@dataclass(frozen=True)
class Entries:
    """Gradients at single ids, the entries of row n of N at ``starts[n] : starts[n + 1]``."""

    starts: torch.Tensor
    """int64 ``[N + 1]``."""
    ids_E: torch.Tensor
    """int64 global ids; two of a row may be equal: their gradients add up."""
    grads_E: torch.Tensor
    """fp32."""
