"""From logits and uniforms to tokens: the sampling rule, apart from any engine.

Shape suffixes: ``B`` sequences, ``V`` the ids to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.determinism import is_deterministic


@dataclass(frozen=True)
class SamplingOptions:
    """How an engine samples, and how much at once. Raises ValueError where a number makes no sense."""

    vocab_size: int
    """Only ids below it take part, in sampling and in log-probs."""
    eos_id: int
    """Ends a response."""
    max_batch_size: int
    """Most sequences that are decoded at once."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """1 is off."""
    seed: int
    """Keys the draws."""
    with_entropies: bool = False
    """Record the entropy of the model at every sampled token."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0 or self.max_batch_size < 1:
            raise ValueError(
                f"cannot sample with temperature {self.temperature} (>= 0), top_p {self.top_p} (in (0, 1]), "
                f"max_batch_size {self.max_batch_size} (>= 1)"
            )

    def sample(
        self, logits_BV: torch.Tensor, uniforms_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens and log-probs by ``sample_tokens`` from logits over the padded vocabulary, and, if they are wanted,
        ``entropies``."""
        logits_BV = logits_BV[:, : self.vocab_size]
        tokens_B, log_probs_B = sample_tokens(logits_BV, uniforms_B, temperature=self.temperature, top_p=self.top_p)
        return tokens_B, log_probs_B, entropies(logits_BV) if self.with_entropies else None


def sample_tokens(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, *, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF, and its log-prob.

    ``logits_BV`` (any float dtype) cover exactly the ids to choose from; ``uniforms_B`` are in [0, 1).
    Returns ``tokens_B`` (int64) and ``log_probs_B`` (fp32 nats, at temperature 1 and over all of V whatever
    was sampled from: METHOD's pi). Temperature 0 is the argmax, the lowest id at a tie. ``top_p`` < 1 keeps
    the fewest most probable ids whose mass reaches it. An id of probability 0 is never drawn. Computed in
    float64, so that the running sum over a large vocabulary does not move the borders between ids.
    """
    logits_BV = logits_BV.double()
    if temperature == 0.0:
        tokens_B = logits_BV.argmax(dim=-1)
    else:
        probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
        if top_p < 1.0:
            probabilities_BV = _nucleus(probabilities_BV, top_p)
        cdf_BV = running_sum(probabilities_BV)
        mass_B1 = cdf_BV[:, -1:]
        # right=True: the first id whose running sum exceeds the threshold, hence an id of positive
        # probability. The clamp matters for rows that are not numbers alone; their log-prob tells.
        tokens_B1 = torch.searchsorted(cdf_BV, uniforms_B.double().unsqueeze(1) * mass_B1, right=True)
        tokens_B = tokens_B1.squeeze(1).clamp(max=cdf_BV.shape[1] - 1)
    log_probs_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - logits_BV.logsumexp(dim=-1)
    return tokens_B, log_probs_B.float()


def entropies(logits_BV: torch.Tensor) -> torch.Tensor:
    """fp32 ``[B]``, nats: of the distribution at temperature 1 over all of V. Computed in float64."""
    return torch.special.entr(torch.softmax(logits_BV.double(), dim=-1)).sum(dim=-1).float()


def running_sum(probabilities_BV: torch.Tensor) -> torch.Tensor:
    """``cumsum`` over the last dimension of float64 probabilities.

    In deterministic mode in units of 2^-60: torch has no deterministic cumsum of floats on GPUs, and one of integers.
    """
    if not is_deterministic():
        return probabilities_BV.cumsum(dim=-1)
    return (probabilities_BV * 2.0**60).long().cumsum(dim=-1).double() * 2.0**-60


def _nucleus(probabilities_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero the probabilities outside the smallest set of most probable ids with mass ``top_p``.

    Not renormalised.
    """
    descending_BV, ids_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    mass_before_BV = running_sum(descending_BV) - descending_BV
    return torch.zeros_like(probabilities_BV).scatter_(1, ids_BV, descending_BV * (mass_before_BV < top_p))
