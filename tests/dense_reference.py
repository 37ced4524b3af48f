"""METHOD.md on whole logits in float64: slow, dense, plain autograd. What the sharded loss is held to.

Written from the method's tables alone: it reads the objective's options, and shares no code with the package.

Shape suffixes: ``T`` tokens, ``V`` shared vocabulary, ``K`` top-k.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_tropd.objectives import Objective


def dense_loss(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | None,
    tokens_T: torch.Tensor,
    regions_T: torch.Tensor,
    objective: Objective,
    *,
    vocab_size: int,
    uniforms_T: torch.Tensor | None = None,
    advantages_T: torch.Tensor | None = None,
    engine_log_probs_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[T]`` in float64 (differentiable), and the quantities a report is compared with."""
    log_p = student_logits_TV[:, :vocab_size].double().log_softmax(-1)
    chosen = tokens_T.where(regions_T != 0, 0)[:, None]
    log_p_x = log_p.gather(1, chosen)[:, 0]
    loss = torch.where(regions_T == 1, -objective.guidance_beta * log_p_x, 0.0)
    facts = {"student_log_prob": log_p_x.detach()}
    if teacher_logits_TV is None:
        return loss, facts
    log_q = teacher_logits_TV[:, :vocab_size].double().log_softmax(-1).detach()
    log_q_x = log_q.gather(1, chosen)[:, 0]
    facts |= _statistics(log_p.detach(), log_q, log_p_x.detach(), log_q_x)
    on_policy = regions_T == 2
    R = (log_q_x - log_p_x).detach()
    top_k = _TopK(log_p, log_q, objective)
    # Terms on the sampled token are linear in log p(x): with a variable of its own in its place, its slope is known.
    whole_log_p_x = log_p_x
    if objective.clip_ratio_low is not None:
        log_p_x = log_p_x.detach().requires_grad_()
    facts |= {"M": _trust(R, objective, uniforms_T), "mass": top_k.mass}
    if objective.guidance_loss == "forward_kl":
        loss = torch.where(regions_T == 1, objective.guidance_beta * _kl(log_q, log_p), 0.0)
    per_token = {
        "sampled": lambda: _sampled(R, log_p_x, top_k, objective, facts),
        "asymmetric": lambda: _asymmetric(R, log_p_x, top_k, objective, facts),
        "proximal": lambda: -(objective.proximal_alpha * R.exp() + 1 - objective.proximal_alpha).log() * log_p_x,
        "entropy": lambda: _entropy(R, log_p_x, top_k, objective, facts),
        "mixture": lambda: _mixture(R, log_p_x, top_k, objective, facts),
        "top_k_reverse_kl": lambda: _generalized_reverse(top_k, facts),
        "reverse_kl": lambda: _kl(log_p, log_q),
        "forward_kl": lambda: _kl(log_q, log_p),
        "gated_kl": lambda: _gated(log_p, log_q, objective, facts),
        "jsd": lambda: _jsd(log_p, log_q, objective.jsd_beta),
        "skew_forward_kl": lambda: _kl(log_q, _mix(log_q, log_p, objective.skew)),
        "skew_reverse_kl": lambda: _kl(log_p, _mix(log_p, log_q, objective.skew)),
        "none": lambda: torch.zeros_like(loss),
    }[objective.on_policy]()
    if objective.guidance_loss == "divergence":
        loss = torch.where(regions_T == 1, objective.guidance_beta * per_token, 0.0)
    if advantages_T is not None:
        per_token = per_token - advantages_T.double() * log_p_x
    if engine_log_probs_T is not None:
        ratio = (whole_log_p_x - engine_log_probs_T.double()).exp()
        weight = torch.ones_like(ratio.detach())
        if objective.importance_cap is not None:
            weight = ratio.detach().clamp(max=objective.importance_cap)
        if objective.clip_ratio_low is not None:
            per_token = weight * _ppo(per_token, log_p_x, ratio, objective)
        else:
            per_token = weight * per_token
    return loss + torch.where(on_policy, per_token, 0.0), facts


def _ppo(per_token: torch.Tensor, log_p_x: torch.Tensor, ratio: torch.Tensor, objective: Objective) -> torch.Tensor:
    """PPO's -min(r A, clip(r) A) for the terms linear in ``log_p_x``, reported as -r A log p where it is not clipped;
    with a cap on the weights r is in them."""
    (slope,) = torch.autograd.grad(per_token.sum(), log_p_x, retain_graph=True)
    advantage = -slope
    others = per_token + advantage * log_p_x.detach()
    low, high = 1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = (advantage * ratio > advantage * ratio.clamp(low, high)).detach()
    value = torch.where(clipped, 0.0, -advantage * ratio * log_p_x).detach()
    scale = ratio.detach() if objective.importance_cap is not None else 1.0
    # `others` still depends on the variable: its slope there is zero, and it is detached from the logits anyway.
    return others + (value + surrogate - surrogate.detach()) / scale


def _statistics(
    log_p: torch.Tensor, log_q: torch.Tensor, log_p_x: torch.Tensor, log_q_x: torch.Tensor
) -> dict[str, torch.Tensor]:
    p, q = log_p.exp(), log_q.exp()
    return {
        "teacher_log_prob": log_q_x,
        "reward": log_q_x - log_p_x,
        "p_trust": torch.minimum((log_q_x - log_p_x).exp(), torch.ones_like(log_p_x)),
        "student_entropy": -(p * log_p).sum(-1),
        "teacher_entropy": -(q * log_q).sum(-1),
        "reverse_kl": _kl(log_p, log_q),
        "forward_kl": _kl(log_q, log_p),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
    }


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: torch.Tensor, log_b: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight a + (1 - weight) b)."""
    # In the log domain: ids that both models exclude have m = 0 but log p and log q of their own.
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log(1 - weight))


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    log_m = _mix(log_q, log_p, beta)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def top_k_ids(logits_TV: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest, in the order (value descending, id ascending)."""
    return logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, :k]


