"""Distillation objectives: pure per-token maths on log-probs, in nats. METHOD sections 1 and 2; arXiv 2606.01249.

`options` says what an objective is made of, `presets` names the published ones and refuses what means nothing,
`terms` computes. Nothing here knows a vocabulary, a process group or a config tree, and nobody here divides by a token
count (the training step does).
"""

from megatron_tropd.objectives.options import ExactDivergence, Objective
from megatron_tropd.objectives.presets import PRESETS, preset
from megatron_tropd.objectives.terms import (
    acceptance_probability,
    clipped_tokens,
    exact_kl_weights,
    k2,
    k3,
    policy_gains,
    token_losses,
    top_k_divergence,
    top_k_forward_kl,
    top_k_weights,
    trust_weights,
)

__all__ = [
    "ExactDivergence",
    "Objective",
    "PRESETS",
    "acceptance_probability",
    "clipped_tokens",
    "exact_kl_weights",
    "k2",
    "k3",
    "policy_gains",
    "preset",
    "token_losses",
    "top_k_divergence",
    "top_k_forward_kl",
    "top_k_weights",
    "trust_weights",
]
