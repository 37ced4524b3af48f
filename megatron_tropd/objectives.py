"""Distillation objectives: pure per-token maths on log-probs, in nats. METHOD sections 1 and 2; arXiv 2606.01249.

Nothing here knows a vocabulary, a process group or a config tree. The functions take per-token tensors and return
per-token tensors; nobody here divides by a token count (the training step does). Gradients come from plain autograd
through ``student_log_probs``, the top-k log-probs and the exact divergence; everything else is a constant.

Shape suffixes: ``N`` tokens, ``O`` outlier tokens (rows of N whose top-k is needed), ``K`` top-k ids.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch

from megatron_tropd.types import TokenRegion


@dataclass(frozen=True)
class Objective:
    """What every token contributes. Make one with `preset`, which checks names and combinations."""

    name: str
    """The preset this came from."""
    on_policy: Literal["sampled", "reverse_kl", "forward_kl", "jsd", "none"] = "sampled"
    """On-policy tokens: K1 under a trust gate, an exact full-vocabulary divergence, or nothing."""
    gate: Literal["bernoulli", "static", "soft", "none", "reject"] = "none"
    """Which tokens K1 acts on: M ~ Bernoulli(min(rho, 1)); R > tau; the weight min(rho, 1); all of them; none."""
    outlier: Literal["fkl", "mask", "clip"] = "fkl"
    """What the others contribute: truncated forward KL; nothing; K1 with R replaced by max(R, tau)."""
    tau: float = -1.72
    """Nats; threshold of the static gate and floor of clip. The paper gives none: this is REOPOLD's at l = 0.3."""
    top_k: int = 64
    """Teacher ids in the truncated forward KL."""
    renormalize: Literal["none", "teacher", "both"] = "none"
    """Whose mass over the top-k ids is scaled to 1; none: the KL may be negative at a token and is not clamped."""
    tail: Literal["none", "bucket"] = "none"
    """bucket: the mass outside the top-k enters the forward KL as one extra event."""
    student_log_prob_min: float | None = None
    """Floor of the student's log-probs in the truncated forward KL (no gradient below it); None: no floor."""
    fkl_as: Literal["loss", "reward"] = "loss"
    """reward: -FKL becomes a detached advantage on log pi_S(x): shows the collapse the paper reports."""
    guidance_beta: float = 0.001
    """Coefficient of -log pi_S(x) on teacher-written tokens."""
    jsd_beta: float = 0.5
    """Teacher's weight in the mixture of the generalised JSD."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return self.on_policy != "none"

    @property
    def needs_top_k(self) -> bool:
        """Whether some on-policy token may take the truncated forward KL."""
        return self.on_policy == "sampled" and self.gate != "none" and self.outlier == "fkl"

    @property
    def needs_uniforms(self) -> bool:
        """Whether the gate is drawn."""
        return self.on_policy == "sampled" and self.gate == "bernoulli"

    @property
    def exact_divergence(self) -> Literal["reverse_kl", "forward_kl", "jsd"] | None:
        """The full-vocabulary divergence that on-policy tokens take, if any."""
        return None if self.on_policy == "sampled" or self.on_policy == "none" else self.on_policy


_PRESETS = {
    "tropd": Objective("tropd", gate="bernoulli"),
    "opd": Objective("opd"),
    "fkl": Objective("fkl", gate="reject"),
    "rkl-exact": Objective("rkl-exact", on_policy="reverse_kl"),
    "fkl-exact": Objective("fkl-exact", on_policy="forward_kl"),
    "jsd-exact": Objective("jsd-exact", on_policy="jsd"),
    "sft": Objective("sft", on_policy="none", guidance_beta=1.0),
}
_FIXED = ("name", "on_policy")


def preset(name: str, **overrides: Any) -> Objective:
    """A named objective of METHOD section 2, with options replaced.

    ``beta`` is METHOD's beta of that row: the mixing weight for ``jsd-exact``, the guidance coefficient for every
    other preset; ``jsd_beta`` and ``guidance_beta`` say the same by their own names. ``gate`` and ``outlier`` are
    refused where they could not act; parameters of a treatment in use elsewhere (``top_k``, ``tau``, ...) are
    accepted by every preset, so that one configuration can be run under several.

    Raises ValueError for unknown names, values out of range and combinations without meaning.
    """
    _check_name("objective", name, _PRESETS)
    base = _PRESETS[name]
    if "beta" in overrides:
        overrides = _expand_beta(base, overrides)
    options = [field.name for field in fields(Objective) if field.name not in _FIXED]
    for key in overrides:
        _check_name(f"option of objective {name!r}", key, [*options, "beta"])
    objective = replace(base, **overrides)
    _check_choices(objective)
    _check_numbers(objective)
    _check_combination(objective, overrides)
    return objective


def _expand_beta(base: Objective, overrides: dict[str, Any]) -> dict[str, Any]:
    field = "jsd_beta" if base.on_policy == "jsd" else "guidance_beta"
    if field in overrides:
        raise ValueError(f"objective {base.name!r}: beta and {field} are the same option here; give one of them")
    rest = {key: value for key, value in overrides.items() if key != "beta"}
    return {**rest, field: overrides["beta"]}


def _check_name(what: str, name: str, valid: Any) -> None:
    if name not in valid:
        near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what}: {name!r}; did you mean {near!r}? Valid: {', '.join(valid)}")


def _check_choices(objective: Objective) -> None:
    for key, hint in get_type_hints(Objective).items():
        choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
        if choices:
            _check_name(f"{key} of objective {objective.name!r}", getattr(objective, key), choices)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(objective: Objective) -> None:
    floor = objective.student_log_prob_min
    requirements = [
        ("top_k", isinstance(objective.top_k, int) and _is_number(objective.top_k) and objective.top_k >= 1,
         "an integer >= 1"),
        ("tau", _is_number(objective.tau), "a finite number of nats"),
        ("guidance_beta", _is_number(objective.guidance_beta) and objective.guidance_beta >= 0, "finite and >= 0"),
        ("jsd_beta", _is_number(objective.jsd_beta) and 0 < objective.jsd_beta < 1,
         "strictly between 0 and 1 (the limits are the presets 'rkl-exact' and 'fkl-exact')"),
        ("student_log_prob_min", floor is None or (_is_number(floor) and floor < 0), "None or a negative number"),
    ]  # fmt: skip
    for key, holds, wanted in requirements:
        if not holds:
            value = getattr(objective, key)
            raise ValueError(f"objective {objective.name!r}: {key} must be {wanted}, found {value!r}")


def _check_combination(objective: Objective, overrides: dict[str, Any]) -> None:
    name = objective.name
    if objective.on_policy != "sampled" and (given := [key for key in ("gate", "outlier") if key in overrides]):
        raise ValueError(f"objective {name!r} has no trust gate, so {given[0]} has no effect; use preset 'tropd'")
    if "outlier" in overrides and objective.gate == "none" and "gate" not in overrides:
        raise ValueError(f"objective {name!r} trusts every token, so outlier has no effect; give gate='static' too")
    if objective.gate == "reject" and objective.outlier == "mask":
        raise ValueError(f"objective {name!r}: gate 'reject' with outlier 'mask' leaves no loss; use outlier 'fkl'")
    if objective.tail == "bucket" and objective.renormalize != "none":
        raise ValueError(f"objective {name!r}: tail 'bucket' already sums to 1; use renormalize='none' with it")


def acceptance_probability(rewards_N: torch.Tensor) -> torch.Tensor:
    """P_trust = min(rho, 1) with R = log rho: speculative decoding's acceptance probability (METHOD 1)."""
    return rewards_N.clamp(max=0).exp()


