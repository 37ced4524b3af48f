"""The four kernels in PyTorch under `torch.compile`: each pass fused into a few loops, for CPUs and new devices.

The same signatures and floats as the Triton kernels. A row set that is not consecutive is copied a few rows at a time
in the logits' own type; nothing else of a shard's size is allocated.

Shape suffixes: ``T`` tokens, ``N`` rows of T that take part, ``C`` rows of one block, ``E`` entries, ``V`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from megatron_tropd.kernels.arguments import Coefficients, Columns, Entries

# Elements of a block of rows: its second reading comes from the cache, and a copy of it, where rows are scattered, is
# small beside a shard; large beside the cost of a call.
_BLOCK_ELEMENTS = 2**20


def shard_statistics(logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range) -> torch.Tensor:
    """Twin of `kernels.statistics.shard_statistics`."""
    found_N2 = torch.full((rows_N.shape[0], 2), -math.inf, device=logits_TV.device)
    if not held:
        return found_N2
    for span, logits_CV in _blocks(Columns(logits_TV[:, : len(held)], rows_N)):
        found_N2[span, 0] = _run(_log_sum_exp, logits_CV)
    found_N2[:, 1] = _token_logits(Columns(logits_TV[:, : len(held)], rows_N), ids_N - held.start)
    return found_N2


def pair_statistics(student: Columns, teacher: Columns, ids_N: torch.Tensor, first_id: int) -> torch.Tensor:
    """Twin of `kernels.statistics.pair_statistics`."""
    found_N8 = torch.empty(student.rows_N.shape[0], 8, device=ids_N.device)
    for span, student_CV, teacher_CV in _pair_blocks(student, teacher):
        found_C8 = _run(_pair, student_CV, teacher_CV, False)
        # 0 * inf = nan is rare: look at it again where it happened instead of masking every element.
        found_N8[span] = _run(_pair, student_CV, teacher_CV, True) if found_C8.isnan().any() else found_C8
    found_N8[:, 1] = _token_logits(student, ids_N - first_id)
    found_N8[:, 3] = _token_logits(teacher, ids_N - first_id)
    return found_N8


def mixture_statistics(
    student: Columns,
    teacher: Columns,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Twin of `kernels.mixture.mixture_statistics`."""
    found_N3 = torch.empty(student.rows_N.shape[0], 3, device=student.rows_N.device)
    log_odds, log_rest = _mixture_constants(beta)
    for span, student_CV, teacher_CV in _pair_blocks(student, teacher):
        normalizers = student_log_sum_exp_N[span], teacher_log_sum_exp_N[span]
        found_N3[span] = _run(_mixture, student_CV, teacher_CV, *normalizers, log_odds, log_rest)
    return found_N3


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
    """Twin of `kernels.gradient.write_gradient`."""
    num_rows, num_valid = student.rows_N.shape[0], student.logits_TV.shape[1]
    if teacher is not None:
        every_N = torch.arange(num_rows, device=gradient_TV.device)
        teacher = Columns(teacher.logits_TV, every_N if teacher_by_position else student.rows_N)
    stored = _entry_values(student, teacher, coefficients, entries, first_id)
    _, has_b, has_c = coefficients.abc_N3.any(0).tolist()
    in_place = student.logits_TV.data_ptr() == gradient_TV.data_ptr()
    skipped_T = torch.ones(gradient_TV.shape[0], dtype=torch.bool, device=gradient_TV.device)
    skipped_T[student.rows_N] = False
    for span, student_CV, teacher_CV in _pair_blocks(student, teacher):
        function, arguments = _gradient_call(coefficients, span, student_CV, teacher_CV, has_b, has_c)
        rows = _rows(student.rows_N[span])
        if not isinstance(rows, slice):
            written_CV = torch.empty_like(student_CV, dtype=gradient_TV.dtype)
            _run(_OUT_OF_PLACE[function], written_CV, *arguments)
            gradient_TV[rows, :num_valid] = written_CV
        elif in_place:
            _run(_IN_PLACE[function], *arguments)
        else:
            _run(_OUT_OF_PLACE[function], gradient_TV[rows, :num_valid], *arguments)
    gradient_TV.index_fill_(0, skipped_T.nonzero()[:, 0], 0)
    gradient_TV[:, num_valid:] = 0
    rows_E, columns_E, values_E = stored
    gradient_TV[rows_E, columns_E] = values_E.to(gradient_TV.dtype)


def _gradient_call(
    coefficients: Coefficients,
    span: slice,
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor | None,
    has_b: bool,
    has_c: bool,
) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    a_C1, b_C1, c_C1 = coefficients.abc_N3[span, :, None].unbind(1)
    log_sum_exp_s = coefficients.student_log_sum_exp_N[span, None]
    if teacher_CV is None or coefficients.teacher_log_sum_exp_N is None:
        return _softmax_element, (student_CV, a_C1, log_sum_exp_s)
    normalizers = log_sum_exp_s, coefficients.teacher_log_sum_exp_N[span, None]
    if coefficients.mixture_beta is None:
        return _element, (student_CV, teacher_CV, a_C1, b_C1, c_C1, *normalizers, has_b, has_c)
    constants = _mixture_constants(coefficients.mixture_beta)
    return _mixture_element, (student_CV, teacher_CV, a_C1, b_C1, c_C1, *normalizers, *constants)


