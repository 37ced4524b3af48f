"""The exact full-vocabulary divergences: what they need beyond the statistics, and their gradient on a chunk.

Shape suffixes: ``N`` rows, ``C`` rows of one chunk, ``V`` vocabulary shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_tropd.objectives import ExactDivergence
from megatron_tropd.vocab_parallel.shards import Chunk, TeacherColumns, chunks, read
from megatron_tropd.vocab_parallel.statistics import expectation


@dataclass(frozen=True)
class Divergence:
    """One exact divergence between student p and teacher q, and all that its gradient needs.

    With m = beta q + (1 - beta) p for the JSD and the skew KLs (METHOD 2), and c = sum_v p q / m, the gradients on the
    student's logits are, per unit of divergence:

    - ``forward_kl`` KL(q||p): p - q
    - ``reverse_kl`` KL(p||q): p (log p - log q - KL(p||q))
    - ``gated_kl`` w KL(p||q) + v KL(q||p), w and v per token: those two, weighted
    - ``jsd`` beta KL(q||m) + (1 - beta) KL(p||m): (1 - beta) p (log p - log m - KL(p||m))
    - ``skew_forward_kl`` KL(q||m): (1 - beta) p (c - q / m)
    - ``skew_reverse_kl`` KL(p||m): p (log p - log m - KL(p||m) + beta (q / m - c))

    In the JSD m's own derivatives cancel, and with them c.
    """

    kind: ExactDivergence
    beta: float
    teacher: TeacherColumns
    teacher_log_sum_exp_N: torch.Tensor
    student_kl_N: torch.Tensor
    """KL(p||q) or KL(p||m); unused by the two forward KLs."""
    overlap_N: torch.Tensor | None = None
    """c, for the skew KLs."""
    gate_weights_N: tuple[torch.Tensor, torch.Tensor] | None = None
    """(w, v), for ``gated_kl``."""

    def add_gradient(
        self,
        gradient_CV: torch.Tensor,
        log_probs_CV: torch.Tensor,
        coefficients_N: torch.Tensor,
        chunk: Chunk,
    ) -> None:
        """Add coefficient * d divergence / d logits to ``gradient_CV``; overwrites ``log_probs_CV``.

        ``log_probs_CV`` are the student's. Rows of coefficient 0 get exactly 0, whatever their divergence.
        """
        coefficients_C1 = coefficients_N[chunk.span, None]
        teacher_CV = self.teacher.read(chunk).sub_(self.teacher_log_sum_exp_N[chunk.span, None])
        if self.kind == "forward_kl":
            gradient_CV.add_(log_probs_CV.exp_().sub_(teacher_CV.exp_()).mul_(coefficients_C1))
            return
        probs_CV = log_probs_CV.exp()
        if self.kind == "gated_kl":
            assert self.gate_weights_N is not None
            reverse_N, forward_N = self.gate_weights_N
            log_ratio_CV = log_probs_CV.sub_(teacher_CV).sub_(self.student_kl_N[chunk.span, None])
            _add_weighted(gradient_CV, probs_CV, log_ratio_CV, coefficients_C1 * reverse_N[chunk.span, None])
            forward_C1 = coefficients_C1 * forward_N[chunk.span, None]
            gradient_CV.add_(probs_CV.sub_(teacher_CV.exp_()).mul_(forward_C1))
            return
        scale = {"jsd": 1 - self.beta, "skew_forward_kl": self.beta - 1}.get(self.kind, 1.0)
        values_CV = self._values(log_probs_CV, teacher_CV, chunk)
        _add_weighted(gradient_CV, probs_CV, values_CV, scale * coefficients_C1)

    def _values(self, log_probs_CV: torch.Tensor, teacher_CV: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """What p is multiplied with in the gradient, up to a constant; overwrites its arguments."""
        student_kl_C1 = self.student_kl_N[chunk.span, None]
        if self.kind == "reverse_kl":
            return log_probs_CV.sub_(teacher_CV).sub_(student_kl_C1)
        if self.kind == "jsd":
            return log_probs_CV.sub_(log_mixture(log_probs_CV, teacher_CV, self.beta)).sub_(student_kl_C1)
        assert self.overlap_N is not None
        mixture_CV = log_mixture(log_probs_CV, teacher_CV.clone(), self.beta)
        share_CV = teacher_CV.sub_(mixture_CV).exp_().sub_(self.overlap_N[chunk.span, None])
        if self.kind == "skew_forward_kl":
            return share_CV
        return log_probs_CV.sub_(mixture_CV).sub_(student_kl_C1).add_(share_CV, alpha=self.beta)


def _add_weighted(
    gradient_CV: torch.Tensor, probs_CV: torch.Tensor, values_CV: torch.Tensor, coefficients_C1: torch.Tensor
) -> None:
    """Add coefficient * prob * value to ``gradient_CV``, exactly 0 where a factor before the value is; overwrites the
    values."""
    change_CV = values_CV.mul_(probs_CV).mul_(coefficients_C1)
    # 0 * inf = nan is rare: look for it once instead of masking every element.
    if change_CV.sum().isnan():
        change_CV.masked_fill_((probs_CV == 0) | (coefficients_C1 == 0), 0)
    gradient_CV.add_(change_CV)


def log_mixture(student_CV: torch.Tensor, teacher_CV: torch.Tensor, beta: float) -> torch.Tensor:
    """log(beta q + (1 - beta) p) from log-probs; overwrites the teacher's, leaves the student's."""
    teacher_CV.add_(math.log(beta))
    return torch.logaddexp(student_CV + math.log1p(-beta), teacher_CV, out=teacher_CV)


def jsd_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """This shard's share of (KL(p||m), KL(q||m)), ``[N, 2]``; the shares of all ranks add up. A second pass: m needs
    both global normalisers."""
    sums_N2 = student_logits_TV.new_zeros(rows_N.shape[0], 2, dtype=torch.float32)
    for chunk in chunks(rows_N, student_logits_TV, bytes_per_element=24):
        student_CV = read(student_logits_TV, chunk, teacher.num_valid)
        student_CV.sub_(student_log_sum_exp_N[chunk.span, None])
        teacher_CV = teacher.read(chunk).sub_(teacher_log_sum_exp_N[chunk.span, None])
        teacher_probs_CV = teacher_CV.exp()
        log_teacher_CV = teacher_CV.clone()
        mixture_CV = log_mixture(student_CV, teacher_CV, beta)
        sums_N2[chunk.span, 1] = expectation(teacher_probs_CV, log_teacher_CV.sub_(mixture_CV))
        torch.exp(student_CV, out=teacher_probs_CV)
        sums_N2[chunk.span, 0] = expectation(teacher_probs_CV, student_CV.sub_(mixture_CV))
    return sums_N2


def skew_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
    kind: ExactDivergence,
) -> torch.Tensor:
    """This shard's share of (KL(q||m) or KL(p||m), sum of p q / m), ``[N, 2]``; the shares of all ranks add up."""
    sums_N2 = student_logits_TV.new_zeros(rows_N.shape[0], 2, dtype=torch.float32)
    for chunk in chunks(rows_N, student_logits_TV, bytes_per_element=24):
        student_CV = read(student_logits_TV, chunk, teacher.num_valid)
        student_CV.sub_(student_log_sum_exp_N[chunk.span, None])
        teacher_CV = teacher.read(chunk).sub_(teacher_log_sum_exp_N[chunk.span, None])
        mixture_CV = log_mixture(student_CV, teacher_CV.clone(), beta)
        first_CV = student_CV if kind == "skew_reverse_kl" else teacher_CV
        sums_N2[chunk.span, 0] = expectation(first_CV.exp(), first_CV - mixture_CV)
        sums_N2[chunk.span, 1] = expectation(student_CV.exp_(), teacher_CV.sub_(mixture_CV).exp_())
    return sums_N2
