"""METHOD.md on whole logits in float64: slow, dense, plain autograd. What the sharded loss is held to.

Written from the method's tables alone: it reads the objective's options, and shares no code with the package.

Shape suffixes: ``T`` tokens, ``V`` shared vocabulary, ``K`` top-k.
"""

from __future__ import annotations

import math

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
    per_token = {
        "sampled": lambda: _sampled(log_p, log_q, log_p_x, log_q_x, objective, uniforms_T, facts),
        "reverse_kl": lambda: (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": lambda: (log_q.exp() * (log_q - log_p)).sum(-1),
        "jsd": lambda: _jsd(log_p, log_q, objective.jsd_beta),
        "none": lambda: torch.zeros_like(loss),
    }[objective.on_policy]()
    return loss + torch.where(on_policy, per_token, 0.0), facts


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
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
    }


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    # In the log domain: ids that both models exclude have m = 0 but log p and log q of their own.
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def top_k_ids(logits_TV: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest, in the order (value descending, id ascending)."""
    return logits_TV.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _top_k_kl(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    ids = top_k_ids(log_q, objective.top_k)
    log_q_K, log_p_K = log_q.gather(1, ids), log_p.gather(1, ids)
    q_K, mass = log_q_K.exp(), log_q_K.exp().sum(-1)
    if objective.student_log_prob_min is not None:
        log_p_K = torch.maximum(log_p_K, torch.full_like(log_p_K, objective.student_log_prob_min))
    if objective.tail == "bucket":
        inside = (q_K * (log_q_K - log_p_K)).sum(-1)
        outside = log_q.exp().sum(-1) - mass
        return inside + outside * (outside.log() - (1 - log_p_K.exp().sum(-1)).log()), mass
    if objective.renormalize in ("teacher", "both"):
        log_q_K = log_q_K - mass.log()[:, None]
    if objective.renormalize == "both":
        log_p_K = log_p_K - log_p_K.exp().sum(-1).log()[:, None]
    return (log_q_K.exp() * (log_q_K - log_p_K)).sum(-1), mass


def _sampled(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    log_p_x: torch.Tensor,
    log_q_x: torch.Tensor,
    objective: Objective,
    uniforms: torch.Tensor | None,
    facts: dict[str, torch.Tensor],
) -> torch.Tensor:
    R = (log_q_x - log_p_x).detach()
    u = torch.zeros_like(R) if uniforms is None else uniforms.double()
    acceptance = R.exp().clamp(max=1)
    M = {
        "none": lambda: torch.ones_like(R),
        "reject": lambda: torch.zeros_like(R),
        "static": lambda: 1.0 - (objective.tau >= R).double(),
        "soft": lambda: acceptance,
        "bernoulli": lambda: (u < acceptance).double(),
    }[objective.gate]()
    kl, facts["mass"] = _top_k_kl(log_p, log_q, objective)
    facts["kl"], facts["M"] = kl.detach(), M
    outlier = {
        "fkl": kl if objective.fkl_as == "loss" else kl.detach() * log_p_x,
        "mask": torch.zeros_like(R),
        "clip": -torch.clamp(R, min=objective.tau) * log_p_x,
    }[objective.outlier]
    return M * (-R * log_p_x) + (1 - M) * outlier
