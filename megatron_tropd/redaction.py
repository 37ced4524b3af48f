"""Secrets stay out of everything a run writes: what a value's name, or the environment, says must not be read.

A secret is (1) the value of an environment variable whose name says so (``HF_TOKEN``, ``WANDB_API_KEY``), wherever it
turns up; (2) what follows such a name in a text or mapping (``password=...``); (3) the user part of a URL
(``https://name:password@host``); (4) what follows ``Bearer``. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
_MIN_LENGTH = 6
"""A shorter value of the environment would blot out ordinary words."""

_WORDS = r"(?:api_?key|access_?key|private_?key|secret|token|password|passwd|passphrase|pwd|credentials?|auth)"
_NAME = re.compile(rf"(?i)password|passwd|secret|(?:^|[_\-.])(?:key|{_WORDS})(?:$|[_\-.])")
_HARMLESS = ("prompt_key", "answer_key")
"""Fields of this package's config that name the keys of a data file."""
_ASSIGNMENT = re.compile(
    rf"(?i)((?<![a-z0-9])(?:[a-z0-9]+[_\-.])*{_WORDS}(?:[_\-.][a-z0-9]+)*[\"']?\s*[=:]\s*[\"']?)(?!//)([^\s\"',;&}}\]]+)"
)
_URL_USER = re.compile(r"(?i)([a-z][a-z0-9+.\-]*:/{1,2})[^/\s@]+@")  # a path takes one of two slashes away
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=\-]{6,}")


def is_secret_name(name: str) -> bool:
    """Whether a variable or field of this name holds a secret: ``HF_TOKEN`` does, ``tokens_per_second`` does not."""
    return name not in _HARMLESS and _NAME.search(name) is not None


def redact(text: str) -> str:
    """``text`` with every secret in it replaced by ``[redacted]``."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    text = _URL_USER.sub(rf"\1{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)


def redacted(value: Any, *, name: str = "") -> Any:
    """A copy of a tree of mappings, sequences and plain values without its secrets; numbers stay as they are.

    ``name`` is the name that ``value`` goes by in what holds it.
    """
    if isinstance(value, Mapping):
        return {key: redacted(entry, name=str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry, name=name) for entry in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redact(value)
    return value


def _secrets_of_environment() -> list[str]:
    """Longest first, so that a secret inside another does not cut it in two."""
    found = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _MIN_LENGTH}
    return sorted(found, key=len, reverse=True)
