"""Records of JSON lines, Parquet files, ``datasets`` folders and Megatron corpora, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tropd.jsonl import DataError, parse_object

CHUNK_SIZE = 2000
"""Records handed to a worker at once."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source: still lines for JSONL, so that workers do the parsing."""

    path: str
    first_number: int
    """Number of the first record, from 1 (a file's line)."""
    records: Sequence[bytes | dict[str, Any]]
    num_bytes: int
    """This chunk's share of the source's size on disk, for the progress bar."""

    def parsed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(``file:line``, record) of each; DataError at a line that is not a JSON object."""
        for number, record in enumerate(self.records, start=self.first_number):
            where = f"{self.path}:{number}"
            yield where, parse_object(record, where) if isinstance(record, bytes) else record


def size_on_disk(path: str | Path) -> int:
    """Bytes of a source. Raises DataError where it is missing."""
    path = Path(path)
    try:
        if path.suffix == ".idx":
            return path.stat().st_size + path.with_suffix(".bin").stat().st_size
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error


def read_chunks(path: str | Path) -> Iterator[Chunk]:
    """The records of a source, by what it is: a folder of ``save_to_disk``, ``.parquet``, ``.idx`` or JSON lines.

    Records of a Megatron corpus are ``{"sequences": [ids, ...]}``, one for each document. Memory is that of a chunk.
    """
    path = Path(path)
    if path.is_dir():
        return _datasets_chunks(path)
    if path.suffix == ".parquet":
        return _parquet_chunks(path)
    if path.suffix == ".idx":
        return _indexed_chunks(path)
    return _jsonl_chunks(path)


def _jsonl_chunks(path: Path) -> Iterator[Chunk]:
    number = 1
    try:
        with path.open("rb") as file:
            while lines := list(islice(file, CHUNK_SIZE)):
                yield Chunk(str(path), number, lines, sum(map(len, lines)))
                number += len(lines)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error


def _parquet_chunks(path: Path) -> Iterator[Chunk]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs a package: pip install megatron-tropd[data]") from error
    number = 1
    try:
        with parquet.ParquetFile(path) as file:
            share = size_on_disk(path) / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=CHUNK_SIZE):
                rows = [_without_nulls(row) for row in batch.to_pylist()]
                yield Chunk(str(path), number, rows, round(share * len(rows)))
                number += len(rows)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}:{number}: not a readable Parquet file ({error}): write it again") from error


def _datasets_chunks(path: Path) -> Iterator[Chunk]:
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError as error:
        raise DataError(f"{path}: a datasets folder needs a package: pip install megatron-tropd[data]") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, ArrowException) as error:
        raise DataError(f"{path} is not a folder that datasets' save_to_disk wrote ({error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{path} has several splits: name the folder of one: {', '.join(sorted(loaded))}")
    share = size_on_disk(path) / max(1, len(loaded))
    for start in range(0, len(loaded), CHUNK_SIZE):
        columns = loaded[start : start + CHUNK_SIZE]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield Chunk(str(path), start + 1, [_without_nulls(row) for row in rows], round(share * len(rows)))


def _indexed_chunks(path: Path) -> Iterator[Chunk]:
    from megatron_tropd.indexed import IndexedCorpus

    corpus = IndexedCorpus(path)
    share = size_on_disk(path) / len(corpus)
    for start in range(0, len(corpus), CHUNK_SIZE):
        stop = min(start + CHUNK_SIZE, len(corpus))
        rows = [{"sequences": [part.tolist() for part in corpus[index]]} for index in range(start, stop)]
        yield Chunk(str(path), start + 1, rows, round(share * len(rows)))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A table has every column in every row; a null is an absent key, also within a message."""
    return {key: _clean(value) for key, value in row.items() if value is not None}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_nulls(value)
    return [_clean(part) for part in value] if isinstance(value, list) else value
