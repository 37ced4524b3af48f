"""Triton twins of `vocab_parallel.statistics.shard_statistics` and `pair_statistics`: one program per row.

Every thread keeps an online softmax of its own columns (its largest logit so far, and sums relative to that), merged
over the threads once at the end of the row. All arithmetic is fp32. Logits are centred before they are scaled, so
that huge logits lose nothing: exp(x - peak), never exp2(x log2(e) - peak log2(e)).

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``V`` columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.arguments import Columns
from megatron_tropd.kernels.tiles import exponential, row_start, row_stride, tile_columns, tile_options

# A finite start: -inf - LOWEST is -inf, whose exponential is 0, where -inf - -inf would be nan.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Loads of one thread and model before it computes: 64 bytes each way, within the registers of a full multiprocessor.
SHARD_STEPS, PAIR_STEPS = 4, 2
NO_MASS = tl.constexpr(float("-inf"))


@triton.jit
def _token_logit(row, token_id, first_id, num_valid):
    column = token_id - first_id
    return tl.load(row + column, mask=(column >= 0) & (column < num_valid), other=NO_MASS).to(tl.float32)


@triton.jit
def _absorb(peak, total, x):
    """One tile into every lane's online log-sum-exp."""
    new_peak = tl.maximum(peak, tl.max(tl.max(x, 2), 0))
    weights = exponential(x - new_peak[None, :, None])
    return new_peak, total * exponential(peak - new_peak) + tl.sum(tl.sum(weights, 2), 0)


