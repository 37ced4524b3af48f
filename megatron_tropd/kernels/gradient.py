"""Triton twin of `vocab_parallel.gradient.student_gradient`: every objective's gradient in one form.

On the student's logits, with p and q the models' probabilities over the whole vocabulary and m their mixture:

    g_v = a p_v + b (p_v - q_v)     + c p_v (log p_v - log q_v) + the entries at single ids, or
    g_v = a p_v + b p_v (q_v / m_v) + c p_v (log p_v - log m_v) + the entries at single ids

where a, b, c are numbers per token (`Coefficients`). Sums are fp32, rounded once. Entries at single ids
(the sampled token, the top-k) are computed from the logits before the dense pass overwrites them and stored after it;
entries that share an id compute the same sum in the same order, so nothing is atomic and every run gives the same bits.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``E`` entries, ``V`` columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.arguments import Coefficients, Columns, Entries
from megatron_tropd.kernels.mixture import mixture_log_ratios
from megatron_tropd.kernels.tiles import LOAD_BYTES, exponential, row_start, row_stride

STEPS = 2
NUM_WARPS = 4
ENTRY_BLOCK = 64


@triton.jit
def _element(x, y, a, b, c, log_sum_exp_s, log_sum_exp_t, log_odds, log_rest, MIXTURE: tl.constexpr):
    """The dense gradient at student logits x and teacher logits y."""
    log_p, log_q = x - log_sum_exp_s, y - log_sum_exp_t
    p = exponential(log_p)
    weight = c * p
    if MIXTURE:
        log_ratio, log_share = mixture_log_ratios(log_q - log_p, log_odds, log_rest)
        rest = tl.where(p == 0, 0.0, b * p * exponential(log_share))
    else:
        log_ratio = log_p - log_q
        # Not b p - b q: equal models have a gradient of exactly 0.
        rest = b * (p - exponential(log_q))
    # 0 * inf = nan: an event without probability, or a row without this term, has no slope.
    return a * p + rest + tl.where(weight == 0, 0.0, weight * log_ratio)


@triton.jit
def _dense(
    student, student_stride, gradient, gradient_stride, positions, abc, log_sum_exps_s,
    teacher, teacher_stride, log_sum_exps_t, num_valid, num_columns, log_odds, log_rest,
    TEACHER: tl.constexpr, BY_POSITION: tl.constexpr, MIXTURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of T: its first ``num_valid`` columns get the gradient, those up to ``num_columns`` 0."""
    t = tl.program_id(0)
    n = tl.load(positions + t)
    takes_part = n >= 0
    a = tl.load(abc + 3 * n, mask=takes_part, other=0.0)
    b = tl.load(abc + 3 * n + 1, mask=takes_part, other=0.0)
    c = tl.load(abc + 3 * n + 2, mask=takes_part, other=0.0)
    log_sum_exp_s = tl.load(log_sum_exps_s + n, mask=takes_part, other=0.0)
    student_row = row_start(student, student_stride, t)
    gradient_row = row_start(gradient, gradient_stride, t)
    columns = tl.arange(0, BLOCK)
    reads_teacher = False
    if TEACHER:
        reads_teacher = (b != 0) | (c != 0)
    first_zero = 0
    if reads_teacher:
        teacher_row = row_start(teacher, teacher_stride, n if BY_POSITION else t)
        log_sum_exp_t = tl.load(log_sum_exps_t + n)
        for start in range(0, num_valid, BLOCK):
            valid = start + columns < num_valid
            x = tl.load(student_row + start + columns, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(teacher_row + start + columns, mask=valid, other=0.0).to(tl.float32)
            values = _element(x, y, a, b, c, log_sum_exp_s, log_sum_exp_t, log_odds, log_rest, MIXTURE)
            tl.store(gradient_row + start + columns, values.to(gradient.dtype.element_ty), mask=valid)
        first_zero = num_valid
    elif a != 0:
        for start in range(0, num_valid, BLOCK):
            valid = start + columns < num_valid
            x = tl.load(student_row + start + columns, mask=valid, other=0.0).to(tl.float32)
            values = a * exponential(x - log_sum_exp_s)
            tl.store(gradient_row + start + columns, values.to(gradient.dtype.element_ty), mask=valid)
        first_zero = num_valid
    nothing = tl.zeros([BLOCK], gradient.dtype.element_ty)
    for start in range(first_zero, num_columns, BLOCK):
        tl.store(gradient_row + start + columns, nothing, mask=start + columns < num_columns)


@triton.jit(do_not_specialize=["first_id"])
def _entry_values(
    student, student_stride, rows, abc, log_sum_exps_s, teacher, teacher_stride, log_sum_exps_t,
    starts, ids, grads, values, first_id, num_valid, log_odds, log_rest,
    TEACHER: tl.constexpr, BY_POSITION: tl.constexpr, MIXTURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole gradient at one row's entries: the dense part and every entry of the same id."""
    n = tl.program_id(0)
    t = tl.load(rows + n)
    a, b, c = tl.load(abc + 3 * n), tl.load(abc + 3 * n + 1), tl.load(abc + 3 * n + 2)
    log_sum_exp_s = tl.load(log_sum_exps_s + n)
    student_row = row_start(student, student_stride, t)
    begin, end = tl.load(starts + n), tl.load(starts + n + 1)
    for first in range(begin, end, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        entry_ids = tl.load(ids + entries, mask=entries < end, other=-1)
        columns = entry_ids - first_id
        held = (entries < end) & (columns >= 0) & (columns < num_valid)
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(begin, end):
            total += tl.where(tl.load(ids + other) == entry_ids, tl.load(grads + other), 0.0)
        x = tl.load(student_row + columns, mask=held, other=0.0).to(tl.float32)
        dense = tl.zeros([BLOCK], tl.float32)
        if TEACHER:
            if (b != 0) | (c != 0):
                teacher_row = row_start(teacher, teacher_stride, n if BY_POSITION else t)
                y = tl.load(teacher_row + columns, mask=held, other=0.0).to(tl.float32)
                log_sum_exp_t = tl.load(log_sum_exps_t + n)
                dense = _element(x, y, a, b, c, log_sum_exp_s, log_sum_exp_t, log_odds, log_rest, MIXTURE)
            elif a != 0:
                dense = a * exponential(x - log_sum_exp_s)
        elif a != 0:
            dense = a * exponential(x - log_sum_exp_s)
        tl.store(values + entries, dense + total, mask=held)


@triton.jit(do_not_specialize=["first_id"])
def _store_entries(
    gradient, gradient_stride, rows, starts, ids, values, first_id, num_valid, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0)
    gradient_row = row_start(gradient, gradient_stride, tl.load(rows + n))
    begin, end = tl.load(starts + n), tl.load(starts + n + 1)
    for first in range(begin, end, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        columns = tl.load(ids + entries, mask=entries < end, other=-1) - first_id
        held = (entries < end) & (columns >= 0) & (columns < num_valid)
        found = tl.load(values + entries, mask=held, other=0.0)
        tl.store(gradient_row + columns, found.to(gradient.dtype.element_ty), mask=held)


def block_size(logits: torch.Tensor) -> int:
    """Columns that the dense pass works on at once."""
    return STEPS * 32 * NUM_WARPS * (LOAD_BYTES // logits.element_size())


def write_gradient(
    student: Columns,
    teacher: Columns | None,
    coefficients: Coefficients,
    entries: Entries,
    gradient_TV: torch.Tensor,
    first_id: int,
    *,
    teacher_by_position: bool = False,
) -> None:
    """Fill ``gradient_TV`` (may be the student's own buffer) for the ids from ``first_id`` on.

    The student's columns are the first of the gradient's; any columns beyond them, and rows of T that are not in
    ``student.rows_N``, get exactly 0. The teacher's rows are rows of T like the student's, or, by position, rows of N.
    """
    if not gradient_TV.numel():
        return
    num_valid, num_rows = student.logits_TV.shape[1], student.rows_N.shape[0]
    reference = teacher if teacher is not None else student
    options = {
        "TEACHER": teacher is not None,
        "BY_POSITION": teacher_by_position,
        "MIXTURE": coefficients.mixture_beta is not None,
    }
    beta = 0.5 if coefficients.mixture_beta is None else coefficients.mixture_beta
    log_odds, log_rest = math.log(beta) - math.log1p(-beta), math.log1p(-beta)
    normalizers_s, normalizers_t = coefficients.student_log_sum_exp_N, coefficients.teacher_log_sum_exp_N
    normalizers_t = normalizers_s if normalizers_t is None else normalizers_t
    values_E = torch.empty_like(entries.grads_E)
    if num_rows:
        _entry_values[(num_rows,)](
            student.logits_TV, row_stride(student.logits_TV), student.rows_N, coefficients.abc_N3, normalizers_s,
            reference.logits_TV, row_stride(reference.logits_TV), normalizers_t,
            entries.starts, entries.ids_E, entries.grads_E, values_E, first_id, num_valid, log_odds, log_rest,
            BLOCK=ENTRY_BLOCK, num_warps=1, **options,
        )  # fmt: skip
    block = block_size(student.logits_TV)
    positions_T = torch.full(gradient_TV.shape[:1], -1, device=gradient_TV.device)
    positions_T[student.rows_N] = torch.arange(num_rows, device=gradient_TV.device)
    _dense[(gradient_TV.shape[0],)](
        student.logits_TV, row_stride(student.logits_TV), gradient_TV, row_stride(gradient_TV), positions_T,
        coefficients.abc_N3, normalizers_s, reference.logits_TV, row_stride(reference.logits_TV), normalizers_t,
        num_valid, gradient_TV.shape[1], log_odds, log_rest, BLOCK=block, num_warps=NUM_WARPS, **options,
    )  # fmt: skip
    if num_rows:
        _store_entries[(num_rows,)](
            gradient_TV, row_stride(gradient_TV), student.rows_N, entries.starts, entries.ids_E, values_E,
            first_id, num_valid, BLOCK=ENTRY_BLOCK, num_warps=1,
        )  # fmt: skip
