"""From the name of a verifier to its verdict."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megatron_tropd.sandbox import Limits, has_namespaces, run_python
from megatron_tropd.verify.extract import choice_of, last_number, number_of, program_of
from megatron_tropd.verify.maths import MathVerifier, require_math_verify
from megatron_tropd.verify.reasoning import reasoning_score


@dataclass(frozen=True)
class VerifierOptions:
    """Limits on what a verifier runs."""

    limits: Limits = field(default_factory=Limits)
    """Of a program and its tests."""
    require_namespaces: bool = True
    """Refuse to run programs where the kernel offers no namespaces."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier found."""

    score: float
    """In [0, 1]; 1 is right."""
    extracted: str
    """What was compared with the reference; "" where the response has no such thing."""

    @property
    def correct(self) -> bool:
        """Whether the task is solved."""
        return self.score == 1.0


def verify(
    verifier: str,
    response: str,
    answer: str,
    details: Mapping[str, Any] | None = None,
    options: VerifierOptions | None = None,
) -> Verdict:
    """Judge ``response`` (text, without its end token) by the verifier of that name.

    ``answer`` is the reference; ``details`` what else the task gives: ``tests`` (python), ``num_choices`` (choice).
    A task that ``check_task`` refuses has no verdict: ask it first.
    """
    return VERIFIERS[verifier].judge(response, answer, details or {}, options or VerifierOptions())


def check_task(
    verifier: str, answer: str, details: Mapping[str, Any] | None = None, options: VerifierOptions | None = None
) -> str:
    """What makes a task impossible to verify, with the fix; "" if nothing does."""
    if verifier not in VERIFIERS:
        return f"verifier {verifier!r} is unknown: {', '.join(VERIFIERS)}"
    return VERIFIERS[verifier].problem(answer, details or {}, options or VerifierOptions())


@dataclass(frozen=True)
class _Verifier:
    judge: Callable[[str, str, Mapping[str, Any], VerifierOptions], Verdict]
    problem: Callable[[str, Mapping[str, Any], VerifierOptions], str]


def _judge_exact(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    text = response.strip()
    return Verdict(float(answer.strip() != "" and text == answer.strip()), text)


def _exact_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    return "" if answer.strip() else "it has no reference answer"


def _judge_number(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    found = number_of(response)
    return Verdict(float(found is not None and found == last_number(answer)), "" if found is None else str(found))


def _number_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    return "" if last_number(answer) is not None else f"its reference answer {answer!r} is not a number"


@cache
def _math_verifier() -> MathVerifier:
    return MathVerifier()


def _judge_math(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    correct, extracted = _math_verifier()(response, answer)
    return Verdict(float(correct), extracted)


def _math_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    require_math_verify()
    readable = answer.strip() and _math_verifier()(None, answer)[0]
    return "" if readable else f"its reference answer {answer!r} is not LaTeX that math-verify reads"


def _judge_choice(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    letter = choice_of(response, details.get("num_choices", 26))
    return Verdict(float(letter != "" and letter == answer.strip().upper()), letter)


def _choice_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    letters = [chr(ord("A") + index) for index in range(details.get("num_choices", 26))]
    if answer.strip().upper() in letters:
        return ""
    return f"its reference answer {answer!r} is not one of the letters {letters[0]} to {letters[-1]}"


def _judge_program(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    """Right if program and tests run to the last line, which prints a word that the program cannot know."""
    program, word = program_of(response), secrets.token_hex(16)
    outcome = run_python(
        f"{program}\n\n{details['tests']}\n\nprint({word!r})\n",
        options.limits,
        require_namespaces=options.require_namespaces,
    )
    passed = outcome.status == 0 and not outcome.stopped and outcome.output.rstrip("\n").endswith(word)
    return Verdict(float(passed), program)


def _program_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    if not str(details.get("tests", "")).strip():
        return 'it has no "tests", the Python statements that a right program passes'
    if options.require_namespaces and not has_namespaces():
        return (
            "running a model's programs needs user namespaces, which this machine does not allow: run in a container "
            "that allows `unshare --user`, or set evaluation.require_namespaces=false to leave network and files open"
        )
    return ""


def _judge_reasoning(response: str, answer: str, details: Mapping[str, Any], options: VerifierOptions) -> Verdict:
    return Verdict(*reasoning_score(response, details))


def _reasoning_problem(answer: str, details: Mapping[str, Any], options: VerifierOptions) -> str:
    missing = [key for key in ("task", "options", "seed", "level", "index") if key not in details]
    return f"it does not come from data.train=reasoning-gym:train or reasoning-gym:validation ({missing})" * bool(
        missing
    )


VERIFIERS = {
    "exact": _Verifier(_judge_exact, _exact_problem),
    "number": _Verifier(_judge_number, _number_problem),
    "math": _Verifier(_judge_math, _math_problem),
    "choice": _Verifier(_judge_choice, _choice_problem),
    "python": _Verifier(_judge_program, _program_problem),
    "reasoning-gym": _Verifier(_judge_reasoning, _reasoning_problem),
}
"""Every verifier by its name in prompt files."""
