"""The whole backward: one pass over the student's shard, no collective.

Every statistic that the loss reads has a gradient on the student's logits of the same shape: d log pi(i) / d z_j =
1[j = i] - pi(j). So the loss's gradient is ``dense * softmax`` plus a few entries, plus, for an exact divergence, the
terms of `divergences.Divergence`.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``R`` rows of N whose log-probs are read at ``L`` ids
each (the sampled token: R = N, L = 1; the top-k: outlier rows, L = k), ``C`` rows of one chunk, ``V`` vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.vocab_parallel.divergences import Divergence
from megatron_tropd.vocab_parallel.shards import chunks, columns_of, read


@dataclass(frozen=True)
class RowIds:
    """Vocabulary ids whose log-probs the loss reads on some of the N rows."""

    rows_R: torch.Tensor
    """Ascending positions in N."""
    ids_RL: torch.Tensor
    """Global ids, any integer type."""


@dataclass(frozen=True)
class StudentTerms:
    """What the loss reads of the student: log-probs at ids (`RowIds`), and at most one exact divergence."""

    rows_N: torch.Tensor
    """Rows of T that take part, ascending."""
    log_sum_exp_N: torch.Tensor
    """The student's global normaliser, fp32."""
    held: range
    """Global ids of this rank's student shard."""
    read_ids: tuple[RowIds, ...]
    divergence: Divergence | None


def student_gradient(
    student_logits_TV: torch.Tensor,
    terms: StudentTerms,
    log_prob_grads: tuple[torch.Tensor, ...],
    divergence_grad_N: torch.Tensor | None,
    gradient_TV: torch.Tensor,
) -> None:
    """Fill ``gradient_TV`` (may be the logits' own buffer) with d loss / d student logits, in its dtype.

    ``log_prob_grads[i]`` is d loss / d log-probs of ``terms.read_ids[i]``, ``[R, L]``; ``divergence_grad_N`` that of
    the exact divergence. Rows that take no part and columns that are padding get exactly 0. Sums are fp32, rounded
    once.
    """
    num_valid = len(terms.held)
    dense_N = dense_coefficients(terms, log_prob_grads)
    scatters = [_Scatter(ids, grad, terms.held) for ids, grad in zip(terms.read_ids, log_prob_grads, strict=False)]
    _zero_elsewhere(gradient_TV, terms.rows_N, num_valid)
    if num_valid == 0:
        return
    # An exact divergence needs the log-probs beside the probabilities.
    with_divergence = divergence_grad_N is not None
    bytes_per_element = 24 if with_divergence else 8
    for chunk in chunks(terms.rows_N, student_logits_TV, bytes_per_element):
        log_probs_CV = read(student_logits_TV, chunk, num_valid).sub_(terms.log_sum_exp_N[chunk.span, None])
        gradient_CV = log_probs_CV.exp() if with_divergence else log_probs_CV.exp_()
        gradient_CV.mul_(dense_N[chunk.span, None])
        if terms.divergence is not None and divergence_grad_N is not None:
            terms.divergence.add_gradient(gradient_CV, log_probs_CV, divergence_grad_N, chunk)
        for scatter in scatters:
            scatter.add_to(gradient_CV, chunk.span)
        gradient_TV[chunk.rows, :num_valid] = gradient_CV.to(gradient_TV.dtype)


def dense_coefficients(terms: StudentTerms, grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The softmax's coefficient ``[N]``: every log-prob that is read takes its gradient from all of p."""
    dense_N = torch.zeros_like(terms.log_sum_exp_N)
    for ids, grad in zip(terms.read_ids, grads, strict=False):
        dense_N.index_add_(0, ids.rows_R, grad.sum(-1), alpha=-1)
    return dense_N


def _zero_elsewhere(gradient_TV: torch.Tensor, rows_N: torch.Tensor, num_valid: int) -> None:
    skipped_T = torch.ones(gradient_TV.shape[0], dtype=torch.bool, device=gradient_TV.device)
    skipped_T[rows_N] = False
    gradient_TV.index_fill_(0, skipped_T.nonzero()[:, 0], 0)
    gradient_TV[:, num_valid:] = 0


class _Scatter:
    """Adds the gradients at single ids to the chunks that hold them."""

    def __init__(self, read_ids: RowIds, grad_RL: torch.Tensor, held: range) -> None:
        self.read_ids, self.grad_RL, self.held = read_ids, grad_RL, held

    def add_to(self, gradient_CV: torch.Tensor, span: slice) -> None:
        bounds = torch.tensor([span.start, span.stop], device=self.read_ids.rows_R.device)
        first, last = torch.searchsorted(self.read_ids.rows_R, bounds).tolist()
        columns, owned = columns_of(self.read_ids.ids_RL[first:last].long(), self.held)
        at = (self.read_ids.rows_R[first:last, None] - span.start) * gradient_CV.shape[1] + columns
        # scatter_add: the sampled token may be a top-k id too, and ids of other shards all add 0 at column 0.
        gradient_CV.view(-1).scatter_add_(0, at.flatten(), self.grad_RL[first:last].where(owned, 0).flatten())