def _entry_values(
    student: Columns, teacher: Columns | None, coefficients: Coefficients, entries: Entries, first_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row of T, column, whole gradient) of every entry held here, from the logits before they are overwritten."""
    num_rows, num_valid = student.rows_N.shape[0], student.logits_TV.shape[1]
    positions_E = torch.repeat_interleave(torch.arange(num_rows, device=entries.ids_E.device), entries.starts.diff())
    columns_E = entries.ids_E - first_id
    held = (columns_E >= 0) & (columns_E < num_valid)
    positions_E, columns_E = positions_E[held], columns_E[held]
    # Entries of a row that share an id: each becomes their sum.
    _, place_E = torch.unique(positions_E * num_valid + columns_E, return_inverse=True)
    totals_E = torch.zeros(place_E.shape[0], device=place_E.device).index_add_(0, place_E, entries.grads_E[held])[
        place_E
    ]
    student_E1 = student.logits_TV[student.rows_N[positions_E], columns_E][:, None]
    teacher_E1 = None if teacher is None else teacher.logits_TV[teacher.rows_N[positions_E], columns_E][:, None]
    function, arguments = _gradient_call(
        coefficients.select(positions_E), slice(None), student_E1, teacher_E1, True, True
    )
    return student.rows_N[positions_E], columns_E, function(*arguments)[:, 0] + totals_E


def _log_sum_exp(logits_CV: torch.Tensor) -> torch.Tensor:
    peak_C, x = _below_peak(logits_CV)
    return x.exp().sum(-1).log() + peak_C


def _finite(peak_C: torch.Tensor) -> torch.Tensor:
    return torch.where(peak_C == -math.inf, 0.0, peak_C)


def _pair(student_CV: torch.Tensor, teacher_CV: torch.Tensor, exact_zeros: bool) -> torch.Tensor:
    """Sums over exp(logit - peak), as the Triton kernel takes them: each logit is read twice and its exp taken once."""
    peak_s, x = _below_peak(student_CV)
    peak_t, y = _below_peak(teacher_CV)
    p, q, log_ratio = x.exp(), y.exp(), x - y
    total_s, total_t = p.sum(-1), q.sum(-1)
    expectation = _expectation if exact_zeros else _plain_expectation
    log_s, log_t = expectation(p, x), expectation(q, y)
    ratio_s, ratio_t = expectation(p, log_ratio), expectation(q, log_ratio)
    # A model without mass here expects nothing.
    mass_s, mass_t = torch.where(total_s == 0, 1.0, total_s), torch.where(total_t == 0, 1.0, total_t)
    log_masses = mass_s.log() - mass_t.log()
    entropy_s = torch.where(total_s == 0, 0.0, mass_s.log() - log_s / mass_s)
    entropy_t = torch.where(total_t == 0, 0.0, mass_t.log() - log_t / mass_t)
    reverse_kl = torch.where(total_s == 0, 0.0, ratio_s / mass_s - log_masses)
    forward_kl = torch.where(total_t == 0, 0.0, log_masses - ratio_t / mass_t)
    nothing = torch.zeros_like(total_s)
    log_sum_exp_s, log_sum_exp_t = peak_s + total_s.log(), peak_t + total_t.log()
    return torch.stack(
        (log_sum_exp_s, nothing, log_sum_exp_t, nothing, entropy_s, entropy_t, reverse_kl, forward_kl), -1
    )


def _below_peak(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = logits_CV.float()
    peak_C = _finite(x.amax(-1))
    return peak_C, x - peak_C[:, None]


def _expectation(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(probs == 0, 0.0, probs * values).sum(-1)


def _plain_expectation(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (probs * values).sum(-1)


def _mixture_constants(beta: float) -> tuple[float, float]:
    return math.log(beta) - math.log1p(-beta), math.log1p(-beta)


def _mixture_log_ratios(log_ratio: torch.Tensor, log_odds: float, log_rest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log(p / m) and log(q / m), as `kernels.mixture.mixture_log_ratios`."""
    r = log_ratio + log_odds
    rest = (-r.abs()).exp().log1p()
    return -log_rest - (r.clamp(min=0) + rest), -(log_rest + log_odds) - ((-r).clamp(min=0) + rest)


def _mixture(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    log_sum_exp_s: torch.Tensor,
    log_sum_exp_t: torch.Tensor,
    log_odds: float,
    log_rest: float,
) -> torch.Tensor:
    log_p, log_q = student_CV.float() - log_sum_exp_s[:, None], teacher_CV.float() - log_sum_exp_t[:, None]
    p, q = log_p.exp(), log_q.exp()
    student, teacher = _mixture_log_ratios(log_q - log_p, log_odds, log_rest)
    return torch.stack((_expectation(p, student), _expectation(q, teacher), _expectation(p, teacher.exp())), -1)


