"""The kernels in the definition's terms: ids, aligned teachers, objectives' derivatives.

A kernel works on adjacent columns that one tensor holds of each model. Where the models' shard boundaries do not line
up, the student's shard is a few such pieces (`TeacherColumns`): each is one launch, and pieces join as ranks do.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``R`` rows of N whose log-probs are read at ``L`` ids
each, ``E`` all these ids together, ``V`` vocabulary shard, ``P`` pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_tropd.kernels.arguments import Coefficients, Columns, Entries
from megatron_tropd.objectives import ExactDivergence
from megatron_tropd.vocab_parallel.divergences import Divergence
from megatron_tropd.vocab_parallel.gradient import RowIds, StudentTerms, dense_coefficients
from megatron_tropd.vocab_parallel.shards import TeacherColumns


class Kernels(Protocol):
    """What `megatron_tropd.kernels.triton_kernels` and `megatron_tropd.kernels.compiled` offer."""

    shard_statistics: Callable[..., torch.Tensor]
    pair_statistics: Callable[..., torch.Tensor]
    mixture_statistics: Callable[..., torch.Tensor]
    write_gradient: Callable[..., None]


@dataclass(frozen=True)
class KernelPasses:
    """The passes of the definition (`statistics`, `divergences`, `gradient`) on one set of kernels."""

    kernels: Kernels

    def shard_statistics(
        self, logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range
    ) -> torch.Tensor:
        """Twin of `statistics.shard_statistics`."""
        return self.kernels.shard_statistics(logits_TV, rows_N, ids_N, held)

    def pair_statistics(
        self,
        student_logits_TV: torch.Tensor,
        teacher: TeacherColumns,
        rows_N: torch.Tensor,
        ids_N: torch.Tensor,
        held: range,
    ) -> torch.Tensor:
        """Twin of `statistics.pair_statistics`."""
        found = [
            self.kernels.pair_statistics(piece.student, piece.teacher, ids_N, held.start + piece.first)
            for piece in _pieces(student_logits_TV, teacher, rows_N)
        ]
        if not found:
            nothing_N4 = torch.zeros(rows_N.shape[0], 4, device=rows_N.device)
            return torch.cat((torch.full_like(nothing_N4, float("-inf")), nothing_N4), -1)
        return found[0] if len(found) == 1 else _join(torch.stack(found))

    def jsd_statistics(
        self,
        student_logits_TV: torch.Tensor,
        teacher: TeacherColumns,
        rows_N: torch.Tensor,
        student_log_sum_exp_N: torch.Tensor,
        teacher_log_sum_exp_N: torch.Tensor,
        beta: float,
    ) -> torch.Tensor:
        """Twin of `divergences.jsd_statistics`."""
        normalizers = student_log_sum_exp_N, teacher_log_sum_exp_N
        return self._mixture_statistics(student_logits_TV, teacher, rows_N, normalizers, beta)[:, :2]

    def skew_statistics(
        self,
        student_logits_TV: torch.Tensor,
        teacher: TeacherColumns,
        rows_N: torch.Tensor,
        student_log_sum_exp_N: torch.Tensor,
        teacher_log_sum_exp_N: torch.Tensor,
        beta: float,
        kind: ExactDivergence,
    ) -> torch.Tensor:
        """Twin of `divergences.skew_statistics`."""
        normalizers = student_log_sum_exp_N, teacher_log_sum_exp_N
        sums_N3 = self._mixture_statistics(student_logits_TV, teacher, rows_N, normalizers, beta)
        return sums_N3[:, 0::2] if kind == "skew_reverse_kl" else sums_N3[:, 1:]

    def _mixture_statistics(
        self,
        student_logits_TV: torch.Tensor,
        teacher: TeacherColumns,
        rows_N: torch.Tensor,
        normalizers: tuple[torch.Tensor, torch.Tensor],
        beta: float,
    ) -> torch.Tensor:
        sums_N3 = torch.zeros(rows_N.shape[0], 3, device=rows_N.device)
        for piece in _pieces(student_logits_TV, teacher, rows_N):
            sums_N3 += self.kernels.mixture_statistics(piece.student, piece.teacher, *normalizers, beta)
        return sums_N3

    def student_gradient(
        self,
        student_logits_TV: torch.Tensor,
        terms: StudentTerms,
        log_prob_grads: tuple[torch.Tensor, ...],
        divergence_grad_N: torch.Tensor | None,
        gradient_TV: torch.Tensor,
    ) -> None:
        """Twin of `gradient.student_gradient`."""
        if not terms.held:
            gradient_TV.zero_()
            return
        coefficients = _coefficients(terms, log_prob_grads, divergence_grad_N)
        entries = _entries(terms.read_ids, log_prob_grads, terms.rows_N.shape[0])
        start = terms.held.start
        if terms.divergence is None or divergence_grad_N is None:
            student = Columns(student_logits_TV[:, : len(terms.held)], terms.rows_N)
            self.kernels.write_gradient(student, None, coefficients, entries, gradient_TV, start)
            return
        pieces = _pieces(student_logits_TV, terms.divergence.teacher, terms.rows_N)
        # The last piece also fills the columns that are padding.
        ends = [*(piece.first for piece in pieces[1:]), gradient_TV.shape[1]]
        for piece, end in zip(pieces, ends, strict=True):
            self.kernels.write_gradient(
                piece.student, piece.teacher, coefficients, entries, gradient_TV[:, piece.first : end],
                start + piece.first, teacher_by_position=piece.received,
            )  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """Both models at the same adjacent ids."""

    first: int
    """First student column."""
    student: Columns
    teacher: Columns
    received: bool
    """The teacher's rows are those of N, not of T: they came from another rank."""


