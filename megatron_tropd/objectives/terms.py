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
    ``objective.needs_engine_log_probs``). Gradients flow to ``student_log_probs_N``, ``top_k_divergence_N`` and
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
    gains_N = policy_gains(
        objective, on_policy_N, rewards_N, trust_N, outlier_N, teacher_entropy_N, top_k_divergence_N, advantages_N
    )
    loss_N = _policy_gradient(objective, gains_N, student_log_probs_N, engine_log_probs_N)
    if objective.exact_divergence is not None:
        assert divergence_N is not None
        loss_N = loss_N + divergence_N.where(on_policy_N, 0)
    elif objective.needs_top_k and objective.fkl_as == "loss":
        assert rewards_N is not None and trust_N is not None and outlier_N is not None
        assert top_k_divergence_N is not None
        weights_N = top_k_weights(objective, rewards_N, trust_N, outlier_N, teacher_entropy_N)
        loss_N = loss_N + weights_N * top_k_divergence_N.where(weights_N != 0, 0)
    if objective.importance_cap is not None:
        assert engine_log_probs_N is not None
        loss_N = loss_N * importance_weights(student_log_probs_N, engine_log_probs_N, objective.importance_cap)
    return guidance_N + loss_N


def policy_gains(
    objective: Objective,
    on_policy_N: torch.Tensor,
    rewards_N: torch.Tensor | None,
    trust_N: torch.Tensor | None,
    outlier_N: torch.Tensor | None,
    teacher_entropy_N: torch.Tensor | None,
    top_k_divergence_N: torch.Tensor | None,
    advantages_N: torch.Tensor | None,
) -> torch.Tensor:
    """What -log pi_S(x) of every token is multiplied with, ``[N]``, without gradient: the advantages of a policy
    gradient, by their weights. Arguments as of `token_losses`."""
    gains_N = torch.zeros_like(on_policy_N, dtype=torch.float32)
    if objective.exact_divergence is None:
        assert rewards_N is not None and trust_N is not None and outlier_N is not None
        gains_N = _reward_gains(objective, rewards_N, trust_N, outlier_N)
        if objective.needs_top_k and objective.fkl_as == "reward":
            assert top_k_divergence_N is not None
            weights_N = top_k_weights(objective, rewards_N, trust_N, outlier_N, teacher_entropy_N)
            gains_N = gains_N + _gain(weights_N, -top_k_divergence_N)
    if advantages_N is not None:
        gains_N = gains_N + advantages_N.where(on_policy_N, 0)
    return gains_N


def importance_weights(log_probs_N: torch.Tensor, engine_log_probs_N: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_trainer(x) / pi_engine(x), cap), without gradient: truncated importance sampling."""
    return (log_probs_N.detach() - engine_log_probs_N).exp().clamp(max=cap)


def clipped_tokens(objective: Objective, gains_N: torch.Tensor, ratios_N: torch.Tensor) -> torch.Tensor:
    """Where PPO's clip takes the gradient away, bool ``[N]``: the ratio has moved beyond its bound already, in the
    direction of the advantage."""
    assert objective.clip_ratio_low is not None and objective.clip_ratio_high is not None
    too_low_N = (ratios_N < 1 - objective.clip_ratio_low) & (gains_N < 0)
    return too_low_N | ((ratios_N > 1 + objective.clip_ratio_high) & (gains_N > 0))


def _reward_gains(
    objective: Objective, rewards_N: torch.Tensor, trust_N: torch.Tensor, outlier_N: torch.Tensor
) -> torch.Tensor:
    """Advantages of the sampled token, by their weights: the objective's reward, and the clipped one of outliers."""
    advantages_N = rewards_N
    if objective.on_policy in ("proximal", "mixture"):
        advantages_N = mixture_rewards(rewards_N, objective.mixture_weight)
    weights_N = {
        "asymmetric": trust_N * (rewards_N > 0),
        "mixture": (1 - objective.jsd_beta) * trust_N,
        "top_k_reverse_kl": torch.zeros_like(trust_N),
    }.get(objective.on_policy, trust_N)
    gains_N = _gain(weights_N, advantages_N)
    if objective.outlier == "clip":
        gains_N = gains_N + _gain(outlier_N, rewards_N.clamp(min=objective.tau))
    return gains_N


def _gain(weights_N: torch.Tensor, advantages_N: torch.Tensor) -> torch.Tensor:
    """weight * sg(advantage)."""
    # A rejected token may have R = -inf: it is masked before the product, or 0 * inf = nan would reach the gradient.
    return weights_N * advantages_N.detach().where(weights_N != 0, 0)


def _policy_gradient(
    objective: Objective, gains_N: torch.Tensor, log_probs_N: torch.Tensor, engine_log_probs_N: torch.Tensor | None
) -> torch.Tensor:
    """-gain * log pi_S(x); with gain R this is K1 reverse KL (METHOD 1, "trust region").

    With a clipped ratio it is weighted by r = pi_trainer(x) / pi_engine(x), detached, and by 0 where the clip acts: the
    gradient of PPO's surrogate min(r A, clip(r) A). The engine's log-probs stand for those of the policy that sampled
    [choice]. Sources: Schulman et al., arXiv 1707.06347; with two bounds, DAPO, arXiv 2503.14476.
    """
    live = gains_N != 0
    loss_N = -gains_N * log_probs_N.where(live, 0)
    if not objective.clips_ratio:
        return loss_N
    assert engine_log_probs_N is not None
    ratios_N = (log_probs_N.detach() - engine_log_probs_N).exp()
    loss_N = loss_N.where(~clipped_tokens(objective, gains_N, ratios_N), 0)
    if objective.importance_cap is not None:
        return loss_N  # the whole loss is weighted by the capped ratio, see `token_losses`
    return loss_N * ratios_N.where(live, 1)
