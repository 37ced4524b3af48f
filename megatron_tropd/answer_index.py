"""Where the answers of a store's file are: a small file beside it, with which opening a store parses no answer.

``answers.jsonl.index`` is a line of JSON, then three arrays of 64-bit numbers, sorted by the first: hashes of prompt
ids, hashes of prompt digests, offsets of lines in bytes. It is derived: believed where the file is still the one it was
made of, by size and time of change or else by SHA-256, and made anew otherwise. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_FORMAT = "megatron-tropd answers index"
_VERSION = 1
_ALIGNMENT = 64
"""Bytes; the first line is filled up with spaces, so that the arrays can be mapped."""
_SAME_TIME_NS = 2 * 10**9
"""A file that changed less than this before its index was written may have changed again at the same recorded time."""


@dataclass(frozen=True)
class AnswerIndex:
    """Where the answers of one file are, in the order of their keys and within one prompt in that of the file."""

    largest_id: int
    """Of all token ids; -1 where there are none."""
    ids: NDArray[np.uint64]
    """``key`` of the prompt's id, uint64 [answers]."""
    digests: NDArray[np.uint64]
    """``key`` of the digest of the prompt's tokens, uint64 [answers]."""
    offsets: NDArray[np.uint64]
    """First byte of the line, uint64 [answers]."""

    def __len__(self) -> int:
        """Number of answers."""
        return len(self.ids)

    def rows(self, identifier: str) -> range:
        """The rows of one prompt's answers; empty where it has none."""
        wanted = np.uint64(key(identifier))
        first, end = (int(np.searchsorted(self.ids, wanted, side)) for side in ("left", "right"))
        return range(first, end)


class IndexBuilder:
    """Gathers the index of a file from its lines, in their order."""

    def __init__(self) -> None:
        self._columns = array("Q"), array("Q"), array("Q")
        self._largest_id = -1
        self._size = 0
        self._sha256 = hashlib.sha256()

    def add_header(self, line: bytes) -> None:
        """The first line."""
        self._sha256.update(line)
        self._size += len(line)

    def add(self, line: bytes, identifier: str, digest: str, tokens: Sequence[int]) -> None:
        """The next line, an answer."""
        for column, value in zip(self._columns, (key(identifier), key(digest), self._size), strict=True):
            column.append(value)
        self._largest_id = max(self._largest_id, max(tokens, default=-1))
        self.add_header(line)

    def build(self) -> AnswerIndex:
        """The index of the lines so far."""
        ids, *others = (np.frombuffer(column, np.uint64) if column else _EMPTY for column in self._columns)
        order = np.argsort(ids, kind="stable")
        return AnswerIndex(self._largest_id, ids[order], *(column[order] for column in others))

    def save(self, path: Path) -> AnswerIndex:
        """Write the index of ``path``, whose lines have all been added, beside it."""
        index = self.build()
        _write(path, index, size=self._size, sha256=self._sha256.hexdigest())
        return index


_EMPTY = np.empty(0, np.uint64)


def index_path(path: Path) -> Path:
    """Where the index of the store file ``path`` is."""
    return path.with_name(path.name + ".index")


def key(text: str) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def read_index(path: Path) -> AnswerIndex | None:
    """The index beside the store file ``path``, memory-mapped; None where there is none of the file as it is now."""
    place = index_path(path)
    header = _read_header(place)
    found = path.stat()
    if header is None or header["size"] != found.st_size:
        return None
    is_old = found.st_mtime_ns + _SAME_TIME_NS < place.stat().st_mtime_ns
    is_known = is_old and header["mtime_ns"] == found.st_mtime_ns
    if not is_known and _sha256(path) != header["sha256"]:
        return None
    columns = [_EMPTY] * 3
    if number := header["num_answers"]:
        columns = list(np.memmap(place, np.uint64, "r", offset=header["num_bytes"], shape=(3, number)))
    index = AnswerIndex(header["largest_id"], *columns)
    if not is_known:
        with told_if_not_kept(path):
            _write(path, index, size=header["size"], sha256=header["sha256"])  # next time the file need not be read
    return index


@contextmanager
def told_if_not_kept(path: Path) -> Iterator[None]:
    """A warning where the index of a store that is only read cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written (%s): every start reads all of %s", index_path(path), error, path.name)


def _read_header(place: Path) -> dict[str, Any] | None:
    """The first line of an index and its length, ``num_bytes``; None for no index, another version's or a torn one."""
    try:
        with place.open("rb") as file:
            line = file.readline()
            header = json.loads(line)
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
        return None
    if not all(type(header.get(name)) is int for name in ("size", "mtime_ns", "num_answers", "largest_id")):
        return None
    header["num_bytes"] = len(line)
    return header if place.stat().st_size == len(line) + 24 * header["num_answers"] else None


def _write(path: Path, index: AnswerIndex, *, size: int, sha256: str) -> None:
    header: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "size": size, "sha256": sha256}
    header |= {"mtime_ns": path.stat().st_mtime_ns, "num_answers": len(index), "largest_id": index.largest_id}
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    place = index_path(path)
    part = place.with_name(f"{place.name}.{uuid.uuid4().hex}")  # several ranks may be at it
    try:
        with part.open("wb") as file:
            file.write(line)
            for column in (index.ids, index.digests, index.offsets):
                file.write(column.tobytes())
        os.replace(part, place)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
