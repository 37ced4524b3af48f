"""What n samples of each prompt say about a model: pass@k and 95 % confidence intervals. Imports no torch.

Samples of one prompt are alike, so prompts, not samples, are the independent observations: every interval here takes
one number per prompt, the mean over its samples (the cluster mean).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

Z_95 = 1.959964
"""97.5 % quantile of the normal distribution."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples of a prompt is right, from ``num_samples`` of them.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1. Its mean over prompts is pass@k. Worked
    example: n = 4, c = 1, k = 2 gives 1 - 3/6 = 0.5. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_correct} right among {num_samples} samples does not exist: 1 <= k <= samples is needed"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(num_successes: float, num_trials: float, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share; ``z`` is the normal quantile, by default that of 95 %.

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at 1.
    Worked example: 0 of 10 gives (0, z^2 / (10 + z^2)) = (0, 0.2775).
    """
    share = num_successes / num_trials
    scale = 1.0 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    half_width = z / scale * math.sqrt(share * (1.0 - share) / num_trials + z * z / (4 * num_trials**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def share_interval(shares: Sequence[float], num_samples: int = 1) -> tuple[float, float]:
    """95 % interval of the mean of one share in [0, 1] per prompt, each from ``num_samples`` samples.

    The Wilson interval at the effective number of trials p (1 - p) / v, v = sum (x_i - p)^2 / P^2 being the variance
    of the mean over P clusters (the design effect of survey statistics: Kish 1965; Dean and Pagano 2015). With one
    sample a prompt it is the Wilson interval itself; where samples of a prompt differ it is as narrow as they justify;
    with every prompt at 0 or every one at 1 it counts each prompt once. Never more trials than samples. Raises
    ValueError without a prompt.
    """
    if not shares:
        raise ValueError("an interval needs at least one prompt")
    mean = min(1.0, max(0.0, fmean(shares)))
    limit = mean * (1.0 - mean)
    spread = math.fsum((share - mean) ** 2 for share in shares) / len(shares)
    per_prompt = 1.0 if limit == 0.0 else float(num_samples) if spread * num_samples <= limit else limit / spread
    trials = len(shares) * per_prompt
    return wilson_interval(mean * trials, trials)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of one number per prompt: mean -+ 1.96 standard errors. One prompt gives (-inf, inf).

    Raises ValueError without a prompt.
    """
    if not values:
        raise ValueError("an interval needs at least one prompt")
    if len(values) == 1:
        return -math.inf, math.inf
    half_width = Z_95 * math.sqrt(variance(values) / len(values))
    return fmean(values) - half_width, fmean(values) + half_width


@dataclass(frozen=True)
class Sample:
    """One judged response: a line of ``<run>/evaluation/NAME.jsonl``."""

    id: str
    """The prompt's."""
    sample: int
    """Which of the prompt's responses, from 0."""
    prompt: str
    answer: str
    """The reference."""
    response: str
    extracted: str
    """What the verifier compared with the reference."""
    score: float
    """The verifier's, in [0, 1]; 1 is right."""
    num_tokens: int
    """Of the response, its end token included."""
    finished: bool
    """False where the token budget cut it off."""


def summarize(samples: Sequence[Sample], pass_at: Sequence[int] = ()) -> dict[str, float]:
    """What samples of several prompts, as many of each, come to.

    ``num_prompts``, ``num_samples`` (of each prompt), ``accuracy`` (share of right samples: accuracy@n), ``pass_at_K``
    for every K of ``pass_at``, ``truncation_rate`` and ``mean_response_length`` (tokens); each of the last four kinds
    with its 95 % interval in ``NAME_low`` and ``NAME_high``, which takes prompts as the independent observations
    (``share_interval``, ``mean_interval``). Of one prompt, the length has no interval. Raises ValueError without
    samples or where prompts differ in their number.
    """
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.id, []).append(sample)
    sizes = {len(group) for group in by_prompt.values()}
    if len(sizes) != 1:
        raise ValueError(f"every prompt needs the same number of samples, at least one; found {sorted(sizes)}")
    groups, num_samples = list(by_prompt.values()), sizes.pop()
    right = [sum(sample.score == 1.0 for sample in group) for group in groups]
    shares = {
        "accuracy": [count / num_samples for count in right],
        **{f"pass_at_{k}": [pass_at_k(num_samples, count, k) for count in right] for k in pass_at},
        "truncation_rate": [sum(not sample.finished for sample in group) / num_samples for group in groups],
    }
    lengths = [fmean(sample.num_tokens for sample in group) for group in groups]
    result: dict[str, float] = {"num_prompts": len(groups), "num_samples": num_samples}
    for name, values in shares.items():
        result |= _with_interval(name, fmean(values), share_interval(values, num_samples))
    return result | _with_interval("mean_response_length", fmean(lengths), mean_interval(lengths))


def _with_interval(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    bounds = {f"{name}_low": interval[0], f"{name}_high": interval[1]} if math.isfinite(interval[0]) else {}
    return {name: value, **bounds}
