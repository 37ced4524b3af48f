"""A requirement on a configuration: raised at once, or collected with all the others. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from megatron_tropd.config import ConfigError

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``holds``; within ``collecting`` add it to what was found instead."""
    if holds:
        return
    found = _collected.get()
    if found is None:
        raise ConfigError(message)
    if message not in found:
        found.append(message)


@contextmanager
def collecting() -> Iterator[list[str]]:
    """The messages of all requirements that do not hold, in their order."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)
