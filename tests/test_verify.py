"""Verifiers on responses as models write them; what must not pass; what takes too long."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from time import monotonic

import pytest

from megatron_tropd.sandbox import Limits
from megatron_tropd.verify import VerifierOptions, check_task, verify
from megatron_tropd.verify.extract import final_answer, last_number
from megatron_tropd.verify.maths import MathVerifier


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1} or rather \boxed{2", "1"),  # cut off
        (r"\boxed{a \boxed{b}}", "b"),
        ("<answer> 7 </answer> bye", "7"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        ("5+3=8\n8-1=7\n#### 7\n", "7"),
        ("nothing marked: 7", ""),
        ("", ""),
    ],
)
def test_final_answer(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42), ("x = -3.50.", Fraction(-7, 2)), ("10-3", 3), ("= -3", -3), ("$1,234,567", 1234567), ("1,2", 2),
        ("3/4", Fraction(3, 4)), ("2e3", 2000), ("a1e999999999", 999999999), ("\u22125", -5), ("none", None),
        ("9" * 2000, None), ("1/0", 0),
    ],
)  # fmt: skip
def test_last_number(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("verifier", "response", "answer", "correct"),
    [
        ("exact", " 91\n", "91", True),
        ("exact", "910", "91", False),
        ("exact", "", "", False),
        ("number", "12 apples and 30 pears make 42 fruits.", "42.0", True),
        ("number", r"\boxed{42}, which is 2 more than 40", "42", True),
        ("number", "42 or 43", "42", False),
        ("number", "I do not know", "0", False),
        ("math", r"Therefore $x = \boxed{\frac{2}{4}}$.", "0.5", True),
        ("math", r"\boxed{1 + x^2}", "$x^2+1$", True),
        ("math", r"\boxed{(1, 2)}", "(2, 1)", False),
        ("math", r"\boxed{\{1, 2\}}", r"\{2, 1\}", True),
        ("math", "It is 204.", "204", True),
        ("math", "", "204", False),
        ("math", r"\boxed{\frac{}{}}}", "204", False),
        ("choice", "B", "B", True),
        ("choice", "(b).", "B", True),
        ("choice", "A is tempting, but the answer is (C).", "C", True),
        ("choice", r"\boxed{\text{D}}", "D", True),
        ("choice", "**Answer: B**", "B", True),
        ("choice", "Answer: A. No, Answer: B", "A", False),
        ("choice", "the answer is Z", "Z", False),  # of four
        ("choice", "A dog", "A", False),
    ],
)
def test_verdicts(verifier: str, response: str, answer: str, correct: bool) -> None:
    details = {"num_choices": 4} if verifier == "choice" else {}
    assert verify(verifier, response, answer, details).correct is correct


TESTS = "assert double(2) == 4\nassert double(-1) == -2"


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("Try\n```python\ndef double(x): return x * x\n```\nor\n```python\ndef double(x): return 2 * x\n```", True),
        ("def double(x):\n    return x + x", True),
        ("```\ndef double(x): return 2 * x", True),
        ("```python\ndef double(x): return x * x\n```", False),
        ("import os\nos._exit(0)", False),  # ends well before the tests
        ("def double(x):\n    while True: pass", False),
        ("def double(x): return [0] * 10**10", False),
        ("no program at all", False),
    ],
)  # fmt: skip
def test_programs(response: str, correct: bool) -> None:
    options = VerifierOptions(Limits(cpu_seconds=2, wall_seconds=2))
    started = monotonic()
    assert verify("python", response, "", {"tests": TESTS}, options).correct is correct
    assert monotonic() - started < 20


@pytest.mark.parametrize(
    ("verifier", "answer", "details", "problem"),
    [
        ("exact", " ", {}, "no reference answer"),
        ("number", "many", {}, "'many' is not a number"),
        ("math", "", {}, "is not LaTeX"),
        ("choice", "E", {"num_choices": 4}, "'E' is not one of the letters A to D"),
        ("python", "", {}, 'it has no "tests"'),
        ("poetry", "", {}, "'poetry' is unknown: exact, number, math, choice, python, reasoning-gym"),
    ],
)
def test_tasks_that_cannot_be_verified_say_why(verifier: str, answer: str, details: dict, problem: str) -> None:
    assert problem in check_task(verifier, answer, details)


def test_tasks_that_can_be_verified() -> None:
    for verifier, answer, details in [
        ("exact", "91", {}), ("number", "1,000", {}), ("math", r"\frac{\pi}{2}", {}),
        ("choice", "d", {"num_choices": 4}), ("python", "", {"tests": TESTS}),
    ]:  # fmt: skip
        assert check_task(verifier, answer, details) == "", verifier


def test_mathematics_that_never_ends_is_wrong_and_the_next_is_judged_again() -> None:
    math = MathVerifier(seconds=1.0, memory_bytes=2**30)
    assert math(r"\boxed{7}", "7") == (True, "7")
    started = monotonic()
    for bomb in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2^{2^{50}}}", r"\boxed{100000000!}", r"\boxed{" + "(" * 3000 + "}"):
        assert not math(bomb, "7")[0]
    assert monotonic() - started < 60
    assert math(r"\boxed{7}", "7") == (True, "7")
    math.worker.close()


def test_verifiers_load_no_torch() -> None:
    program = "import sys, megatron_tropd.verify, megatron_tropd.estimators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
