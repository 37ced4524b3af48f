"""The store of teacher answers: JSONL files of token ids, written ahead of training and safe to continue.

The first line of a file is the header; every further line is one answer, several for a prompt allowed. The end token
of a finished answer is one of its tokens. A store is one file, or a folder of such files (shards), each with an index
beside it (``answer_index``): opening a store parses no answer, and the ids stay on disk, memory-mapped, until one is
asked for.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_tropd.answer_index import AnswerIndex, IndexBuilder, index_path, key, read_index, told_if_not_kept
from megatron_tropd.jsonl import DataError, parse_object
from megatron_tropd.prompt import Prompt

_FORMAT = "megatron-tropd answers"
_VERSION = 1


class UnfinishedStoreError(DataError):
    """A store without all the answers asked for, which `generate` can add."""


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


class AnswerStore:
    """Teacher answers by prompt id, several for a prompt in the order of the files.

    A file is JSONL: an ``AnswerHeader``, then ``{"id", "prompt_digest", "tokens", "finished"}`` for each answer.
    """

    def __init__(self, path: Path, header: AnswerHeader, shards: Sequence[_Shard]):
        """``read`` makes one."""
        self.header = header
        self._path = path
        self._shards = shards

    @classmethod
    def read(cls, path: str | Path, tokenizer_fingerprint: str, vocab_size: int) -> Self:
        """A finished store: one file, or a folder whose ``*.jsonl`` are its shards, in the order of their names.

        A shard whose index is of another file, or that has none, is read once and gets one. Raises DataError for
        another tokenizer, for ids outside [0, vocab_size), for any malformed line; UnfinishedStoreError where the last
        line is cut off, or no answer has been written yet.
        """
        path = Path(path)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UnfinishedStoreError(f"{path}: no teacher answers: the folder has no .jsonl files; run `generate`")
        headers, shards = [], []
        for file in files:
            mapped = _map_file(file)
            first = mapped.readline()
            if not first.endswith(b"\n"):
                raise UnfinishedStoreError(f"{file}:1: the header is cut off; run `generate` again")
            headers.append(_parse_header(parse_object(first, f"{file}:1"), f"{file}:1"))
            if headers[-1].tokenizer != tokenizer_fingerprint:
                raise DataError(
                    f"{file}: the answers are ids of another tokenizer ({headers[-1].tokenizer[:12]}..., this run has "
                    f"{tokenizer_fingerprint[:12]}...): use the same tokenizer or generate answers with this one"
                )
            index = read_index(file)
            if index is None or index.largest_id >= vocab_size:  # in the second case to say where
                index = _make_index(file, mapped, vocab_size)
            shards.append(_Shard(file, mapped, index, vocab_size))
        if not any(len(shard.index) for shard in shards):
            raise UnfinishedStoreError(f"{path}: no teacher answers: nothing follows the header; run `generate` again")
        return cls(path, headers[0], shards)

    def answer(self, prompt: Prompt, sample: int) -> Answer:
        """The answer that sample ``sample`` of a prompt continues: the prompt's stored answers in turn."""
        found = self._find(prompt)
        shard, row = found[sample % len(found)]
        answer = shard.answer(prompt.id, row)
        if answer.prompt_digest != prompt_digest(prompt):
            raise self._another_text(prompt)
        return answer

    def require(self, prompts: Iterable[Prompt]) -> None:
        """UnfinishedStoreError where a prompt has no answer, DataError where one has answers to another text.

        Parses no line.
        """
        missing: UnfinishedStoreError | None = None
        for prompt in prompts:
            try:
                found = self._find(prompt)
            except UnfinishedStoreError as error:
                missing = missing or error
                continue
            digest = key(prompt_digest(prompt))
            if any(int(shard.index.digests[row]) != digest for shard, row in found):
                raise self._another_text(prompt)
        if missing is not None:
            raise missing

    def _find(self, prompt: Prompt) -> list[tuple[_Shard, int]]:
        found = [(shard, row) for shard in self._shards for row in shard.index.rows(prompt.id)]
        if not found:
            raise UnfinishedStoreError(
                f"{self._path}: no teacher answer for prompt {prompt.id!r}: run `generate` for these prompts"
            )
        return found

    def _another_text(self, prompt: Prompt) -> DataError:
        return DataError(
            f"{self._path}: prompt {prompt.id!r} is another text than the teacher answered under that id: "
            "the prompt file has changed; delete the store and `generate` again"
        )


