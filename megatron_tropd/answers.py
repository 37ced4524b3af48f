"""The store of teacher answers: JSONL files of token ids, written ahead of training and safe to continue.

The first line of a file is the header; every further line is one answer, several for a prompt allowed. The end token
of a finished answer is one of its tokens. A store is one file, or a folder of such files (shards). Reading checks every
line and keeps only where it is: the ids stay on disk, memory-mapped, until an answer is asked for.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from megatron_tropd.jsonl import DataError, parse_object
from megatron_tropd.prompt import Prompt

_FORMAT = "megatron-tropd answers"
_VERSION = 1


@dataclass(frozen=True)
class AnswerHeader:
    """First line of a store: where its answers come from."""

    tokenizer: str
    """Fingerprint of the tokenizer whose ids are stored."""
    teacher: Mapping[str, Any]
    """What identifies the teacher (weights' path, architecture); JSON values."""
    generation: Mapping[str, Any]
    """How it was sampled (temperature, longest answer, seed); JSON values."""

    def to_line(self) -> bytes:
        """The line, with its newline; equal headers give equal lines."""
        value = {"format": _FORMAT, "version": _VERSION, "tokenizer": self.tokenizer}
        value |= {"teacher": dict(self.teacher), "generation": dict(self.generation)}
        return json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class Answer:
    """One teacher answer."""

    tokens: array[int]
    """Ids, with the end token where it was sampled."""
    finished: bool
    """False where the length budget cut the answer off."""
    prompt_digest: str
    """``prompt_digest`` of the prompt it answers."""


class _MappedAnswers(Sequence[Answer]):
    """Answers of one prompt, each parsed from its line when it is asked for."""

    def __init__(self) -> None:
        self._lines: list[tuple[mmap.mmap, int]] = []

    def append(self, file: mmap.mmap, offset: int) -> None:
        """Add the line that begins at byte ``offset``, which has been checked."""
        self._lines.append((file, offset))

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...
    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        file, offset = self._lines[index]
        end = file.find(b"\n", offset)
        line = json.loads(file[offset : end if end >= 0 else len(file)])
        return Answer(array("i", line["tokens"]), line["finished"], line["prompt_digest"])


class AnswerStore:
    """Teacher answers by prompt id, several for a prompt in the order of the file.

    A file is JSONL: an ``AnswerHeader``, then ``{"id", "prompt_digest", "tokens", "finished"}`` for each
    answer.
    """

    def __init__(self, header: AnswerHeader, answers: Mapping[str, Sequence[Answer]], name: str = "the store"):
        """``name`` is how messages call it."""
        self.header = header
        self.answers = answers
        self.name = name

    @classmethod
    def read(cls, path: str | Path, tokenizer_fingerprint: str, vocab_size: int) -> Self:
        """A finished store: one file, or a folder whose ``*.jsonl`` are its shards, in the order of their names.

        Raises DataError for another tokenizer, for ids outside [0, vocab_size), for any malformed line.
        """
        path = Path(path)
        shards = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not shards:
            raise DataError(f"{path}: no teacher answers: the folder has no .jsonl files")
        headers, answers = [], dict[str, _MappedAnswers]()
        for shard in shards:
            file, lines = _map_lines(shard)
            _, first = next(lines)
            headers.append(_parse_header(first, f"{shard}:1"))
            if headers[-1].tokenizer != tokenizer_fingerprint:
                raise DataError(
                    f"{shard}: the answers are ids of another tokenizer ({headers[-1].tokenizer[:12]}..., this run has "
                    f"{tokenizer_fingerprint[:12]}...): use the same tokenizer or generate answers with this one"
                )
            for number, (offset, line) in enumerate(lines, start=2):
                identifier, _ = _parse_answer(line, f"{shard}:{number}", vocab_size)
                answers.setdefault(identifier, _MappedAnswers()).append(file, offset)
        if not answers:
            raise DataError(f"{path}: no teacher answers: nothing follows the header; run `generate` again")
        return cls(headers[0], answers, str(path))

    def answer(self, prompt: Prompt, sample: int) -> Answer:
        """The answer that sample ``sample`` of a prompt continues: the prompt's stored answers in turn."""
        answers = self.answers.get(prompt.id)
        if not answers:
            raise DataError(
                f"{self.name}: no teacher answer for prompt {prompt.id!r}: run `generate` for these prompts"
            )
        answer = answers[sample % len(answers)]
        if answer.prompt_digest != prompt_digest(prompt):
            raise DataError(
                f"{self.name}: prompt {prompt.id!r} is another text than the teacher answered under that id: "
                "the prompt file has changed; delete the store and `generate` again"
            )
        return answer


class AnswerWriter:
    """Appends answers to a store file, line by line; continues a file that an earlier run left unfinished.

    One process writes a file. A context manager; every line is handed to the system as it is written.
    """

    def __init__(self, path: str | Path, header: AnswerHeader):
        """Start ``path``, or continue it: a last line cut off by a crash is dropped.

        ``num_answers`` counts the complete answers of each prompt id, those of earlier runs included. Raises
        DataError, leaving the file as it was, where it has another header or is no answer store.
        """
        self.num_answers: Counter[str] = Counter()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = self._read_existing(path, header.to_line()) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(num_bytes)
        if num_bytes == 0:
            self._write(header.to_line())

    def _read_existing(self, path: Path, expected: bytes) -> int:
        """Count the answers of an unfinished file; returns the size of its complete lines, in bytes."""
        num_bytes = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                torn = not line.endswith(b"\n")
                if number == 1 and line != expected and not (torn and expected.startswith(line)):
                    raise DataError(_different_header(where, line, expected))
                if torn:
                    break
                if number > 1:
                    identifier, _ = _parse_answer(parse_object(line, where), where, vocab_size=2**31)
                    self.num_answers[identifier] += 1
                num_bytes += len(line)
        return num_bytes

    def write(self, prompt: Prompt, tokens: Sequence[int], finished: bool) -> None:
        """Append one answer; ``tokens`` include the end token where it was sampled."""
        line = {
            "id": prompt.id,
            "prompt_digest": prompt_digest(prompt),
            "tokens": list(tokens),
            "finished": finished,
        }
        self._write(json.dumps(line).encode() + b"\n")
        self.num_answers[prompt.id] += 1

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Force everything to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, whatever happened: complete lines are kept."""
        self.close()


def prompt_digest(prompt: Prompt) -> str:
    """Short digest of a prompt's ids, by which a store notices that the prompt file has changed under it."""
    return hashlib.sha256(json.dumps(prompt.tokens).encode()).hexdigest()[:16]


def _map_lines(path: Path) -> tuple[mmap.mmap, Iterator[tuple[int, dict[str, Any]]]]:
    """The file in memory, and (offset, object) of every line; DataError for what is no JSON object."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
                raise DataError(f"{path}: no teacher answers: the file is empty; run `generate`")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error

    def lines() -> Iterator[tuple[int, dict[str, Any]]]:
        offset = 0
        for number, line in enumerate(iter(mapped.readline, b""), start=1):
            yield offset, parse_object(line, f"{path}:{number}")
            offset += len(line)

    return mapped, lines()


def _parse_header(line: dict[str, Any], where: str) -> AnswerHeader:
    if line.get("format") != _FORMAT:
        raise DataError(f'{where}: not a store of teacher answers ("format" is {line.get("format")!r}): run `generate`')
    if line.get("version") != _VERSION:
        raise DataError(
            f"{where}: store version {line.get('version')!r}, this program reads {_VERSION}: generate again"
        )
    tokenizer, teacher, generation = (line.get(key) for key in ("tokenizer", "teacher", "generation"))
    if not isinstance(tokenizer, str) or not isinstance(teacher, dict) or not isinstance(generation, dict):
        raise DataError(f'{where}: "tokenizer" must be a string, "teacher" and "generation" objects: generate again')
    return AnswerHeader(tokenizer, teacher, generation)


def _parse_answer(line: dict[str, Any], where: str, vocab_size: int) -> tuple[str, Answer]:
    identifier, tokens, finished = line.get("id"), line.get("tokens"), line.get("finished")
    digest = line.get("prompt_digest")
    if not isinstance(identifier, str) or not isinstance(digest, str) or not isinstance(finished, bool):
        raise DataError(f'{where}: needs "id" and "prompt_digest" (strings) and "finished" (boolean): generate again')
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise DataError(f'{where}: "tokens" must be a list of whole numbers: generate again')
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise DataError(
            f"{where}: id {wrong} is not in [0, {vocab_size}), the vocabulary: generate with this tokenizer"
        )
    return identifier, Answer(array("i", tokens), finished, digest)


def _different_header(where: str, found: bytes, expected: bytes) -> str:
    return (
        f"{where}: the file exists with another header, so its answers are not this run's: write to another "
        f"file, or delete this one. Found {found[:300].decode(errors='replace').strip()}; "
        f"expected {expected.decode().strip()}"
    )
