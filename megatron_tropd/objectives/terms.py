"""The terms of an objective on per-token tensors: weights, top-k divergences, losses.

The functions take per-token tensors and return per-token tensors. Gradients come from plain autograd through
``student_log_probs``, the top-k log-probs and the exact divergence; everything else is a constant.

Shape suffixes: ``N`` tokens, ``O`` rows of N whose top-k is needed, ``K`` top-k ids.
"""

from __future__ import annotations

import math

import torch

from megatron_tropd.objectives.options import Objective
from megatron_tropd.types import TokenRegion


def acceptance_probability(rewards_N: torch.Tensor) -> torch.Tensor:
    """P_trust = min(rho, 1) with R = log rho: speculative decoding's acceptance probability (METHOD 1)."""
    return rewards_N.clamp(max=0).exp()


def k2(rewards_N: torch.Tensor) -> torch.Tensor:
    """R^2 / 2 with x ~ pi_S: estimates KL(S||T), biased, of low variance. Never negative, unlike K1 = -R.

    Source: Schulman, "Approximating KL divergence" (2020), where K1, K2, K3 have their names.
    """
    return rewards_N.square() / 2


def k3(rewards_N: torch.Tensor) -> torch.Tensor:
    """rho - 1 - R with x ~ pi_S: estimates KL(S||T) without bias where pi_T has no mass beyond pi_S's support; >= 0.

    Source: as `k2`.
    """
    return rewards_N.expm1() - rewards_N


def mixture_rewards(rewards_N: torch.Tensor, teacher_weight: float) -> torch.Tensor:
    """log m(x) - log pi_S(x) = log(w rho + 1 - w), m = w pi_T + (1 - w) pi_S: bounded below by log(1 - w)."""
    own = torch.full_like(rewards_N, math.log1p(-teacher_weight))
    return torch.logaddexp(rewards_N + math.log(teacher_weight), own)


