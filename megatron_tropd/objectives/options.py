"""What an objective is made of: one frozen dataclass that the maths and the vocabulary passes read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

ExactDivergence = Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "gated_kl"]
"""Terms over the full vocabulary; ``gated_kl`` is the reverse KL of trusted tokens, the forward KL of the others."""
OnPolicy = Literal["sampled", "asymmetric", "proximal", "entropy", "mixture", "top_k_reverse_kl", "none"]
"""Terms on the sampled token and on the teacher's top-k, and no term at all."""


@dataclass(frozen=True)
class Objective:
    """What every token contributes. Make one with `presets.preset`, which checks names and combinations."""

    name: str
    """The preset this came from."""
    on_policy: OnPolicy | ExactDivergence = "sampled"
    """Trusted on-policy tokens. sampled: K1 on R. asymmetric: K1 where R > 0, else the top-k forward KL. proximal: K1
    on the mixture's reward. entropy: K1, plus the top-k forward KL where the teacher is uncertain. mixture: the top-k
    form of the JSD. top_k_reverse_kl: the generalised top-k reverse KL. Else an exact divergence, or nothing."""
    gate: Literal["bernoulli", "static", "soft", "none", "reject"] = "none"
    """Which tokens are trusted: M ~ Bernoulli(min(rho, 1)); R > tau; the weight min(rho, 1); all of them; none."""
    outlier: Literal["fkl", "mask", "clip"] = "fkl"
    """What the others contribute: forward KL (top-k; full vocabulary under gated_kl); nothing; K1 on max(R, tau)."""
    tau: float = -1.72
    """Nats; threshold of the static gate and floor of clip. The paper gives none: this is REOPOLD's at l = 0.3."""
    top_k: int = 64
    """Teacher ids in a top-k term."""
    renormalize: Literal["none", "teacher", "both"] = "none"
    """Whose mass over the top-k ids is scaled to 1; none: the KL may be negative at a token and is not clamped."""
    tail: Literal["none", "bucket"] = "none"
    """bucket: the mass outside the top-k enters the forward KL as one extra event."""
    student_log_prob_min: float | None = None
    """Floor of the student's log-probs in the top-k forward KL (no gradient below it); None: no floor."""
    fkl_as: Literal["loss", "reward"] = "loss"
    """reward: -FKL becomes a detached advantage on log pi_S(x): shows the collapse the paper reports."""
    guidance_beta: float = 0.001
    """Coefficient of the guidance term on teacher-written tokens."""
    guidance_loss: Literal["nll", "forward_kl", "divergence"] = "nll"
    """Guidance term: -log pi_S(x); under gated_kl the full-vocabulary forward KL, its expectation over x ~ pi_T up to a
    constant; under another exact divergence that divergence, as on the student's own tokens."""
    jsd_beta: float = 0.5
    """Teacher's weight in the mixture of the generalised JSD, exact or over the top-k."""
    proximal_alpha: float = 0.2
    """Teacher's weight in the mixture of proximal."""
    entropy_alpha: float = 1.0
    """Coefficient of the added forward KL of entropy."""
    entropy_tau: float = 0.8
    """Nats; entropy adds its forward KL where H(pi_T) is above this."""
    skew: float = 0.1
    """a, the weight of the divergence's first argument in the mixture of the skew KLs."""

    task_reward: float = 0.0
    """Coefficient of the verifier's verdict: the advantage of every on-policy token of a sample that is right, less the
    mean over the samples of its prompt, adds to what the teacher says."""
    importance_cap: float | None = None
    """Weights on-policy tokens by min(pi_trainer(x) / pi_engine(x), cap), detached: corrects for an engine that sampled
    from other probabilities than the trainer has. None: every weight is 1."""
    clip_ratio_low: float | None = None
    """With clip_ratio_high: terms on the sampled token take r = pi_trainer(x) / pi_engine(x), as PPO does, and no
    gradient where r is already below 1 - clip_ratio_low and the advantage negative, or above 1 + clip_ratio_high and
    the advantage positive. For rollouts that are older than the weights. None: r is taken as 1."""
    clip_ratio_high: float | None = None
    """See clip_ratio_low."""
    entropy_share: float = 1.0
    """Share of the global batch's on-policy tokens that are learned from: those where the student's entropy is
    highest. The loss is divided by these tokens."""
    switch: float = 0.0
    """Share of the training before which outliers are masked and entropy_share does not act yet."""

    def at(self, progress: float) -> Objective:
        """The objective in force after the share ``progress`` of the training."""
        return replace(self, outlier="mask", entropy_share=1.0) if progress < self.switch else self

    @property
    def exact_divergence(self) -> ExactDivergence | None:
        """The full-vocabulary term, if any."""
        return next((kind for kind in get_args(ExactDivergence) if kind == self.on_policy), None)

    @property
    def has_gate(self) -> bool:
        """Whether ``gate`` and ``outlier`` act."""
        return self.on_policy in ("sampled", "asymmetric", "gated_kl")

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the loss of an on-policy token has a term on its sampled token alone."""
        exact = self.exact_divergence is not None or self.on_policy in ("none", "top_k_reverse_kl")
        return self.task_reward > 0 or not (exact or (self.gate == "reject" and self.fkl_as == "loss"))

    @property
    def clips_ratio(self) -> bool:
        """Whether the terms on the sampled token take PPO's clipped ratio."""
        return self.clip_ratio_low is not None

    @property
    def needs_engine_log_probs(self) -> bool:
        """Whether the loss reads what the engine sampled the tokens with."""
        return self.clips_ratio or self.importance_cap is not None

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return self.on_policy != "none"

    @property
    def needs_top_k(self) -> bool:
        """Whether some on-policy token may take a top-k term."""
        if self.on_policy == "sampled":
            return self.gate != "none" and self.outlier == "fkl"
        return self.on_policy in ("asymmetric", "entropy", "mixture", "top_k_reverse_kl")

    @property
    def few_need_top_k(self) -> bool:
        """Whether the top-k is for outliers of a hard gate alone: few tokens, known only after the statistics."""
        return self.needs_top_k and self.on_policy == "sampled" and self.gate in ("bernoulli", "static")

    @property
    def needs_pair(self) -> bool:
        """Whether the loss reads full-vocabulary entropies or KLs, the 8-float form of the statistics."""
        return self.on_policy in ("entropy", "reverse_kl", "forward_kl", "gated_kl")

    @property
    def needs_uniforms(self) -> bool:
        """Whether the gate is drawn."""
        return self.gate == "bernoulli"

    @property
    def mixture_weight(self) -> float:
        """w, the teacher's weight in the mixture m = w pi_T + (1 - w) pi_S of the terms that have one."""
        weights = {
            "proximal": self.proximal_alpha,
            "skew_forward_kl": self.skew,
            "skew_reverse_kl": 1 - self.skew,
        }
        return weights.get(self.on_policy, self.jsd_beta)
