"""reasoning-gym's scores, in a process of its own, of answers that are safe to evaluate."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_tropd.verify.extract import final_answer
from megatron_tropd.verify.worker import Worker

_LITERAL_TASKS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
"""reasoning-gym calls ``eval`` on the answer."""
_FORMULA_TASKS = {
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration",
}  # fmt: skip
"""reasoning-gym calls sympy's ``parse_expr``, which evaluates, on the answer."""
_FUNCTIONS = r"(?:sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs)"
_UNSAFE = re.compile(rf"[^\w\s+\-*/^().,]|__|\.\s*[^\W\d]|(?<!\w)(?!{_FUNCTIONS}\s*\()[^\W\d]\w*\s*\(|\)\s*\(")
"""Anything but numbers, names, arithmetic and calls of known functions."""


@cache
def _worker() -> Worker:
    return Worker("reasoning_worker.py", seconds=10.0, memory_bytes=4 * 2**30)


def reasoning_score(response: str, details: Mapping[str, Any]) -> tuple[float, str]:
    """(Score in [0, 1], the answer scored). The answer is the marked final one, else the whole response."""
    answer = final_answer(response) or response.strip()
    if not answer or not is_safe(details["task"], answer):
        return 0.0, answer
    result = _worker().ask({**details, "answer": answer})
    return (0.0 if result is None else result["score"]), answer


def is_safe(task: str, answer: str) -> bool:
    """Whether reasoning-gym may be given ``answer``: some of its scorers evaluate what a model wrote as Python."""
    if task in _FORMULA_TASKS:
        return _UNSAFE.search(answer) is None
    if task not in _LITERAL_TASKS or re.fullmatch(r"[\w\s,.\-]*", answer):
        return True
    try:
        ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # A board or matrix as bare rows is no Python, and nothing that could be called.
        return "(" not in answer and "[" not in answer
    return True
