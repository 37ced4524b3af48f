"""What is left out: what was seen before, and what stands in an evaluation file."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path

_WORD = re.compile(r"\w+")
_CACHE_KIB = 64 * 1024


class SeenStore:
    """A set of digests on disk: memory does not grow with their number."""

    def __init__(self, path: Path):
        """Create the file ``path``."""
        self._database = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, digest: bytes) -> bool:
        """Whether ``digest`` is new."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Close the file, which nothing needs any more."""
        self._database.close()


class Contamination:
    """The word n-grams of evaluation texts. A text with fewer than n words is met only by the very same words."""

    def __init__(self, texts: Iterable[str], n: int):
        """Words are runs of letters and digits, in lower case."""
        self.n = n
        self._grams: set[str] = set()
        self._short: set[str] = set()
        for text in texts:
            words = _words(text)
            if len(words) < n:
                self._short.add(" ".join(words))
            self._grams.update(self._of(words))
        self._short.discard("")

    def meets(self, text: str) -> bool:
        """Whether ``text`` has a run of n words in common with an evaluation text."""
        words = _words(text)
        return any(gram in self._grams for gram in self._of(words)) or " ".join(words) in self._short

    def _of(self, words: list[str]) -> Iterable[str]:
        return (" ".join(words[start : start + self.n]) for start in range(len(words) - self.n + 1))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