def _pieces(student_logits_TV: torch.Tensor, teacher: TeacherColumns, rows_N: torch.Tensor) -> list[_Piece]:
    """The student's existing columns from left to right."""
    to, source, count = teacher.own
    own_TV = teacher.logits_TV[:, source : source + count]
    found = [_Piece(to, Columns(student_logits_TV[:, to : to + count], rows_N), Columns(own_TV, rows_N), False)]
    every_N = torch.arange(rows_N.shape[0], device=rows_N.device)
    for to, sliver_NV in teacher.slivers:
        student = Columns(student_logits_TV[:, to : to + sliver_NV.shape[1]], rows_N)
        found.append(_Piece(to, student, Columns(sliver_NV, every_N), True))
    return sorted((piece for piece in found if piece.student.logits_TV.shape[1]), key=lambda piece: piece.first)


def _join(pieces_PN8: torch.Tensor) -> torch.Tensor:
    """`statistics.merge_pair`, but to the same eight floats, and for models that may have no mass here at all."""
    pieces_PN8 = pieces_PN8.double()
    log_s_PN, log_t_PN = pieces_PN8[..., 0], pieces_PN8[..., 2]
    log_s_N, log_t_N = log_s_PN.logsumexp(0), log_t_PN.logsumexp(0)
    log_w_PN = log_s_PN - log_s_N.masked_fill(log_s_N == float("-inf"), 0)
    log_v_PN = log_t_PN - log_t_N.masked_fill(log_t_N == float("-inf"), 0)
    w_PN, v_PN = log_w_PN.exp(), log_v_PN.exp()
    terms = (
        (w_PN, pieces_PN8[..., 4] - log_w_PN),
        (v_PN, pieces_PN8[..., 5] - log_v_PN),
        (w_PN, pieces_PN8[..., 6] + log_w_PN - log_v_PN),
        (v_PN, pieces_PN8[..., 7] + log_v_PN - log_w_PN),
    )
    chained = [(masses * values).masked_fill(masses == 0, 0).sum(0) for masses, values in terms]
    tokens = pieces_PN8[..., 1].amax(0), pieces_PN8[..., 3].amax(0)
    return torch.stack((log_s_N, tokens[0], log_t_N, tokens[1], *chained), -1).float()


def _coefficients(
    terms: StudentTerms, log_prob_grads: tuple[torch.Tensor, ...], divergence_grad_N: torch.Tensor | None
) -> Coefficients:
    """The gradients of `divergences.Divergence` in the kernel's form, plus the softmax part of every log-prob read."""
    a_N = dense_coefficients(terms, log_prob_grads)
    nothing_N = torch.zeros_like(a_N)
    if terms.divergence is None or divergence_grad_N is None:
        return Coefficients(torch.stack((a_N, nothing_N, nothing_N), -1), terms.log_sum_exp_N, None)
    divergence = terms.divergence
    b_N, c_N = _weights(divergence, divergence_grad_N)
    # A row of coefficient 0 gets exactly 0, even if its divergence is infinite.
    a_N = a_N - (c_N * divergence.student_kl_N).where(c_N != 0, 0)
    if divergence.overlap_N is not None:
        a_N = a_N - (b_N * divergence.overlap_N).where(b_N != 0, 0)
    return Coefficients(
        torch.stack((a_N, b_N, c_N), -1),
        terms.log_sum_exp_N,
        divergence.teacher_log_sum_exp_N,
        mixture_beta=divergence.beta if divergence.kind in ("jsd", "skew_forward_kl", "skew_reverse_kl") else None,
    )


def _weights(divergence: Divergence, grad_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """b and c of `kernels.gradient`, from the table in `divergences.Divergence`."""
    nothing_N = torch.zeros_like(grad_N)
    match divergence.kind:
        case "forward_kl":
            return grad_N, nothing_N
        case "reverse_kl":
            return nothing_N, grad_N
        case "gated_kl":
            assert divergence.gate_weights_N is not None
            reverse_N, forward_N = divergence.gate_weights_N
            return grad_N * forward_N, grad_N * reverse_N
        case "jsd":
            return nothing_N, grad_N * (1 - divergence.beta)
        case "skew_forward_kl":
            return grad_N * (divergence.beta - 1), nothing_N
        case "skew_reverse_kl":
            return grad_N * divergence.beta, grad_N


def _entries(read_ids: tuple[RowIds, ...], grads: tuple[torch.Tensor, ...], num_rows: int) -> Entries:
    """The gradients at all ids that the loss reads, sorted by row. Every size is a shape: the host never waits."""
    device = read_ids[0].ids_RL.device
    counts_N = torch.zeros(num_rows, dtype=torch.int64, device=device)
    for ids in read_ids:
        counts_N[ids.rows_R] += ids.ids_RL.shape[1]
    starts = torch.cat((counts_N.new_zeros(1), counts_N.cumsum(0)))
    num_entries = sum(ids.ids_RL.numel() for ids in read_ids)
    ids_E = torch.empty(num_entries, dtype=torch.int64, device=device)
    grads_E = torch.empty(num_entries, dtype=torch.float32, device=device)
    next_N = starts[:-1].clone()
    for ids, grad_RL in zip(read_ids, grads, strict=True):
        places_RL = next_N[ids.rows_R, None] + torch.arange(ids.ids_RL.shape[1], device=device)
        ids_E[places_RL] = ids.ids_RL.long()
        grads_E[places_RL] = grad_RL.float()
        next_N[ids.rows_R] += ids.ids_RL.shape[1]
    return Entries(starts, ids_E, grads_E)
