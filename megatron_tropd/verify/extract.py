"""The final answer in a response that reasons before it answers."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SPOKEN = re.compile(r"(?i:\b(?:answer|option|choice)\s*(?:is)?\s*:?)\s*(?:\\boxed\{|\*\*|\$)*\(?([A-Z])\b")
_NUMBER = re.compile(
    # A sign belongs to the number where nothing stands before it that could be subtracted from.
    r"(?:(?<![\w.)\]}])[-+\u2212])?"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\d))?"
    r"(?:\s?/\s?[1-9]\d*)?"
)
_LONGEST_NUMBER = 1000
"""Characters; a longer run of digits is no answer to anything."""


def final_answer(response: str) -> str:
    r"""The last of ``\boxed{...}``, ``<answer>...</answer>`` and ``#### ...`` in ``response``; "" if there is none."""
    found = [(match.start(), match.group(1)) for match in (*_TAG.finditer(response), *_HASHES.finditer(response))]
    start = response.rfind("\\boxed{")
    # An inner box belongs to the one around it; the last box that is closed counts.
    while start >= 0:
        content = _balanced(response, start + len("\\boxed{"))
        if content is not None:
            found.append((start, content))
            break
        start = response.rfind("\\boxed{", 0, start)
    return max(found)[1].strip() if found else ""


def _balanced(text: str, start: int) -> str | None:
    """What stands from ``start`` to the brace that closes there; None if none does."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``: 42, -3.5, 1,234, 2e3, 3/4; None if there is none."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    if found is None or len(found) > _LONGEST_NUMBER:
        return None
    numerator, _, denominator = found.replace(",", "").replace("\u2212", "-").replace(" ", "").partition("/")
    return Fraction(Decimal(numerator)) / Fraction(Decimal(denominator or "1"))


def number_of(response: str) -> Fraction | None:
    """The number a response ends on: in its marked final answer where there is one, else the last of the text."""
    return last_number(final_answer(response) or response)


def choice_of(response: str, num_choices: int = 26) -> str:
    """The letter (A, B, ...) a response chooses; "" if it chooses none of ``num_choices``.

    In the marked final answer; else the last "answer is (B)", "Answer: B", "option B"; else a response that is nothing
    but the letter.
    """
    marked = final_answer(response)
    for text, pattern in (
        (marked, r"(?:\\text(?:bf)?\{)?[\s(*$]*([A-Za-z])(?![A-Za-z0-9'])"),
        (response, r"[\s(*$]*([A-Za-z])[\s).:*$]*$"),
    ):
        match = re.match(pattern, text)
        if match and text:
            return _within(match.group(1).upper(), num_choices)
        if marked:
            return ""
    spoken = _SPOKEN.findall(response)
    return _within(spoken[-1], num_choices) if spoken else ""


def _within(letter: str, num_choices: int) -> str:
    return letter if ord(letter) - ord("A") < num_choices else ""


def program_of(response: str) -> str:
    """The Python program of a response: its last fenced block, else the whole text."""
    blocks = re.findall(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", response, re.DOTALL)
    return blocks[-1] if blocks else response