def trust_weights(
    objective: Objective, rewards_N: torch.Tensor, on_policy_N: torch.Tensor, uniforms_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (M, 1 - M) of the trusted term and of the outlier treatment; both 0 where ``on_policy_N`` is False.

    ``uniforms_N`` in [0, 1) is read by the Bernoulli gate alone: M = uniform < P_trust. No gradient passes. A reward of
    nan (a broken model) makes both weights nan: no gate may hide it.
    """
    rewards_N = rewards_N.detach()
    if objective.gate == "bernoulli":
        assert uniforms_N is not None
        trust_N = (uniforms_N < acceptance_probability(rewards_N)).to(rewards_N.dtype)
    elif objective.gate == "static":
        trust_N = (rewards_N > objective.tau).to(rewards_N.dtype)
    elif objective.gate == "soft":
        trust_N = acceptance_probability(rewards_N)
    else:
        trust_N = torch.full_like(rewards_N, 0.0 if objective.gate == "reject" else 1.0)
    trust_N = trust_N.where(~rewards_N.isnan(), rewards_N)
    return trust_N.where(on_policy_N, 0), (1 - trust_N).where(on_policy_N, 0)


def top_k_weights(
    objective: Objective,
    rewards_N: torch.Tensor,
    trust_N: torch.Tensor,
    outlier_N: torch.Tensor,
    teacher_entropy_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight of `top_k_divergence` in each token's loss, ``[N]``; where it is 0 no top-k is needed.

    ``trust_N`` and ``outlier_N`` from `trust_weights`; ``teacher_entropy_N`` is read by ``on_policy="entropy"``.
    """
    match objective.on_policy:
        case "entropy":
            assert teacher_entropy_N is not None
            return objective.entropy_alpha * trust_N * (teacher_entropy_N > objective.entropy_tau)
        case "mixture":
            return objective.jsd_beta * trust_N
        case "top_k_reverse_kl":
            return trust_N
    rejected_N = outlier_N if objective.outlier == "fkl" else torch.zeros_like(outlier_N)
    return rejected_N + trust_N * (rewards_N <= 0) if objective.on_policy == "asymmetric" else rejected_N


def exact_kl_weights(
    objective: Objective, regions_N: torch.Tensor, trust_N: torch.Tensor, outlier_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of KL(S||T) and of KL(T||S) in each token's exact divergence, for ``on_policy="gated_kl"``."""
    forward_N = outlier_N if objective.outlier == "fkl" else torch.zeros_like(outlier_N)
    if objective.guidance_loss == "forward_kl":
        forward_N = forward_N.masked_fill(regions_N == TokenRegion.GUIDANCE, 1)
    return trust_N, forward_N


def top_k_divergence(
    objective: Objective, student_log_probs_OK: torch.Tensor, teacher_log_probs_OK: torch.Tensor
) -> torch.Tensor:
    """The objective's divergence over the teacher's top-k, ``[O]``; log-probs of the full softmaxes.

    Per id: pi_T log(pi_T / pi_S) (METHOD 1), for ``mixture`` pi_T log(pi_T / m), for ``top_k_reverse_kl``
    pi_S log(pi_S / pi_T) - pi_S + pi_T (METHOD 2).
    """
    student_OK, teacher_OK = student_log_probs_OK, teacher_log_probs_OK
    if objective.on_policy == "mixture":
        return _top_k_kl_to_mixture(student_OK, teacher_OK, objective.jsd_beta)
    if objective.on_policy == "top_k_reverse_kl":
        student_probs_OK = student_OK.exp()
        kl_OK = _weighted(student_probs_OK, student_OK, teacher_OK)
        return (kl_OK - student_probs_OK + teacher_OK.exp()).sum(-1)
    return top_k_forward_kl(objective, student_OK, teacher_OK)


def top_k_forward_kl(
    objective: Objective, student_log_probs_OK: torch.Tensor, teacher_log_probs_OK: torch.Tensor
) -> torch.Tensor:
    """sum over the teacher's top-k of pi_T (log pi_T - log pi_S), ``[O]`` (METHOD 1, row "outlier", and its options).

    The log-probs are of the full softmaxes. An id with pi_T = 0 contributes 0 even where pi_S = 0; an id that only the
    student excludes gives +inf, with a finite gradient. The floor on the student's log-probs comes before any
    renormalisation.
    """
    if objective.student_log_prob_min is not None:
        student_log_probs_OK = student_log_probs_OK.clamp(min=objective.student_log_prob_min)
    student_OK, teacher_OK = student_log_probs_OK, teacher_log_probs_OK
    if objective.renormalize != "none":
        teacher_OK = teacher_OK - teacher_OK.logsumexp(-1, keepdim=True)
    if objective.renormalize == "both":
        student_OK = student_OK - student_OK.logsumexp(-1, keepdim=True)
    kl_O = _weighted(teacher_OK.exp(), teacher_OK, student_OK).sum(-1)
    if objective.tail == "bucket":
        kl_O = kl_O + _tail_bucket(student_log_probs_OK, teacher_log_probs_OK)
    return kl_O


def _weighted(weights: torch.Tensor, minuend: torch.Tensor, subtrahend: torch.Tensor) -> torch.Tensor:
    """weights * (minuend - subtrahend), 0 (and no gradient) where the weight is 0 even if a term is infinite."""
    # Both operands are masked before they meet: masking the product alone would leave 0 * inf = nan in the backward.
    live = weights != 0
    return weights * (minuend.where(live, 0) - subtrahend.where(live, 0))


def _tail_bucket(student_log_probs_OK: torch.Tensor, teacher_log_probs_OK: torch.Tensor) -> torch.Tensor:
    teacher_O = (1 - teacher_log_probs_OK.exp().sum(-1)).clamp(min=0)
    student_O = 1 - student_log_probs_OK.exp().sum(-1)
    # Below the rounding of 1 - sum the student's tail is noise: hold it there, without gradient.
    student_O = student_O.clamp(min=torch.finfo(student_O.dtype).eps)
    return _weighted(teacher_O, teacher_O.log(), student_O.log())


def _top_k_kl_to_mixture(student_OK: torch.Tensor, teacher_OK: torch.Tensor, beta: float) -> torch.Tensor:
    """sum_TopK pi_T log(pi_T / m) = -sum_TopK pi_T log(beta + (1 - beta) pi_S / pi_T), finite for every student."""
    # Masked before the two meet: -inf - (-inf) = nan would reach the gradient of ids that neither model has.
    live = teacher_OK != -math.inf
    log_ratio_OK = student_OK.where(live, 0) - teacher_OK.where(live, 0)
    return -(teacher_OK.exp() * mixture_rewards(log_ratio_OK, 1 - beta)).sum(-1)


def token_losses(
    objective: Objective,
    *,
    regions_N: torch.Tensor,
    student_log_probs_N: torch.Tensor,
    rewards_N: torch.Tensor | None = None,
    trust_N: torch.Tensor | None = None,
    outlier_N: torch.Tensor | None = None,
    teacher_entropy_N: torch.Tensor | None = None,
    top_k_divergence_N: torch.Tensor | None = None,
    divergence_N: torch.Tensor | None = None,
    advantages_N: torch.Tensor | None = None,
    engine_log_probs_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of every token, ``[N]``, to be minimised; unreduced (METHOD 1, the table; `presets` for the rest).

    ``student_log_probs_N`` is log pi_S(x); ``rewards_N`` R; ``trust_N`` and ``outlier_N`` from `trust_weights`;
    ``teacher_entropy_N`` as in `top_k_weights`; ``top_k_divergence_N`` where `top_k_weights` are not 0 (read if
    ``objective.needs_top_k``); ``divergence_N`` the exact divergence, with `exact_kl_weights` in it (read if
    ``objective.exact_divergence``); ``advantages_N`` the task's, with its coefficient, added to on-policy tokens as
    -A log pi_S(x); ``engine_log_probs_N`` what the engine sampled them with (read if
    ``objective.importance_cap`` is set). Gradients flow to ``student_log_probs_N``, ``top_k_divergence_N`` and
    ``divergence_N``.
    """
    guidance_N = -student_log_probs_N
    if objective.guidance_loss != "nll":
        assert divergence_N is not None
        guidance_N = divergence_N
    guidance_N = objective.guidance_beta * guidance_N.where(regions_N == TokenRegion.GUIDANCE, 0)
    if objective.on_policy == "none":
        return guidance_N
    on_policy_N = regions_N == TokenRegion.ON_POLICY
    if objective.exact_divergence is not None:
        assert divergence_N is not None
        loss_N = divergence_N.where(on_policy_N, 0)
    else:
        assert rewards_N is not None and trust_N is not None and outlier_N is not None
        loss_N = _sampled_losses(
            objective, rewards_N, trust_N, outlier_N, student_log_probs_N, teacher_entropy_N, top_k_divergence_N
        )
    if advantages_N is not None:
        loss_N = loss_N + _policy_gradient(on_policy_N.to(loss_N.dtype), advantages_N, student_log_probs_N)
    if objective.importance_cap is not None:
        assert engine_log_probs_N is not None
        loss_N = loss_N * importance_weights(student_log_probs_N, engine_log_probs_N, objective.importance_cap)
    return guidance_N + loss_N


def importance_weights(log_probs_N: torch.Tensor, engine_log_probs_N: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_trainer(x) / pi_engine(x), cap), without gradient: truncated importance sampling."""
    return (log_probs_N.detach() - engine_log_probs_N).exp().clamp(max=cap)


def _sampled_losses(
    objective: Objective,
    rewards_N: torch.Tensor,
    trust_N: torch.Tensor,
    outlier_N: torch.Tensor,
    student_log_probs_N: torch.Tensor,
    teacher_entropy_N: torch.Tensor | None,
    top_k_divergence_N: torch.Tensor | None,
) -> torch.Tensor:
    """The on-policy terms on the sampled token and on the top-k."""
    loss_N = _reward_losses(objective, rewards_N, trust_N, outlier_N, student_log_probs_N)
    if objective.needs_top_k:
        assert top_k_divergence_N is not None
        weights_N = top_k_weights(objective, rewards_N, trust_N, outlier_N, teacher_entropy_N)
        if objective.fkl_as == "reward":
            return loss_N + _policy_gradient(weights_N, -top_k_divergence_N, student_log_probs_N)
        loss_N = loss_N + weights_N * top_k_divergence_N.where(weights_N != 0, 0)
    return loss_N


def _reward_losses(
    objective: Objective,
    rewards_N: torch.Tensor,
    trust_N: torch.Tensor,
    outlier_N: torch.Tensor,
    log_probs_N: torch.Tensor,
) -> torch.Tensor:
    """The terms on the sampled token: K1 with the objective's reward, and K1 on the clipped reward of outliers."""
    advantages_N = rewards_N
    if objective.on_policy in ("proximal", "mixture"):
        advantages_N = mixture_rewards(rewards_N, objective.mixture_weight)
    weights_N = {
        "asymmetric": trust_N * (rewards_N > 0),
        "mixture": (1 - objective.jsd_beta) * trust_N,
        "top_k_reverse_kl": torch.zeros_like(trust_N),
    }.get(objective.on_policy, trust_N)
    loss_N = _policy_gradient(weights_N, advantages_N, log_probs_N)
    if objective.outlier == "clip":
        loss_N = loss_N + _policy_gradient(outlier_N, rewards_N.clamp(min=objective.tau), log_probs_N)
    return loss_N


def _policy_gradient(weights_N: torch.Tensor, advantages_N: torch.Tensor, log_probs_N: torch.Tensor) -> torch.Tensor:
    """-weight * sg(advantage) * log pi_S(x); with advantage R this is K1 reverse KL (METHOD 1, "trust region")."""
    # A rejected token may have R = -inf: it is masked before the product, or 0 * inf = nan would reach the gradient.
    live = weights_N != 0
    return -weights_N * advantages_N.detach().where(live, 0) * log_probs_N.where(live, 0)