def trust_weights(
    objective: Objective, rewards_N: torch.Tensor, on_policy_N: torch.Tensor, uniforms_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (M, 1 - M) of the K1 term and of the outlier treatment; both 0 where ``on_policy_N`` is False.

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


def token_losses(
    objective: Objective,
    *,
    regions_N: torch.Tensor,
    student_log_probs_N: torch.Tensor,
    rewards_N: torch.Tensor | None = None,
    trust_N: torch.Tensor | None = None,
    outlier_N: torch.Tensor | None = None,
    forward_kl_N: torch.Tensor | None = None,
    divergence_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of every token, ``[N]``, to be minimised; unreduced (METHOD 1, the table).

    ``student_log_probs_N`` is log pi_S(x); ``rewards_N`` R; ``trust_N`` and ``outlier_N`` from `trust_weights`;
    ``forward_kl_N`` the truncated forward KL where ``outlier_N`` is not 0 (read if ``objective.needs_top_k``);
    ``divergence_N`` the exact divergence (read if ``objective.exact_divergence``). Gradients flow to
    ``student_log_probs_N``, ``forward_kl_N`` and ``divergence_N``.
    """
    guidance_N = student_log_probs_N.where(regions_N == TokenRegion.GUIDANCE, 0)
    loss_N = -objective.guidance_beta * guidance_N
    if objective.on_policy == "sampled":
        assert rewards_N is not None and trust_N is not None and outlier_N is not None
        loss_N = loss_N + _policy_gradient(trust_N, rewards_N, student_log_probs_N)
        loss_N = loss_N + _outlier_losses(objective, outlier_N, rewards_N, student_log_probs_N, forward_kl_N)
    elif objective.on_policy != "none":
        assert divergence_N is not None
        loss_N = loss_N + divergence_N.where(regions_N == TokenRegion.ON_POLICY, 0)
    return loss_N


def _policy_gradient(weights_N: torch.Tensor, advantages_N: torch.Tensor, log_probs_N: torch.Tensor) -> torch.Tensor:
    """-weight * sg(advantage) * log pi_S(x); with advantage R this is K1 reverse KL (METHOD 1, "trust region")."""
    # A rejected token may have R = -inf: it is masked before the product, or 0 * inf = nan would reach the gradient.
    live = weights_N != 0
    return -weights_N * advantages_N.detach().where(live, 0) * log_probs_N.where(live, 0)


def _outlier_losses(
    objective: Objective,
    outlier_N: torch.Tensor,
    rewards_N: torch.Tensor,
    log_probs_N: torch.Tensor,
    forward_kl_N: torch.Tensor | None,
) -> torch.Tensor:
    if objective.gate == "none" or objective.outlier == "mask":
        return torch.zeros_like(rewards_N)
    if objective.outlier == "clip":
        return _policy_gradient(outlier_N, rewards_N.clamp(min=objective.tau), log_probs_N)
    assert forward_kl_N is not None
    if objective.fkl_as == "reward":
        return _policy_gradient(outlier_N, -forward_kl_N, log_probs_N)
    return outlier_N * forward_kl_N.where(outlier_N != 0, 0)
