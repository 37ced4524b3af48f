"""pass@k against its definition, intervals against formulas and against what they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_tropd.estimators import Sample, mean_interval, pass_at_k, share_interval, summarize, wilson_interval


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 1, 2), (5, 0, 3), (5, 5, 1), (6, 2, 5), (7, 3, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(num_samples: int, num_correct: int, k: int) -> None:
    subsets = list(itertools.combinations(range(num_samples), k))
    expected = sum(min(subset) < num_correct for subset in subsets) / len(subsets)
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("arguments", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_of_what_does_not_exist_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        pass_at_k(*arguments)


def test_wilson_interval() -> None:
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))
    # R: prop.test(50, 100, correct = FALSE)
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_share_interval_is_wilsons_where_one_prompt_is_one_trial() -> None:
    assert share_interval([1, 1, 1, 0, 0]) == pytest.approx(wilson_interval(3, 5))
    # Eight samples of a prompt that always agree are one sample.
    assert share_interval([1.0, 1.0, 1.0, 0.0, 0.0], 8) == pytest.approx(wilson_interval(3, 5))
    assert share_interval([0.0] * 5, 8) == wilson_interval(0, 5)
    # Prompts that are all alike: samples are the trials.
    assert share_interval([0.5] * 5, 8) == pytest.approx(wilson_interval(20, 40))


def test_mean_interval() -> None:
    # Mean 4, variance 20/3 over four: half-width 1.96 sqrt(20/12).
    assert mean_interval([1, 3, 5, 7]) == pytest.approx((4 - 2.53031, 4 + 2.53031), abs=1e-4)
    assert mean_interval([3]) == (-np.inf, np.inf)


@pytest.mark.parametrize("concentration", [0.3, 2.0, 1000.0])
@pytest.mark.parametrize("accuracy", [0.05, 0.3, 0.9])
def test_share_interval_covers_the_truth_as_often_as_it_says(accuracy: float, concentration: float) -> None:
    """Prompts of beta-distributed difficulty, 8 samples of each of 60: treating samples as independent would not."""
    generator = np.random.default_rng(0)
    hits = naive = 0
    trials = 1000
    for _ in range(trials):
        difficulty = generator.beta(accuracy * concentration, (1 - accuracy) * concentration, 60)
        right = generator.binomial(8, difficulty)
        low, high = share_interval(list(right / 8), 8)
        hits += low <= accuracy <= high
        low, high = wilson_interval(right.sum(), 8 * 60)
        naive += low <= accuracy <= high
    # 1000 trials: standard error 0.008. With about three prompts solved at all (the first case) it is 0.92.
    assert hits / trials >= 0.91
    assert concentration > 1 or naive / trials < 0.8


def _samples(pattern: list[str]) -> list[Sample]:
    blank = Sample("", 0, "", "", "", "", 0.0, 0, True)
    return [
        replace(
            blank, id=str(index), sample=sample, score=float(mark == "+"), num_tokens=index + 1, finished=index != 1
        )
        for index, marks in enumerate(pattern)
        for sample, mark in enumerate(marks)
    ]


def test_summary_of_two_prompts() -> None:
    found = summarize(_samples(["+---", "++++"]), [1, 2])
    assert (found["num_prompts"], found["num_samples"], found["accuracy"]) == (2, 4, 5 / 8)
    assert found["pass_at_1"] == found["accuracy"] and found["pass_at_2"] == (0.5 + 1.0) / 2
    assert found["truncation_rate"] == 0.5 and found["mean_response_length"] == 1.5
    assert (found["accuracy_low"], found["accuracy_high"]) == share_interval([0.25, 1.0], 4)
    assert found["mean_response_length_low"] < 1.5 < found["mean_response_length_high"]
    assert "mean_response_length_low" not in summarize(_samples(["+-"]))


@pytest.mark.parametrize("pattern", [[], ["++", "+"]])
def test_uneven_samples_are_refused(pattern: list[str]) -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        summarize(_samples(pattern))
