"""The exact full-vocabulary divergences: what they need beyond the statistics, and their gradient on a chunk.

Shape suffixes: ``N`` rows, ``C`` rows of one chunk, ``V`` vocabulary shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tropd.vocab_parallel.shards import Chunk, TeacherColumns, chunks, read
from megatron_tropd.vocab_parallel.statistics import expectation


@dataclass(frozen=True)
class Divergence:
    """One exact divergence between student p and teacher q, and all that its gradient needs.

    With m = q for the reverse KL and m = beta q + (1 - beta) p for the JSD (METHOD 2, `jsd-exact`), the gradients on
    the student's logits are, per unit of divergence:

    - ``forward_kl`` KL(q||p): p - q
    - ``reverse_kl`` KL(p||q): p (log p - log m - KL(p||m))
    - ``jsd`` beta KL(q||m) + (1 - beta) KL(p||m): (1 - beta) p (log p - log m - KL(p||m))
    """

    kind: Literal["reverse_kl", "forward_kl", "jsd"]
    beta: float
    teacher: TeacherColumns
    teacher_log_sum_exp_N: torch.Tensor
    student_kl_N: torch.Tensor
    """KL(p||m); unused by ``forward_kl``."""

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
            change_CV = log_probs_CV.exp_().sub_(teacher_CV.exp_()).mul_(coefficients_C1)
        else:
            scale = 1 - self.beta if self.kind == "jsd" else 1.0
            probs_CV = log_probs_CV.exp()
            reference_CV = teacher_CV
            if self.kind == "jsd":
                reference_CV = log_mixture(log_probs_CV, teacher_CV, self.beta)
            log_ratio_CV = log_probs_CV.sub_(reference_CV).sub_(self.student_kl_N[chunk.span, None])
            change_CV = log_ratio_CV.mul_(probs_CV).mul_(scale * coefficients_C1)
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
