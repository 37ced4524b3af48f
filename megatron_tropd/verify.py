"""Whether a response solves its task."""

from __future__ import annotations


def is_correct(response: str, answer: str) -> bool:
    """Exact match of response (without its end token) and reference answer, up to white space around them.

    An empty reference is met by nothing: a prompt without an answer cannot be solved.
    """
    return answer.strip() != "" and response.strip() == answer.strip()
