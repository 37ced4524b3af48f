"""Prefix schedules by hand, and the requests of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_tropd.answers import AnswerHeader, AnswerStore, AnswerWriter
from megatron_tropd.guidance import build_requests, expected_length, max_prefix_length, prefix_length
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.types import RolloutRequest

PROMPTS = [Prompt(name, f"{name}=", (10 + index, 13), "") for index, name in enumerate("ab")]
ANSWERS: dict[str, list[tuple[int, ...]]] = {"a": [(5, 6, 7, 1)], "b": [(8, 1), (9, 9, 9, 9, 9, 9)]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AnswerStore:
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    with AnswerWriter(path, AnswerHeader("f" * 64, {}, {})) as writer:
        for prompt in PROMPTS:
            for tokens in ANSWERS[prompt.id]:
                writer.write(prompt, tokens, finished=tokens[-1] == 1)
    return AnswerStore.read(path, "f" * 64, 14)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # L = 100 and S = 4, so t = 0, 1/4, 1/2, 3/4, 1.
    [
        # 50 (1 + cos(pi t)): cos = 1, .7071, 0, -.7071, -1 -> 100, 85.36, 50, 14.64, 0.
        ("half-cosine", [100, 85, 50, 15, 0]),
        # 100 cos(pi t / 2): cos = 1, .9239, .7071, .3827, 0 -> 100, 92.39, 70.71, 38.27, 0.
        ("quarter-cosine", [100, 92, 71, 38, 0]),
        ("linear", [100, 75, 50, 25, 0]),
        # 101^(1-t) - 1: 101^(3/4) = 31.86, 101^(1/2) = 10.05, 101^(1/4) = 3.170 -> 100, 30.86, 9.05, 2.17, 0.
        ("exponential", [100, 31, 9, 2, 0]),
        ("constant", [100] * 5),
        ("none", [0] * 5),
    ],
)
def test_schedules_by_hand(schedule: Any, expected: list[int]) -> None:
    assert [max_prefix_length(schedule, step, 4, 100) for step in range(5)] == expected


def test_halves_round_up() -> None:
    # Linear, L = 5, t = 1/2: 2.5 -> 3. L = 1, t = 1/2 under half-cosine: 0.5 -> 1.
    assert max_prefix_length("linear", 1, 2, 5) == 3
    assert max_prefix_length("half-cosine", 1, 2, 1) == 1


@pytest.mark.parametrize("schedule", ["half-cosine", "quarter-cosine", "linear", "exponential"])
def test_schedules_fall_from_the_longest_prefix_to_none(schedule: Any) -> None:
    lengths = [max_prefix_length(schedule, step, 200, 8192) for step in range(201)]
    assert lengths[0] == 8192 and lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)
    assert [max_prefix_length(schedule, step, 200, 0) for step in (0, 100, 200)] == [0, 0, 0]


def test_schedule_refusals() -> None:
    with pytest.raises(ValueError, match="guidance.schedule 'cosine' is unknown: one of none, half-cosine"):
        max_prefix_length("cosine", 0, 4, 100)  # type: ignore[arg-type]
    for step, total_steps in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=rf"step {step} is not in \[0, {total_steps}\]"):
            max_prefix_length("linear", step, total_steps, 100)


def test_prefix_lengths() -> None:
    assert prefix_length(10, 4) == 4 and prefix_length(3, 4) == 3 and prefix_length(10, 0) == 0
    # Uniform over 0..4: the limit is floor(5 u); an answer of 3 cuts 4 to 3.
    for uniform, expected in ((0.0, 0), (0.19, 0), (0.2, 1), (0.7, 3), (0.99, 3)):
        assert prefix_length(3, 4, "uniform", uniform) == expected
    assert prefix_length(10, 4, "uniform", 1 - 2**-24) == 4
    # Two tokens are left to the student: of 5, at most 3; of 2 or 1, none.
    lengths = [prefix_length(n, 4, min_on_policy_tokens=2) for n in (10, 5, 3, 2, 1, 0)]
    assert lengths == [4, 3, 1, 0, 0, 0]


def test_requests_of_a_step(store: AnswerStore) -> None:
    requests = build_requests(PROMPTS, first_sample_id=12, samples_per_prompt=2, seed=0, store=store, max_length=3)
    # Two prompts of two samples: a global batch of 4, so the fourth has the sample ids 12 to 15.
    assert [request.sample_id for request in requests] == [12, 13, 14, 15]
    assert [request.prompt.id for request in requests] == ["a", "a", "b", "b"]
    # a's only answer cut to 3; b's first is two tokens, its end token among them; b's second is cut to 3.
    assert [request.prefix for request in requests] == [(5, 6, 7), (5, 6, 7), (8, 1), (9, 9, 9)]
    capped = build_requests(
        PROMPTS, first_sample_id=12, samples_per_prompt=2, seed=0, store=store, max_length=6, min_on_policy_tokens=1
    )
    assert [request.prefix for request in capped] == [(5, 6, 7), (5, 6, 7), (8,), (9,) * 5]
    for options in ({"max_length": 0, "store": store}, {"max_length": 3, "store": None}):
        plain = build_requests(PROMPTS, first_sample_id=0, samples_per_prompt=1, seed=0, **options)  # type: ignore[arg-type]
        assert [request.prefix for request in plain] == [()] * 2


def test_a_fraction_of_the_samples_gets_a_prefix(store: AnswerStore) -> None:
    num_samples = 4000

    def guided(fraction: float, seed: int = 0) -> set[int]:
        requests = build_requests(
            PROMPTS,
            first_sample_id=4000,
            samples_per_prompt=2000,
            seed=seed,
            store=store,
            max_length=3,
            fraction=fraction,
        )
        return {request.sample_id for request in requests if request.prefix}

    assert len(guided(0.0)) == 0 and len(guided(1.0)) == num_samples
    # 4000 Bernoulli draws: the standard deviation of their share is sqrt(p (1 - p) / 4000).
    for fraction in (0.3, 0.6):
        deviation = math.sqrt(fraction * (1 - fraction) / num_samples)
        assert abs(len(guided(fraction)) / num_samples - fraction) < 4 * deviation
    assert guided(0.3) < guided(0.6)
    assert guided(0.3) == guided(0.3) != guided(0.3, seed=1)


def test_uniform_prefix_lengths_are_drawn_for_each_sample(store: AnswerStore) -> None:
    requests = build_requests(
        [PROMPTS[1]],
        first_sample_id=0,
        samples_per_prompt=4000,
        seed=0,
        store=store,
        max_length=4,
        draw="uniform",
    )
    # Odd samples continue b's six tokens with 0 to 4 of them, each 1/5 of 2000 times: sd sqrt(320) = 18.
    lengths = [len(request.prefix) for request in requests[1::2]]
    assert all(abs(lengths.count(length) - 400) < 4 * 18 for length in range(5))
    assert max(lengths) == 4


def test_a_prompt_the_store_does_not_answer_is_refused(store: AnswerStore) -> None:
    unknown = Prompt("e", "e=", (4,), "")
    with pytest.raises(DataError, match="no teacher answer for prompt 'e'"):
        build_requests([unknown], first_sample_id=0, samples_per_prompt=1, seed=0, store=store, max_length=3)
    assert build_requests([unknown], first_sample_id=0, samples_per_prompt=1, seed=0, store=store, max_length=0)


def test_a_response_is_expected_to_end_where_the_teachers_does(store: AnswerStore) -> None:
    # Prompt b; its samples 0 and 2 have the teacher's answer 8 1, sample 1 one of six tokens.
    first, second, third = build_requests([PROMPTS[1]], first_sample_id=6, samples_per_prompt=3, seed=0)

    def expected(request: RolloutRequest, **options: Any) -> int:
        defaults = {"samples_per_prompt": 3, "max_response_length": 9, "store": store}
        return expected_length(request, **(defaults | options)) - len(request.prompt.tokens)

    assert [expected(request) for request in (first, second, third)] == [2, 6, 2]
    assert expected(replace(second, prefix=(9, 9), earlier=(9,))) == 6  # three of the six are left
    assert expected(replace(second, prefix=(9, 9), earlier=(9,)), max_new_tokens=2) == 3 + 2
    assert expected(replace(first, earlier=(8, 8))) == 9  # longer than the teacher's: it may go on to the budget
    assert expected(first, store=None) == 9 and expected(first, store=None, max_new_tokens=4) == 4
    assert expected(second, max_response_length=5) == 5
