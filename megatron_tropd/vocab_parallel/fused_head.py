"""`fused_head_loss`: from hidden states to one loss per token, without a whole logits matrix.

The tokens go through the two output layers a chunk at a time: logits of both models, statistics, collectives,
objective, gradient. Only per-token values and the gradient of the hidden states outlive a chunk.

Shape suffixes: ``N`` tokens, ``C`` tokens of one chunk, ``V`` vocabulary shard, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.loss_report import LossReport
from megatron_tropd.objectives import Objective
from megatron_tropd.vocab_parallel.gradient import StudentTerms
from megatron_tropd.vocab_parallel.loss import apply_objective, selected_losses, write_gradient
from megatron_tropd.vocab_parallel.measure import Measurements, Shards, Tokens, measure
from megatron_tropd.vocab_parallel.output_head import OutputHead, WeightGradient, recommended_chunk_size
from megatron_tropd.vocab_parallel.validation import check_heads, check_inputs


def fused_head_loss(
    student: OutputHead,
    teacher: OutputHead | None,
    tokens_N: torch.Tensor,
    regions_N: torch.Tensor,
    objective: Objective,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    uniforms_N: torch.Tensor | None = None,
    advantages_N: torch.Tensor | None = None,
    engine_log_probs_N: torch.Tensor | None = None,
    full_statistics: bool = False,
    weights_N: torch.Tensor | None = None,
    recompute: bool = False,
    fp32_logits: bool = False,
    chunk_size: int | None = None,
    check: bool = True,
) -> tuple[torch.Tensor, LossReport]:
    """``weights_N`` times the loss of every token, fp32 ``[N]``, and the report: `distillation_loss` and both heads.

    The same values, draws and gradients as `distillation_loss` on ``head.logits``, which are never whole: a chunk of
    both models' logits is the peak. Select the tokens that carry loss first, so that no other reaches a head. Gradients
    reach the student's hidden states and its output weight: straight into ``main_grad`` (fp32) where Megatron's
    DistributedDataParallel keeps one. The gradient of ``hidden_NH`` is what this rank's vocabulary shard adds to it, to
    be summed over ``group`` (as the backward of Megatron's ``copy_to_tensor_model_parallel_region`` and
    ``gather_from_sequence_parallel_region`` does).

    Args:
        student: hidden states and output weight of the student, both with gradient or either.
        teacher: the same of the teacher, constants; None where the objective needs no teacher.
        tokens_N, regions_N, objective, vocab_size, group, uniforms_N, advantages_N, engine_log_probs_N,
            full_statistics: as in `distillation_loss`; every token must be of a region (not NONE).
        weights_N: constant fp32 weight of each token's loss; None: 1.
        recompute: False takes the gradients in the forward, while a chunk's logits are there. Only a multiple of the
            result's sum can then be differentiated, and an fp32 buffer of the weight's size lives until the backward.
            True computes the logits a second time in the backward: one more product with the student's head, any
            gradient of the result (weights that depend on all tokens' values, say), nothing kept but the inputs.
        fp32_logits: keep what the two products sum in fp32, where bf16 heads would round both models' logits: at 16
            that is to the nearest 0.125, which drowns the difference of two models that nearly agree. The gradient of
            the logits is rounded to the heads' dtype only for its own products.
        chunk_size: tokens per chunk, the same on every rank; None: `recommended_chunk_size`.
        check: refuse what does not fit; waits for the device once.

    Communication: that of `distillation_loss` for each chunk; none in the backward.

    Raises:
        ValueError: as `distillation_loss`; a token of region NONE; heads that do not fit each other or the tokens.

    Source: METHOD section 1; arXiv 2606.01249.
    """
    if check:
        check_heads(student, teacher, regions_N, weights_N, chunk_size)
        check_inputs(
            _shape_of_logits(student),
            None if teacher is None else _shape_of_logits(teacher),
            tokens_N,
            regions_N,
            objective,
            vocab_size=vocab_size,
            group=group,
            uniforms_T=uniforms_N,
            advantages_T=advantages_N,
            engine_log_probs_T=engine_log_probs_N,
            full_statistics=full_statistics,
        )
    if chunk_size is None:
        num_ids, width = student.weight_VH.shape
        sizes = num_ids, width, 0 if teacher is None else teacher.hidden_NH.shape[1]
        chunk_size = recommended_chunk_size(tokens_N.shape[0], *sizes, fp32_logits=fp32_logits)
    every_N = torch.arange(tokens_N.shape[0], device=tokens_N.device)
    tokens = Tokens(every_N, tokens_N.long(), regions_N, uniforms_N, advantages_N, engine_log_probs_N)
    work = _Work(student, teacher, tokens, objective, vocab_size, group, full_statistics, fp32_logits, chunk_size)
    if weights_N is None:
        weights_N = torch.ones_like(tokens_N, dtype=torch.float32)
    weights_N = weights_N.detach()
    if recompute:
        return _recomputed(work, weights_N)
    return _gradient_in_forward(work, weights_N)


def _shape_of_logits(head: OutputHead) -> torch.Tensor:
    """What `check_inputs` reads of logits; it takes no memory."""
    size = head.hidden_NH.shape[0], head.weight_VH.shape[0]
    return torch.empty(size, dtype=head.hidden_NH.dtype, device="meta")


@dataclass(frozen=True)
class _Work:
    """The arguments, cut into chunks."""

    student: OutputHead
    teacher: OutputHead | None
    tokens: Tokens
    objective: Objective
    vocab_size: int
    group: dist.ProcessGroup | None
    full_statistics: bool
    fp32_logits: bool
    chunk_size: int

    def spans(self) -> Iterator[slice]:
        """At least one, so that no token gives an empty loss and an empty report."""
        num_tokens = self.tokens.ids_N.shape[0]
        for start in range(0, max(num_tokens, 1), self.chunk_size):
            yield slice(start, min(start + self.chunk_size, num_tokens))

    def chunk(self, span: slice) -> tuple[Shards, Tokens]:
        """Both models' logits and the tokens of one chunk."""
        teacher_CV = self.teacher_logits(span)
        shards = Shards(self.student_logits(span), teacher_CV, self.vocab_size, self.group)
        return shards, self.tokens.span(span)

    def student_logits(self, span: slice) -> torch.Tensor:
        return self.student.logits(span, fp32=self.fp32_logits)

    def teacher_logits(self, span: slice) -> torch.Tensor | None:
        return None if self.teacher is None else self.teacher.logits(span, fp32=self.fp32_logits)

    def wants_gradient(self) -> bool:
        """Whether a backward can come."""
        needs = self.student.hidden_NH.requires_grad or self.student.weight_VH.requires_grad
        return torch.is_grad_enabled() and needs


def _gradient_in_forward(work: _Work, weights_N: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
    student, wanted = work.student, work.wants_gradient()
    gradients = _Gradients(student, into_main_grad=False) if wanted else None
    found = [_chunk_with_gradient(work, span, weights_N[span], gradients) for span in work.spans()]
    loss_N = torch.cat([loss_C for loss_C, _ in found])
    if wanted:
        loss_N = _KnownGradient.apply(student.hidden_NH, student.weight_VH, loss_N, gradients)
    return loss_N, _joined([report for _, report in found])


def _chunk_with_gradient(
    work: _Work, span: slice, weights_C: torch.Tensor, gradients: _Gradients | None
) -> tuple[torch.Tensor, LossReport]:
    """A function of its own, so that a chunk's logits are gone before the next ones come."""
    shards, tokens = work.chunk(span)
    logits_CV = shards.student_TV.detach().requires_grad_(gradients is not None)
    with torch.set_grad_enabled(gradients is not None):
        loss_C, report = selected_losses(
            logits_CV, shards, tokens, work.objective, work.full_statistics, inplace_backward=True
        )
        weighted_C = loss_C * weights_C
    if gradients is not None:
        (gradient_CV,) = torch.autograd.grad(weighted_C.sum(), logits_CV)
        gradients.add(span, gradient_CV)
    return weighted_C.detach(), report


class _Gradients:
    """From the gradient of each chunk's logits to those of the student's hidden states and weight, where wanted."""

    def __init__(self, student: OutputHead, *, into_main_grad: bool):
        self._student = student
        hidden_NH, weight_VH = student.hidden_NH, student.weight_VH
        self._hidden_NH = torch.empty_like(hidden_NH.detach()) if hidden_NH.requires_grad else None
        self._weight = WeightGradient(weight_VH, into_main_grad=into_main_grad) if weight_VH.requires_grad else None

    def add(self, span: slice, gradient_CV: torch.Tensor) -> None:
        gradient_CV = gradient_CV.to(self._student.hidden_NH.dtype)
        if self._hidden_NH is not None:
            torch.mm(gradient_CV, self._student.weight_VH.detach(), out=self._hidden_NH[span])
        if self._weight is not None:
            self._weight.add(gradient_CV, self._student.hidden_NH[span].detach())

    def finish(self, scale: torch.Tensor | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._hidden_NH is not None and scale is not None:
            self._hidden_NH.mul_(scale)
        return self._hidden_NH, None if self._weight is None else self._weight.finish(scale)


class _KnownGradient(torch.autograd.Function):
    """Attaches gradients of the result's sum that are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        loss_N: torch.Tensor,
        gradients: _Gradients,
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss_N.view_as(loss_N)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second backward would scale twice
        scale = grad_N[0] if grad_N.numel() else grad_N.new_zeros(())
        torch._assert_async(
            (grad_N == scale).all(),
            "fused_head_loss took its gradients in the forward: only a multiple of the result's sum can be "
            "differentiated. Give the tokens' weights as weights_N, or set recompute=True",
        )
        return *gradients.finish(scale), None, None


def _recomputed(work: _Work, weights_N: torch.Tensor) -> tuple[torch.Tensor, LossReport]:
    measured = [_measured_chunk(work, span) for span in work.spans()]
    terms = [found.terms for _, found in measured]
    flat = [value for _, found in measured for value in found.values]
    values = _RecomputedHead.apply(work.student.hidden_NH, work.student.weight_VH, work, terms, *flat)
    losses, reports = [], []
    for index, (tokens, found) in enumerate(measured):
        per_chunk = len(found.values)
        own = values[index * per_chunk : (index + 1) * per_chunk]
        loss_C, report = apply_objective(work.objective, tokens, found, own)
        losses.append(loss_C)
        reports.append(report)
    return torch.cat(losses) * weights_N, _joined(reports)


@torch.no_grad()
def _measured_chunk(work: _Work, span: slice) -> tuple[Tokens, Measurements]:
    shards, tokens = work.chunk(span)
    return tokens, _without_logits(measure(shards, tokens, work.objective, work.full_statistics))


def _without_logits(found: Measurements) -> Measurements:
    """The same without the chunk's teacher logits, which an exact divergence's gradient reads."""
    if found.terms.divergence is None:
        return found
    return replace(found, terms=_with_teacher(found.terms, torch.empty(0)))


def _with_teacher(terms: StudentTerms, teacher_CV: torch.Tensor) -> StudentTerms:
    assert terms.divergence is not None
    columns = replace(terms.divergence.teacher, logits_TV=teacher_CV)
    return replace(terms, divergence=replace(terms.divergence, teacher=columns))


class _RecomputedHead(torch.autograd.Function):
    """`loss._StudentTerms` for all chunks, whose logits are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        work: _Work,
        terms: list[StudentTerms],
        *values: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.work, ctx.terms = work, terms
        ctx.set_materialize_grads(False)
        return tuple(None if value is None else value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        work: _Work = ctx.work
        gradients = _Gradients(work.student, into_main_grad=True)
        per_chunk = len(grads) // len(ctx.terms)
        for index, (span, terms) in enumerate(zip(work.spans(), ctx.terms, strict=True)):
            own = grads[index * per_chunk : (index + 1) * per_chunk]
            gradients.add(span, _recomputed_gradient(work, span, terms, own))
        return *gradients.finish(), None, None, *(None for _ in grads)


def _recomputed_gradient(
    work: _Work, span: slice, terms: StudentTerms, grads: tuple[torch.Tensor | None, ...]
) -> torch.Tensor:
    if terms.divergence is not None and grads[-1] is not None:
        teacher_CV = work.teacher_logits(span)
        assert teacher_CV is not None
        terms = _with_teacher(terms, teacher_CV)
    gradient_CV = work.student_logits(span)
    write_gradient(gradient_CV, terms, grads, gradient_CV)
    return gradient_CV


def _joined(reports: list[LossReport]) -> LossReport:
    return LossReport(**{name: torch.cat([report[name] for report in reports]) for name in reports[0]})
