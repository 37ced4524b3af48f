"""Triton twins of `vocab_parallel.divergences.jsd_statistics` and `skew_statistics`, and the mixture's log-ratios.

m = beta q + (1 - beta) p for student p and teacher q; with r = log q - log p + log(beta / (1 - beta)),
log(p / m) = -log(1 - beta) - softplus(r) and log(q / m) = -log(beta) - softplus(-r).

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``V`` columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.arguments import Columns
from megatron_tropd.kernels.tiles import exponential, row_start, row_stride, tile_columns, tile_options

STEPS = 1


@triton.jit
def mixture_log_ratios(log_ratio, log_odds, log_rest):
    """log(p / m) and log(q / m) from log(q / p), log(beta / (1 - beta)) and log(1 - beta).

    Infinite where the model itself has no mass; nan where neither has.
    """
    r = log_ratio + log_odds
    rest = tl.log(1 + exponential(-tl.abs(r)))
    return -log_rest - (tl.maximum(r, 0.0) + rest), -(log_rest + log_odds) - (tl.maximum(-r, 0.0) + rest)


@triton.jit
def _sums(x, y, log_sum_exp_s, log_sum_exp_t, log_odds, log_rest):
    log_p, log_q = x - log_sum_exp_s, y - log_sum_exp_t
    p, q = exponential(log_p), exponential(log_q)
    student, teacher = mixture_log_ratios(log_q - log_p, log_odds, log_rest)
    overlap = p * exponential(teacher)
    # An event of probability 0 contributes 0 even if its log-ratio is infinite.
    student, overlap = tl.where(p == 0, 0.0, p * student), tl.where(p == 0, 0.0, overlap)
    teacher = tl.where(q == 0, 0.0, q * teacher)
    return tl.sum(tl.sum(student, 2), 0), tl.sum(tl.sum(teacher, 2), 0), tl.sum(tl.sum(overlap, 2), 0)


@triton.jit
def _mixture_statistics(
    student, student_stride, student_rows, teacher, teacher_stride, teacher_rows, log_sum_exps_s, log_sum_exps_t,
    num_valid, log_odds, log_rest, out, STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    student_row = row_start(student, student_stride, tl.load(student_rows + n))
    teacher_row = row_start(teacher, teacher_stride, tl.load(teacher_rows + n))
    log_sum_exp_s, log_sum_exp_t = tl.load(log_sum_exps_s + n), tl.load(log_sum_exps_t + n)
    columns = tile_columns(STEPS, LANES, VECTOR)
    student_sums, teacher_sums = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    overlaps = tl.zeros([LANES], tl.float32)
    for start in range(0, num_valid, STEPS * LANES * VECTOR):
        valid = start + columns < num_valid
        x = tl.load(student_row + start + columns, mask=valid, other=float("-inf")).to(tl.float32)
        y = tl.load(teacher_row + start + columns, mask=valid, other=float("-inf")).to(tl.float32)
        more_s, more_t, more_overlap = _sums(x, y, log_sum_exp_s, log_sum_exp_t, log_odds, log_rest)
        student_sums += more_s
        teacher_sums += more_t
        overlaps += more_overlap
    tl.store(out + 3 * n, tl.sum(student_sums, 0))
    tl.store(out + 3 * n + 1, tl.sum(teacher_sums, 0))
    tl.store(out + 3 * n + 2, tl.sum(overlaps, 0))


def mixture_statistics(
    student: Columns,
    teacher: Columns,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """These columns' share of (KL(p||m), KL(q||m), sum of p q / m), fp32 ``[N, 3]``; the shares add up."""
    num_rows = student.rows_N.shape[0]
    sums_N3 = torch.empty(num_rows, 3, dtype=torch.float32, device=student.rows_N.device)
    if num_rows:
        _mixture_statistics[(num_rows,)](
            student.logits_TV, row_stride(student.logits_TV), student.rows_N,
            teacher.logits_TV, row_stride(teacher.logits_TV), teacher.rows_N,
            student_log_sum_exp_N, teacher_log_sum_exp_N, student.logits_TV.shape[1],
            math.log(beta) - math.log1p(-beta), math.log1p(-beta), sums_N3, **tile_options(student.logits_TV, STEPS),
        )  # fmt: skip
    return sums_N3
