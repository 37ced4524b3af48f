"""reasoning-gym's tasks: determined by (seed, index), held-out apart from training, scored safely."""

from __future__ import annotations

import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data import procedural_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.procedural import make_tasks
from megatron_tropd.tokenizer import CharacterTokenizer
from megatron_tropd.verify import check_task, verify
from megatron_tropd.verify.extract import final_answer
from megatron_tropd.verify.reasoning import is_safe, reasoning_score
from tests.ranks import run_ranks
from tests.test_run import MODEL, config_file, data  # noqa: F401

pytest.importorskip("reasoning_gym")

KINDS: dict[str, dict[str, Any]] = {"chain_sum": {"max_terms": 4}, "gcd": {}, "gsm_symbolic": {}, "countdown": {}}
SMALL = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
SIZES: dict[str, Any] = {"seed": 3, "level": None, "num_train": 200, "num_validation": 40}


def test_tasks_are_a_function_of_seed_and_index() -> None:
    first = make_tasks(KINDS, "train", **SIZES)
    assert first == make_tasks(KINDS, "train", **SIZES)
    assert first[:50] == make_tasks(KINDS, "train", **{**SIZES, "num_train": 50})
    assert first[0].question != make_tasks(KINDS, "train", **{**SIZES, "seed": 4})[0].question
    assert [task.name for task in first[:8]] == [*KINDS] * 2


def test_held_out_questions_differ_and_are_never_trained_on() -> None:
    # Two one-digit terms: 180 questions, 100 of them held out, so most draws repeat one.
    sizes = {**SIZES, "num_validation": 100, "num_train": 300}
    held_out = make_tasks(SMALL, "validation", **sizes)
    trained = make_tasks(SMALL, "train", **sizes)
    questions = {task.question for task in held_out}
    assert len(questions) == len(held_out) == 100 and len(trained) == 300
    assert not questions & {task.question for task in trained}


def test_too_few_questions_are_refused_with_the_fix() -> None:
    with pytest.raises(DataError, match=r"of 400 held-out tasks .* lower tasks.num_validation"):
        make_tasks(SMALL, "validation", **{**SIZES, "num_validation": 400})


def test_levels_make_tasks_harder() -> None:
    lengths = [
        sum(len(task.question) for task in make_tasks({"chain_sum": {}}, "train", **{**SIZES, "level": level}))
        for level in (0, 3)
    ]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    ("kinds", "level", "message"),
    [
        ({"chainsum": {}}, None, "no task 'chainsum'; did you mean 'chain_sum'"),
        ({"chain_sum": {"terms": 3}}, None, "tasks.kinds.chain_sum: reasoning-gym refuses {'terms': 3}"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 2}}, None, "reasoning-gym refuses"),
        ({"gsm_symbolic": {}}, 1, "gsm_symbolic has no levels"),
    ],
)
def test_wrong_kinds_are_refused(kinds: Any, level: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_tasks(kinds, "train", **{**SIZES, "level": level})


def _prompts() -> list[Any]:
    tokenizer = CharacterTokenizer(string.printable + "•×÷≈–£€")
    tasks = make_tasks(KINDS, "validation", **SIZES)
    source = {"kinds": KINDS, "seed": 3, "level": None}
    return procedural_prompts(tasks, tokenizer, 4000, "refuse", source=source)[0]


def test_reference_answers_and_scratchpads_score_1_and_others_do_not() -> None:
    prompts = _prompts()
    ids = {prompt.id for prompt in prompts}
    assert len(ids) == len(prompts) == 40
    for prompt in prompts:
        assert not check_task(prompt.verifier, prompt.answer, prompt.details)
        assert verify(prompt.verifier, prompt.answer, prompt.answer, prompt.details).score == 1.0, prompt
        assert not verify(prompt.verifier, f"#### {prompt.answer}7", prompt.answer, prompt.details).correct
        if prompt.solution:
            assert final_answer(prompt.solution) == prompt.answer
            assert verify(prompt.verifier, prompt.solution, prompt.answer, prompt.details).correct
    with_steps = Counter(prompt.details["task"] for prompt in prompts if prompt.solution)
    assert with_steps == {"chain_sum": 10, "gcd": 10, "gsm_symbolic": 10}
    countdown = next(prompt for prompt in prompts if prompt.details["task"] == "countdown")
    reordered = f" ( {countdown.answer} ) "
    assert verify(countdown.verifier, reordered, "", countdown.details).correct


def test_every_line_of_a_scratchpad_is_true() -> None:
    for prompt in _prompts():
        if prompt.details["task"] in ("chain_sum", "gcd"):
            *steps, last = prompt.solution.splitlines()
            for step in steps:
                left, right = step.split("=")
                assert eval(left) == int(right), step
            assert last == f"#### {prompt.answer}"


@pytest.mark.parametrize(
    ("task", "answer", "safe"),
    [
        ("countdown", "94*4 - 61 - 6", True),
        ("simple_integration", "x**3/3 + sin(2*x)*exp(x) + C", True),
        ("simple_integration", "2*(x + 1)", True),
        ("countdown", "exit()", False),
        ("countdown", "open('x', 'w')", False),
        ("countdown", "x.__class__", False),
        ("countdown", "(1).real", False),
        ("countdown", "eval(chr(49))", False),
        ("countdown", "(eval)(1)", False),
        ("n_queens", "_ _ Q _\nQ _ _ _", True),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", True),
        ("n_queens", "[exit()]", False),
        ("spiral_matrix", "1 2 3", True),
        ("chain_sum", "exit()", True),  # compared as text
    ],
)
def test_answers_that_would_run_as_programs_are_not_handed_on(task: str, answer: str, safe: bool) -> None:
    assert is_safe(task, answer) is safe


def test_a_power_that_never_ends_scores_0() -> None:
    details = {"task": "countdown", "options": {}, "seed": 3, "level": None, "index": 0}
    assert reasoning_score("9**9**9**9**9", details)[0] == 0.0


def _train(path: str) -> None:
    from megatron_tropd.config_parser import load_config
    from megatron_tropd.trainer import sft

    sft(load_config(path))


def test_a_run_on_procedural_tasks(tmp_path: Path, data: Path) -> None:  # noqa: F811
    path = config_file(
        tmp_path,
        data,
        student=MODEL,
        tasks={"kinds": {"chain_sum": {"min_terms": 2, "max_terms": 3, "max_digits": 2}}, "num_validation": 8},
        data={"train": "reasoning-gym:train", "validation": "reasoning-gym:validation", "max_prompt_length": 100},
        rollout={"max_response_length": 40},
        tokenizer={"alphabet": string.printable},
        training={"train_iters": 2},
    )
    run_ranks(1, _train, str(path), timeout=120, init_process_group=False)
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"num_prompts": 8' in last and '"accuracy"' in last
