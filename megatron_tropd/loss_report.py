"""What the loss tells about each token: detached tensors for metrics, never part of the gradient.

Shape suffix: ``T`` tokens (those given to the loss, in their order).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, eq=False)
class LossReport(Mapping[str, torch.Tensor]):
    """Detached fp32 ``[T]`` tensors in nats (or weights in [0, 1]), the same bits on every rank of the group.

    Read ``report.reward`` or ``report["reward"]``; iterating gives the names of the tensors that are present. Every
    tensor is 0 at tokens of region NONE. The weights ``trust`` and ``outlier`` are 0 at guidance tokens too, so
    ``outlier.sum() / trust.add(outlier).sum()`` is the outlier share of the on-policy tokens.
    """

    student_log_prob: torch.Tensor
    """log pi_S(x) of the sampled (or teacher-written) token."""
    trust: torch.Tensor
    """M: 1 where the objective trusts the token, 0 where the outlier treatment acts; P_trust under the soft gate."""
    outlier: torch.Tensor
    """1 - M at on-policy tokens."""
    clipped: torch.Tensor | None = None
    """1 where PPO's clip takes the gradient of the terms on the sampled token away; None without a clipped ratio."""
    teacher_log_prob: torch.Tensor | None = None
    """log pi_T(x); this and all below are None without a teacher."""
    reward: torch.Tensor | None = None
    """R = log pi_T(x) - log pi_S(x)."""
    p_trust: torch.Tensor | None = None
    """min(pi_T(x) / pi_S(x), 1)."""
    teacher_top_k_mass: torch.Tensor | None = None
    """sum of pi_T over its top-k ids, at tokens whose top-k was needed; 0 elsewhere."""
    top_k_divergence: torch.Tensor | None = None
    """The objective's divergence over the top-k (the forward KL under `tropd`), where it was needed; 0 elsewhere."""
    student_entropy: torch.Tensor | None = None
    """H(pi_S); this and all below only with full statistics or where the objective computes them anyway."""
    teacher_entropy: torch.Tensor | None = None
    """H(pi_T)."""
    forward_kl: torch.Tensor | None = None
    """KL(pi_T || pi_S) over the whole shared vocabulary."""
    reverse_kl: torch.Tensor | None = None
    """KL(pi_S || pi_T) over the whole shared vocabulary."""
    jsd: torch.Tensor | None = None
    """Generalised Jensen-Shannon divergence, under `jsd-exact`."""

    def __getitem__(self, name: str) -> torch.Tensor:
        value = getattr(self, name) if name in {field.name for field in fields(self)} else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