def _softmax_element(student: torch.Tensor, a: torch.Tensor, log_sum_exp_s: torch.Tensor) -> torch.Tensor:
    """The dense gradient in fp32; `kernels.gradient` has the formula."""
    return a * (student.float() - log_sum_exp_s).exp()


def _element(
    student: torch.Tensor,
    teacher: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    log_sum_exp_s: torch.Tensor,
    log_sum_exp_t: torch.Tensor,
    has_b: bool,
    has_c: bool,
) -> torch.Tensor:
    log_p, log_q = student.float() - log_sum_exp_s, teacher.float() - log_sum_exp_t
    p = log_p.exp()
    gradient = a * p
    if has_b:
        # Not b p - b q: equal models have a gradient of exactly 0.
        gradient = gradient + b * (p - log_q.exp())
    if has_c:
        weight = c * p
        gradient = gradient + torch.where(weight == 0, 0.0, weight * (log_p - log_q))
    return gradient


def _mixture_element(
    student: torch.Tensor,
    teacher: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    log_sum_exp_s: torch.Tensor,
    log_sum_exp_t: torch.Tensor,
    log_odds: float,
    log_rest: float,
) -> torch.Tensor:
    log_p, log_q = student.float() - log_sum_exp_s, teacher.float() - log_sum_exp_t
    p, weight = log_p.exp(), c * log_p.exp()
    log_ratio, log_share = _mixture_log_ratios(log_q - log_p, log_odds, log_rest)
    rest = torch.where(p == 0, 0.0, b * p * log_share.exp())
    return a * p + rest + torch.where(weight == 0, 0.0, weight * log_ratio)


def _in_place(element: Callable[..., torch.Tensor]) -> Callable[..., None]:
    def write(student_CV: torch.Tensor, *arguments: Any) -> None:
        student_CV.copy_(element(student_CV, *arguments))

    return write


def _out_of_place(element: Callable[..., torch.Tensor]) -> Callable[..., None]:
    def write(gradient_CV: torch.Tensor, *arguments: Any) -> None:
        gradient_CV.copy_(element(*arguments))

    return write


_ELEMENTS = (_softmax_element, _element, _mixture_element)
_IN_PLACE = {element: _in_place(element) for element in _ELEMENTS}
_OUT_OF_PLACE = {element: _out_of_place(element) for element in _ELEMENTS}


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


_seen: set[tuple[Any, ...]] = set()
"""Functions and kinds of tensors that have been compiled for any number of rows."""


def reset() -> None:
    """`torch.compiler.reset`, and what is remembered here of the compiler: a function compiled anew without its rows
    marked as many-sized is specialised for the first block, three times slower."""
    torch.compiler.reset()
    _seen.clear()


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiled once for each type and width; the number of rows may change."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    kind = function, *((tensor.dtype, tensor.stride(), tensor.shape[1:]) for tensor in tensors)
    if kind not in _seen:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if not torch._dynamo.config.disable:
        found = _compiled(function)(*arguments)
    else:
        # Where there is no GPU, `megatron_tropd.cpu` has switched the compiler off for Megatron's functions, and
        # rewrites requests for CUDA in a mode that the compiler would trace: neither concerns what runs here.
        with torch._dynamo.config.patch(disable=False), torch._C.DisableTorchFunction():
            found = _compiled(function)(*arguments)
    if tensors[0].shape[0] > 1:  # a single row is compiled for itself alone
        _seen.add(kind)
    return found


def _token_logits(columns: Columns, places_N: torch.Tensor) -> torch.Tensor:
    held_N = (places_N >= 0) & (places_N < columns.logits_TV.shape[1])
    return columns.logits_TV[columns.rows_N, places_N.where(held_N, 0)].float().where(held_N, -math.inf)


def _rows(rows_C: torch.Tensor) -> slice | torch.Tensor:
    """A slice where the ascending rows are consecutive: no copy is needed."""
    first, last = int(rows_C[0]), int(rows_C[-1])
    return slice(first, last + 1) if last - first == rows_C.shape[0] - 1 else rows_C


def _blocks(columns: Columns) -> Iterator[tuple[slice, torch.Tensor]]:
    for span, logits_CV, _ in _pair_blocks(columns, None):
        yield span, logits_CV


def _pair_blocks(
    student: Columns, teacher: Columns | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """(where in N, logits of both) of a few rows at a time: views, or copies where the rows are not consecutive."""
    num_rows, width = student.rows_N.shape[0], student.logits_TV.shape[1]
    if not num_rows:
        return
    size = max(_BLOCK_ELEMENTS // max(width, 1), 1)
    for start in range(0, num_rows, size):
        span = slice(start, min(start + size, num_rows))
        yield span, _read(student, span), None if teacher is None else _read(teacher, span)


def _read(columns: Columns, span: slice) -> torch.Tensor:
    return columns.logits_TV[_rows(columns.rows_N[span])]