class _TopK:
    """Both models at the teacher's top-k."""

    def __init__(self, log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> None:
        ids = top_k_ids(log_q, objective.top_k)
        self.log_p, self.log_q, self.all_log_q = log_p.gather(1, ids), log_q.gather(1, ids), log_q
        self.mass = self.log_q.exp().sum(-1)


def _top_k_kl(top_k: _TopK, objective: Objective) -> torch.Tensor:
    log_p_K, log_q_K, log_q = top_k.log_p, top_k.log_q, top_k.all_log_q
    q_K, mass = log_q_K.exp(), top_k.mass
    if objective.student_log_prob_min is not None:
        log_p_K = torch.maximum(log_p_K, torch.full_like(log_p_K, objective.student_log_prob_min))
    if objective.tail == "bucket":
        inside = (q_K * (log_q_K - log_p_K)).sum(-1)
        outside = log_q.exp().sum(-1) - mass
        return inside + outside * (outside.log() - (1 - log_p_K.exp().sum(-1)).log())
    if objective.renormalize in ("teacher", "both"):
        log_q_K = log_q_K - mass.log()[:, None]
    if objective.renormalize == "both":
        log_p_K = log_p_K - log_p_K.exp().sum(-1).log()[:, None]
    return _kl(log_q_K, log_p_K)


def _trust(R: torch.Tensor, objective: Objective, uniforms: torch.Tensor | None) -> torch.Tensor:
    u = torch.zeros_like(R) if uniforms is None else uniforms.double()
    acceptance = R.exp().clamp(max=1)
    return {
        "none": lambda: torch.ones_like(R),
        "reject": lambda: torch.zeros_like(R),
        "static": lambda: 1.0 - (objective.tau >= R).double(),
        "soft": lambda: acceptance,
        "bernoulli": lambda: (u < acceptance).double(),
    }[objective.gate]()


Facts = dict[str, torch.Tensor]


def _forward(top_k: _TopK, log_p_x: torch.Tensor, objective: Objective, weights: torch.Tensor, facts: Facts) -> Any:
    """The weighted top-k forward KL, as a loss or as a reward."""
    kl = _top_k_kl(top_k, objective)
    facts["top-k divergence"], facts["top-k weight"] = kl.detach(), weights
    return weights * (kl if objective.fkl_as == "loss" else kl.detach() * log_p_x)


def _outlier(R: torch.Tensor, log_p_x: torch.Tensor, objective: Objective, weights: torch.Tensor) -> torch.Tensor:
    """K1 on the clipped reward, or nothing."""
    if objective.outlier == "clip":
        return -weights * torch.clamp(R, min=objective.tau) * log_p_x
    return torch.zeros_like(R)


def _sampled(R: torch.Tensor, log_p_x: torch.Tensor, top_k: _TopK, objective: Objective, facts: Facts) -> torch.Tensor:
    M = facts["M"]
    weights = 1 - M if objective.outlier == "fkl" else torch.zeros_like(M)
    fkl = _forward(top_k, log_p_x, objective, weights, facts)
    return M * (-R * log_p_x) + fkl + _outlier(R, log_p_x, objective, 1 - M)


def _asymmetric(
    R: torch.Tensor, log_p_x: torch.Tensor, top_k: _TopK, objective: Objective, facts: Facts
) -> torch.Tensor:
    M, positive = facts["M"], (R > 0).double()
    weights = M * (1 - positive) + (1 - M) * (objective.outlier == "fkl")
    fkl = _forward(top_k, log_p_x, objective, weights, facts)
    return M * positive * (-R * log_p_x) + fkl + _outlier(R, log_p_x, objective, 1 - M)


def _entropy(R: torch.Tensor, log_p_x: torch.Tensor, top_k: _TopK, objective: Objective, facts: Facts) -> torch.Tensor:
    weights = objective.entropy_alpha * (facts["teacher_entropy"] > objective.entropy_tau).double()
    return -R * log_p_x + _forward(top_k, log_p_x, objective, weights, facts)


def _mixture(R: torch.Tensor, log_p_x: torch.Tensor, top_k: _TopK, objective: Objective, facts: Facts) -> torch.Tensor:
    beta = objective.jsd_beta
    kl = _kl(top_k.log_q, _mix(top_k.log_q, top_k.log_p, beta))
    facts["top-k divergence"], facts["top-k weight"] = kl.detach(), torch.ones_like(R)
    return beta * kl - (1 - beta) * (beta * R.exp() + 1 - beta).log() * log_p_x


def _generalized_reverse(top_k: _TopK, facts: Facts) -> torch.Tensor:
    p, q = top_k.log_p.exp(), top_k.log_q.exp()
    divergence = (p * (top_k.log_p - top_k.log_q) - p + q).sum(-1)
    facts["top-k divergence"], facts["top-k weight"] = divergence.detach(), torch.ones_like(divergence)
    return divergence


def _gated(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective, facts: Facts) -> torch.Tensor:
    M = facts["M"]
    return M * _kl(log_p, log_q) + (1 - M) * (objective.outlier == "fkl") * _kl(log_q, log_p)
