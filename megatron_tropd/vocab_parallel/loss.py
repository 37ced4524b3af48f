"""`distillation_loss`: both models' vocabulary shards to one loss per token.

Shape suffixes: ``T`` tokens, ``N`` tokens of a region (not NONE), ``O`` tokens of N whose top-k is needed, ``K`` top-k,
``V`` vocabulary shard (the two models' may differ in width).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.loss_report import LossReport
from megatron_tropd.objectives import (
    Objective,
    acceptance_probability,
    clipped_tokens,
    policy_gains,
    token_losses,
    top_k_divergence,
)
from megatron_tropd.types import TokenRegion
from megatron_tropd.vocab_parallel.gradient import StudentTerms
from megatron_tropd.vocab_parallel.measure import Measurements, Shards, Tokens, measure
from megatron_tropd.vocab_parallel.passes import student_gradient
from megatron_tropd.vocab_parallel.validation import check_inputs


def distillation_loss(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | None,
    tokens_T: torch.Tensor,
    regions_T: torch.Tensor,
    objective: Objective,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    uniforms_T: torch.Tensor | None = None,
    advantages_T: torch.Tensor | None = None,
    engine_log_probs_T: torch.Tensor | None = None,
    full_statistics: bool = False,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, LossReport]:
    """The loss of every token, fp32 ``[T]``, unreduced and unnormalised, and what it tells about each token.

    Args:
        student_logits_TV: this rank's contiguous shard of the student's logits at temperature 1, bf16, fp16 or fp32;
            rank r holds the global ids [r * V, (r + 1) * V).
        teacher_logits_TV: the same of the teacher, a constant; its width and dtype may differ from the student's, so
            the two models' shard boundaries need not line up. None only where the objective needs no teacher (`sft`,
            `seq-kd`).
        tokens_T: integer id at each position, already shifted; read only where the region is not NONE.
        regions_T: integer `TokenRegion`: 0 none, 1 guidance, 2 on-policy.
        objective: from `megatron_tropd.objectives.preset`.
        vocab_size: ids the two models share. Both softmaxes run over exactly these; whatever lies beyond takes no
            mass and gets exactly zero gradient, even if it is nan.
        group: ranks that share the vocabulary, in shard order. None: this shard is the whole vocabulary.
        uniforms_T: draws in [0, 1) of the Bernoulli gate (M = uniform < P_trust); drawn from torch's generator when
            absent, and rank 0's draw is used on every rank.
        advantages_T: the task's advantage of each on-policy token, its coefficient included, fp32; None: no task.
        engine_log_probs_T: log-prob of each on-policy token where it was sampled, fp32 nats; needed where
            ``objective.needs_engine_log_probs``, not read otherwise.
        full_statistics: also report both entropies and the full KL divergences (8 instead of 4 floats a token).
        inplace_backward: let the backward write the gradient into the student's logits buffer, which then no longer
            holds logits; the backward can run only once. Otherwise no argument is ever modified.

    ``tokens_T``, ``regions_T``, ``uniforms_T`` and the options must be the same on every rank of the group; loss and
    report then are, bit for bit. Gradients reach the student's logits alone, for any incoming gradient, without a
    collective in the backward. The caller divides by the global number of terms. Region NONE gives loss and gradient
    exactly 0; without any other token nothing is communicated and the loss is a differentiable zero.

    Communication: one all-gather of ``[N, 4]`` fp32 (one float more where the draw is shared; 8 with full
    statistics, an exact KL or the teacher's entropy); one more for the top-k candidates (if some token needs them) or
    for an exact divergence from the mixture; one all-to-all of the ids whose two owners differ, where both models are
    needed at one id and their shard boundaries do not line up.

    A token whose exact value is infinite is reported as such (K1 where pi_T(x) = 0 under `opd`); what the gate
    rejects never enters the loss or the gradient.

    Raises:
        ValueError: shapes, dtypes, regions, token ids, uniforms or sizes that do not fit; a missing teacher.

    Source: METHOD section 1; arXiv 2606.01249.
    """
    check_inputs(
        student_logits_TV,
        teacher_logits_TV,
        tokens_T,
        regions_T,
        objective,
        vocab_size=vocab_size,
        group=group,
        uniforms_T=uniforms_T,
        advantages_T=advantages_T,
        engine_log_probs_T=engine_log_probs_T,
        full_statistics=full_statistics,
    )
    rows_N = regions_T.nonzero()[:, 0]
    uniforms_N, advantages_N, engine_log_probs_N = (
        None if values_T is None else values_T[rows_N] for values_T in (uniforms_T, advantages_T, engine_log_probs_T)
    )
    tokens = Tokens(rows_N, tokens_T[rows_N].long(), regions_T[rows_N], uniforms_N, advantages_N, engine_log_probs_N)
    teacher_TV = None if teacher_logits_TV is None else teacher_logits_TV.detach()
    shards = Shards(student_logits_TV.detach(), teacher_TV, vocab_size, group)
    loss_N, report = selected_losses(student_logits_TV, shards, tokens, objective, full_statistics, inplace_backward)
    loss_T = loss_N.new_zeros(tokens_T.shape).index_copy(0, rows_N, loss_N)
    zeros_T = torch.zeros_like(loss_T, requires_grad=False)
    return loss_T, LossReport(**{name: zeros_T.index_copy(0, rows_N, value_N) for name, value_N in report.items()})


def selected_losses(
    student_logits_TV: torch.Tensor,
    shards: Shards,
    tokens: Tokens,
    objective: Objective,
    full_statistics: bool,
    inplace_backward: bool,
) -> tuple[torch.Tensor, LossReport]:
    """`distillation_loss` without its checks and for the selected tokens alone: loss and report are ``[N]``.

    ``shards`` holds ``student_logits_TV`` detached.
    """
    with torch.no_grad():
        found = measure(shards, tokens, objective, full_statistics)
    values = _StudentTerms.apply(student_logits_TV, found.terms, inplace_backward, *found.values)
    return apply_objective(objective, tokens, found, values)


def apply_objective(
    objective: Objective, tokens: Tokens, found: Measurements, values: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, LossReport]:
    """Loss and report ``[N]`` from the measured values; ``values`` are `Measurements.values` with their derivative."""
    student_log_probs_N, top_k_OK, divergence_N = values
    assert student_log_probs_N is not None
    top_k_divergence_N = torch.zeros_like(student_log_probs_N)
    if found.top_k is not None and top_k_OK is not None:
        divergence_O = top_k_divergence(objective, top_k_OK, found.top_k.teacher_OK).where(found.top_k.needed_O, 0)
        top_k_divergence_N = top_k_divergence_N.index_copy(0, found.top_k.rows_O, divergence_O)
    loss_N = token_losses(
        objective,
        regions_N=tokens.regions_N,
        student_log_probs_N=student_log_probs_N,
        rewards_N=found.rewards_N,
        trust_N=found.trust_N,
        outlier_N=found.outlier_N,
        teacher_entropy_N=None if found.statistics.pair is None else found.statistics.pair.teacher_entropy_N,
        top_k_divergence_N=top_k_divergence_N,
        divergence_N=divergence_N,
        advantages_N=tokens.advantages_N,
        engine_log_probs_N=tokens.engine_log_probs_N,
    )
    return loss_N, _report(objective, tokens, found, top_k_divergence_N.detach())


class _StudentTerms(torch.autograd.Function):
    """Attaches the derivative on the student's logits to values that are already known.

    The forward hands the measured log-probs and divergence through; plain autograd takes the objective's gradient back
    to them, and the backward turns it into d loss / d logits with `student_gradient`: one pass, no collective. Kept
    meanwhile: the student's logits (and the teacher's for an exact divergence), and a few floats per token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits_TV: torch.Tensor,
        terms: StudentTerms,
        inplace_backward: bool,
        *values: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(student_logits_TV)
        ctx.terms, ctx.inplace_backward = terms, inplace_backward
        ctx.set_materialize_grads(False)
        return tuple(None if value is None else value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (student_logits_TV,) = ctx.saved_tensors
        student_logits_TV = student_logits_TV.detach()
        gradient_TV = student_logits_TV if ctx.inplace_backward else torch.empty_like(student_logits_TV)
        write_gradient(student_logits_TV, ctx.terms, grads, gradient_TV)
        return gradient_TV, None, None, *(None for _ in grads)


def write_gradient(
    student_logits_TV: torch.Tensor,
    terms: StudentTerms,
    grads: tuple[torch.Tensor | None, ...],
    gradient_TV: torch.Tensor,
) -> None:
    """`student_gradient` from the gradients of `Measurements.values`; None: no gradient reached that value."""
    *log_prob_grads, divergence_grad_N = grads
    read_grads = tuple(
        read.ids_RL.new_zeros(read.ids_RL.shape, dtype=torch.float32) if grad is None else grad.view(read.ids_RL.shape)
        for read, grad in zip(terms.read_ids, log_prob_grads, strict=False)
    )
    student_gradient(student_logits_TV, terms, read_grads, divergence_grad_N, gradient_TV)


def _report(objective: Objective, tokens: Tokens, found: Measurements, top_k_divergence_N: torch.Tensor) -> LossReport:
    student, teacher, pair = found.statistics.student, found.statistics.teacher, found.statistics.pair
    named = {"student_log_prob": student.log_probs_N, "trust": found.trust_N, "outlier": found.outlier_N}
    if objective.clips_ratio and tokens.engine_log_probs_N is not None:
        on_policy_N = tokens.regions_N == TokenRegion.ON_POLICY
        entropy_N = None if pair is None else pair.teacher_entropy_N
        gains_N = policy_gains(
            objective, on_policy_N, found.rewards_N, found.trust_N, found.outlier_N, entropy_N, top_k_divergence_N,
            tokens.advantages_N,
        )  # fmt: skip
        ratios_N = (student.log_probs_N - tokens.engine_log_probs_N).exp()
        named["clipped"] = (clipped_tokens(objective, gains_N, ratios_N) & on_policy_N).to(found.trust_N.dtype)
    if teacher is not None and found.rewards_N is not None:
        mass_N = torch.zeros_like(found.trust_N)
        if found.top_k is not None:
            mass_O = found.top_k.teacher_OK.exp().sum(-1).where(found.top_k.needed_O, 0)
            mass_N = mass_N.index_copy(0, found.top_k.rows_O, mass_O)
        named |= {
            "teacher_log_prob": teacher.log_probs_N,
            "reward": found.rewards_N,
            "p_trust": acceptance_probability(found.rewards_N),
            "teacher_top_k_mass": mass_N,
            "top_k_divergence": top_k_divergence_N,
        }
    if pair is not None:
        named |= {"student_entropy": pair.student_entropy_N, "teacher_entropy": pair.teacher_entropy_N}
        named |= {"forward_kl": pair.forward_kl_N, "reverse_kl": pair.reverse_kl_N}
    if objective.exact_divergence == "jsd" and found.divergence_N is not None:
        named["jsd"] = found.divergence_N
    return LossReport(**named)
