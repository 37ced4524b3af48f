"""A store of teacher answers written as a folder: files of a given number of answers, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from megatron_tropd.answers import AnswerHeader, AnswerWriter, check_first_line
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt


class Writer(AbstractContextManager["Writer"], Protocol):
    """What writes a store: ``AnswerWriter`` or ``ShardedAnswerWriter``."""

    num_answers: Counter[str]
    """Complete answers of each prompt id, those of earlier runs included."""

    def write(self, prompt: Prompt, tokens: Sequence[int], finished: bool) -> None:
        """Append one answer; ``tokens`` include the end token where it was sampled."""


def open_writer(path: Path, header: AnswerHeader, answers_per_shard: int) -> Writer:
    """Start or continue the store ``path``: one file, or with ``answers_per_shard`` a folder of them.

    Raises DataError where the store is of the other kind or has another header.
    """
    _check_kind(path, answers_per_shard)
    return ShardedAnswerWriter(path, header, answers_per_shard) if answers_per_shard else AnswerWriter(path, header)


def check_header(path: Path, header: AnswerHeader, answers_per_shard: int) -> None:
    """Raise DataError where ``open_writer`` would for the beginning of a file; writes nothing."""
    _check_kind(path, answers_per_shard)
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        with file.open("rb") as lines:
            check_first_line(lines.readline(), header, f"{file}:1")


def _check_kind(path: Path, answers_per_shard: int) -> None:
    if not answers_per_shard and path.is_dir():
        raise DataError(f"{path} is a folder: set guidance.answers_per_shard to continue it, or write to another path")
    if answers_per_shard and path.is_file():
        raise DataError(
            f"{path} is one file: set guidance.answers_per_shard=0 to continue it, or write to another path"
        )


class ShardedAnswerWriter:
    """Appends answers to ``shard_00000.jsonl`` and so on, each closed for good when it has ``answers_per_shard``.

    One process writes a folder. A context manager. A folder that an earlier run left unfinished is continued: a line
    that was cut off is dropped, and its answer is missed like one that was never written.
    """

    def __init__(self, folder: Path, header: AnswerHeader, answers_per_shard: int):
        """Read what is in ``folder``, if anything. Raises DataError for a file with another header."""
        self.num_answers: Counter[str] = Counter()
        self._folder, self._header, self._answers_per_shard = folder, header, answers_per_shard
        folder.mkdir(parents=True, exist_ok=True)
        self._shard: AnswerWriter | None = None
        self._room = 0
        for path in sorted(folder.glob("*.jsonl")):
            self._open(path)

    def write(self, prompt: Prompt, tokens: Sequence[int], finished: bool) -> None:
        """Append one answer; ``tokens`` include the end token where it was sampled."""
        if self._room <= 0:
            paths = (self._folder / f"shard_{number:05d}.jsonl" for number in count())
            self._open(next(path for path in paths if not path.exists()))
        assert self._shard is not None
        self._shard.write(prompt, tokens, finished)
        self._room -= 1
        self.num_answers[prompt.id] += 1

    def _open(self, path: Path) -> None:
        self.close()
        self._shard = AnswerWriter(path, self._header)
        self._room = self._answers_per_shard - self._shard.num_answers.total()
        self.num_answers.update(self._shard.num_answers)

    def close(self) -> None:
        """Force everything to disk and close."""
        if self._shard is not None:
            self._shard.close()
            self._shard, self._room = None, 0

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, whatever happened: complete lines are kept."""
        self.close()
