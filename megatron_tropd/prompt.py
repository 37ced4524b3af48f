"""One task as the models are given it. Imports no torch: the workers that prepare data read prompts too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One task. ``tokens`` are the ids of ``text``; ``answer`` is the reference answer as text, "" if there is none."""

    id: str
    text: str
    tokens: tuple[int, ...]
    answer: str
    verifier: str = "exact"
    """Which of ``verify.VERIFIERS`` judges a response."""
    solution: str = ""
    """A worked solution that ends in the answer, for SFT; "" : the answer alone."""
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the verifier needs beside the answer (``verify.verify``)."""
    source: str = ""
    """Names its prompt file in a mixture of several, "" without one."""
    teacher: str = ""
    """Which of several teachers judges the responses; "": the one that is the config's `teacher`."""
    teacher_tokens: tuple[int, ...] = ()
    """What the teacher reads in place of ``tokens``; (): the same."""
    answer_tokens: tuple[int, ...] = ()
    """Ids of what SFT learns, end token included, where the source holds ids; (): those of solution or answer."""