@dataclass(frozen=True)
class _Shard:
    """One file of a store, in memory."""

    path: Path
    mapped: mmap.mmap
    index: AnswerIndex
    vocab_size: int

    def answer(self, identifier: str, row: int) -> Answer:
        """The answer in ``row`` of the index, parsed from its line, which must be that prompt's."""
        offset = int(self.index.offsets[row])
        end = self.mapped.find(b"\n", offset)
        where = f"{self.path}, byte {offset}"
        line = parse_object(self.mapped[offset : end if end >= 0 else len(self.mapped)], where)
        found, answer = _parse_answer(line, where, self.vocab_size)
        if found != identifier:
            raise DataError(
                f"{where}: an answer to {found!r}, the index says to {identifier!r}: delete {index_path(self.path)}"
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
        self._path = path = Path(path)
        self._index = IndexBuilder()
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = self._read_existing(path, header) if path.exists() else 0
        self._file = path.open("ab")
        if self._file.tell() != num_bytes:  # cutting nothing off is a change too, which the index would notice
            self._file.truncate(num_bytes)
        if num_bytes == 0:
            self._write(header.to_line())
            self._index.add_header(header.to_line())

    def _read_existing(self, path: Path, expected: AnswerHeader) -> int:
        """Count the answers of an unfinished file; returns the size of its complete lines, in bytes."""
        num_bytes = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                torn = not line.endswith(b"\n")
                if number == 1:
                    check_first_line(line, expected, where)
                if torn:
                    break
                if number == 1:
                    self._index.add_header(line)
                else:
                    identifier, answer = _parse_answer(parse_object(line, where), where, vocab_size=2**31)
                    self._index.add(line, identifier, answer.prompt_digest, answer.tokens)
                    self.num_answers[identifier] += 1
                num_bytes += len(line)
        return num_bytes

    def write(self, prompt: Prompt, tokens: Sequence[int], finished: bool) -> None:
        """Append one answer; ``tokens`` include the end token where it was sampled."""
        digest = prompt_digest(prompt)
        values = {"id": prompt.id, "prompt_digest": digest, "tokens": list(tokens), "finished": finished}
        line = json.dumps(values).encode() + b"\n"
        self._write(line)
        self._index.add(line, prompt.id, digest, tokens)
        self.num_answers[prompt.id] += 1

    def _write(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Force everything to disk, close, and write the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._index.save(self._path)

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


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
                raise UnfinishedStoreError(f"{path}: no teacher answers: the file is empty; run `generate`")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error


def _make_index(path: Path, mapped: mmap.mmap, vocab_size: int) -> AnswerIndex:
    """Parse every line, and leave the index beside the file where its folder can be written."""
    builder = IndexBuilder()
    mapped.seek(0)
    builder.add_header(mapped.readline())
    for number, line in enumerate(iter(mapped.readline, b""), start=2):
        where = f"{path}:{number}"
        try:
            values = parse_object(line, where)
        except DataError as error:
            if line.endswith(b"\n"):
                raise
            raise UnfinishedStoreError(f"{error}: the last line is cut off; run `generate` again") from error
        identifier, answer = _parse_answer(values, where, vocab_size)
        builder.add(line, identifier, answer.prompt_digest, answer.tokens)
    with told_if_not_kept(path):
        return builder.save(path)
    return builder.build()


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


def check_first_line(line: bytes, header: AnswerHeader, where: str) -> None:
    """Raise DataError where a file that begins with ``line`` is not of ``header``; a crash may have cut it off."""
    expected = header.to_line()
    if line == expected or (not line.endswith(b"\n") and expected.startswith(line)):
        return
    raise DataError(
        f"{where}: the file exists with another header, so its answers are not this run's: write to another "
        f"file, or delete this one. Found {line[:300].decode(errors='replace').strip()}; "
        f"expected {expected.decode().strip()}"
    )