@triton.jit(do_not_specialize=["first_id"])
def _shard_statistics(
    logits, stride, rows, ids, first_id, num_valid, out,
    STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = row_start(logits, stride, tl.load(rows + n))
    columns = tile_columns(STEPS, LANES, VECTOR)
    peak = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    whole = num_valid // (STEPS * LANES * VECTOR) * (STEPS * LANES * VECTOR)
    for start in range(0, whole, STEPS * LANES * VECTOR):
        peak, total = _absorb(peak, total, tl.load(row + start + columns).to(tl.float32))
    if whole < num_valid:
        last = tl.load(row + whole + columns, mask=whole + columns < num_valid, other=NO_MASS)
        peak, total = _absorb(peak, total, last.to(tl.float32))
    highest = tl.max(peak, 0)
    log_sum_exp = highest + tl.log(tl.sum(total * exponential(peak - highest), 0))
    tl.store(out + 2 * n, log_sum_exp)
    tl.store(out + 2 * n + 1, _token_logit(row, tl.load(ids + n), first_id, num_valid))


@triton.jit
def _sum(values):
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def _absorb_pair(peak_s, peak_t, sums, x, y, EXACT_ZEROS: tl.constexpr):
    """One tile into every lane's sums over both models.

    With u = x - peak_s, v = y - peak_t, weights s = exp(u), t = exp(v), ``sums`` are those of s, t, s u, t v,
    s (u - v) and t (u - v). EXACT_ZEROS: an event of weight 0 adds 0 even if its value is infinite.
    """
    total_s, total_t, log_s, log_t, ratio_s, ratio_t = sums
    new_s = tl.maximum(peak_s, tl.max(tl.max(x, 2), 0))
    new_t = tl.maximum(peak_t, tl.max(tl.max(y, 2), 0))
    rise_s, rise_t = peak_s - new_s, peak_t - new_t
    scale_s, scale_t = exponential(rise_s), exponential(rise_t)
    log_s = scale_s * (log_s + rise_s * total_s)
    log_t = scale_t * (log_t + rise_t * total_t)
    ratio_s = scale_s * (ratio_s + (rise_s - rise_t) * total_s)
    ratio_t = scale_t * (ratio_t + (rise_s - rise_t) * total_t)
    u, v = x - new_s[None, :, None], y - new_t[None, :, None]
    s, t = exponential(u), exponential(v)
    ratio = u - v
    su, tv, sr, tr = s * u, t * v, s * ratio, t * ratio
    if EXACT_ZEROS:
        su, sr = tl.where(s == 0, 0.0, su), tl.where(s == 0, 0.0, sr)
        tv, tr = tl.where(t == 0, 0.0, tv), tl.where(t == 0, 0.0, tr)
    sums = (
        total_s * scale_s + _sum(s), total_t * scale_t + _sum(t), log_s + _sum(su), log_t + _sum(tv),
        ratio_s + _sum(sr), ratio_t + _sum(tr),
    )  # fmt: skip
    return new_s, new_t, sums


@triton.jit
def _walk_pair(
    student_row, teacher_row, num_valid, peak_s, peak_t, EXACT_ZEROS: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Every lane's peaks and sums over the whole row, starting from these peaks."""
    columns = tile_columns(STEPS, LANES, VECTOR)
    zero = tl.zeros([LANES], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    whole = num_valid // (STEPS * LANES * VECTOR) * (STEPS * LANES * VECTOR)
    for start in range(0, whole, STEPS * LANES * VECTOR):
        x = tl.load(student_row + start + columns).to(tl.float32)
        y = tl.load(teacher_row + start + columns).to(tl.float32)
        peak_s, peak_t, sums = _absorb_pair(peak_s, peak_t, sums, x, y, EXACT_ZEROS)
    if whole < num_valid:
        valid = whole + columns < num_valid
        x = tl.load(student_row + whole + columns, mask=valid, other=NO_MASS).to(tl.float32)
        y = tl.load(teacher_row + whole + columns, mask=valid, other=NO_MASS).to(tl.float32)
        peak_s, peak_t, sums = _absorb_pair(peak_s, peak_t, sums, x, y, True)
    return peak_s, peak_t, sums


@triton.jit
def _merge_lanes(peak_s, peak_t, sums):
    """The row's peaks and sums from every lane's."""
    total_s, total_t, log_s, log_t, ratio_s, ratio_t = sums
    highest_s, highest_t = tl.max(peak_s, 0), tl.max(peak_t, 0)
    rise_s, rise_t = peak_s - highest_s, peak_t - highest_t
    scale_s, scale_t = exponential(rise_s), exponential(rise_t)
    log_s = tl.sum(scale_s * (log_s + rise_s * total_s), 0)
    log_t = tl.sum(scale_t * (log_t + rise_t * total_t), 0)
    ratio_s = tl.sum(scale_s * (ratio_s + (rise_s - rise_t) * total_s), 0)
    ratio_t = tl.sum(scale_t * (ratio_t + (rise_s - rise_t) * total_t), 0)
    total_s, total_t = tl.sum(total_s * scale_s, 0), tl.sum(total_t * scale_t, 0)
    return highest_s, highest_t, (total_s, total_t, log_s, log_t, ratio_s, ratio_t)


@triton.jit(do_not_specialize=["first_id"])
def _pair_statistics(
    student, student_stride, student_rows, teacher, teacher_stride, teacher_rows, ids, first_id, num_valid, out,
    STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    student_row = row_start(student, student_stride, tl.load(student_rows + n))
    teacher_row = row_start(teacher, teacher_stride, tl.load(teacher_rows + n))
    lowest = tl.full([LANES], LOWEST, tl.float32)
    peaks_s, peaks_t, lane_sums = _walk_pair(
        student_row, teacher_row, num_valid, lowest, lowest, False, STEPS, LANES, VECTOR
    )
    peak_s, peak_t, sums = _merge_lanes(peaks_s, peaks_t, lane_sums)
    if not (tl.abs(sums[2] + sums[3] + sums[4]) + tl.abs(sums[5]) >= 0):
        # 0 * inf = nan is rare: walk the row again, with its final peaks, instead of masking every element.
        peaks_s, peaks_t = tl.full([LANES], 0.0, tl.float32) + peak_s, tl.full([LANES], 0.0, tl.float32) + peak_t
        peaks_s, peaks_t, lane_sums = _walk_pair(
            student_row, teacher_row, num_valid, peaks_s, peaks_t, True, STEPS, LANES, VECTOR
        )
        peak_s, peak_t, sums = _merge_lanes(peaks_s, peaks_t, lane_sums)
    total_s, total_t, log_s, log_t, ratio_s, ratio_t = sums
    out += 8 * n
    token_id = tl.load(ids + n)
    tl.store(out, peak_s + tl.log(total_s))
    tl.store(out + 1, _token_logit(student_row, token_id, first_id, num_valid))
    tl.store(out + 2, peak_t + tl.log(total_t))
    tl.store(out + 3, _token_logit(teacher_row, token_id, first_id, num_valid))
    # A model without mass here expects nothing: its sums are 0, and so are the entropies and KLs they stand for.
    mass_s, mass_t = tl.where(total_s == 0, 1.0, total_s), tl.where(total_t == 0, 1.0, total_t)
    log_masses = tl.log(mass_s) - tl.log(mass_t)
    tl.store(out + 4, tl.where(total_s == 0, 0.0, tl.log(mass_s) - log_s / mass_s))
    tl.store(out + 5, tl.where(total_t == 0, 0.0, tl.log(mass_t) - log_t / mass_t))
    tl.store(out + 6, tl.where(total_s == 0, 0.0, ratio_s / mass_s - log_masses))
    tl.store(out + 7, tl.where(total_t == 0, 0.0, log_masses - ratio_t / mass_t))


def shard_statistics(logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range) -> torch.Tensor:
    """One model, fp32 ``[N, 2]``: log-sum-exp over the ids this shard holds, and the logit of ``ids_N`` or -inf."""
    statistics_N2 = torch.empty(rows_N.shape[0], 2, dtype=torch.float32, device=logits_TV.device)
    if rows_N.numel():
        _shard_statistics[(rows_N.shape[0],)](
            logits_TV, row_stride(logits_TV), rows_N, ids_N, held.start, len(held), statistics_N2,
            **tile_options(logits_TV, SHARD_STEPS),
        )  # fmt: skip
    return statistics_N2


def pair_statistics(student: Columns, teacher: Columns, ids_N: torch.Tensor, first_id: int) -> torch.Tensor:
    """Both models over the same ids, from ``first_id`` on: the fp32 ``[N, 8]`` of the PyTorch definition."""
    num_rows, num_valid = student.rows_N.shape[0], student.logits_TV.shape[1]
    statistics_N8 = torch.empty(num_rows, 8, dtype=torch.float32, device=ids_N.device)
    if num_rows:
        _pair_statistics[(num_rows,)](
            student.logits_TV, row_stride(student.logits_TV), student.rows_N,
            teacher.logits_TV, row_stride(teacher.logits_TV), teacher.rows_N,
            ids_N, first_id, num_valid, statistics_N8, **tile_options(student.logits_TV, PAIR_STEPS),
        )  # fmt: skip
    return statistics_N8
