"""Megatron's indexed datasets (``.bin`` and ``.idx``), written and read with Megatron-Core's own classes.

A document of a corpus is one sequence; a document for SFT is two, the prompt and the answer with its end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_tropd.jsonl import DataError

# isort: split
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

_IDS_AT_ONCE = 2**24


class IndexedWriter:
    """Writes one dataset; nothing is readable before ``close`` has written the index."""

    def __init__(self, prefix: Path, vocab_size: int):
        """``prefix`` without ``.bin``; ids are stored in two bytes where ``vocab_size`` allows."""
        self._prefix = prefix
        self._dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)
        self.num_documents = 0

    def write(self, sequences: Sequence[Sequence[int]]) -> None:
        """Append one document."""
        lengths = [len(sequence) for sequence in sequences]
        # int64: torch has arithmetic for every value of uint16, numpy casts down.
        tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
        self._builder.add_document(tokens, lengths)
        self.num_documents += 1

    def close(self) -> None:
        """Write the index."""
        self._builder.finalize(f"{self._prefix}.idx")


class IndexedCorpus:
    """The documents of an indexed dataset, memory-mapped; item i is the list of document i's sequences of ids."""

    def __init__(self, path: str | Path):
        """``path``: the ``.idx`` file. Raises DataError where a file is missing, damaged or empty."""
        path = Path(path)
        missing = [str(file) for file in (path, path.with_suffix(".bin")) if not file.is_file()]
        if missing:
            raise DataError(f"cannot read {missing[0]}: an indexed dataset is a .bin beside an .idx; check the path")
        if path.with_suffix(".bin").stat().st_size == 0:  # which cannot be mapped
            raise DataError(f"{path.with_suffix('.bin')} is empty: write it again")
        try:
            self._data = IndexedDataset(str(path.with_suffix("")), multimodal=False, mmap=True)
            self._boundaries = np.array(self._data.document_indices)
        except (AssertionError, ValueError, KeyError, IndexError, OSError) as error:
            raise DataError(f"{path} is not the index of a Megatron dataset ({error}): write it again") from error
        self._bin_path = path.with_suffix(".bin")
        if len(self) < 1:
            raise DataError(f"{path} has no documents: write it again")
        expected = int(self._data.index.sequence_pointers[-1]) + int(self._data.sequence_lengths[-1]) * int(
            DType.size(self._data.index.dtype)
        )
        found = path.with_suffix(".bin").stat().st_size
        if found != expected:
            raise DataError(
                f"{path.with_suffix('.bin')} has {found} bytes, its index speaks of {expected}: the two do not belong "
                "together, or one is cut off; write or copy both again"
            )

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._boundaries) - 1

    @property
    def num_sequences(self) -> np.ndarray:
        """Sequences of every document, ``[documents]``."""
        return np.diff(self._boundaries)

    @property
    def first_lengths(self) -> np.ndarray:
        """Ids in the first sequence of every document, ``[documents]``."""
        return self._data.sequence_lengths[self._boundaries[:-1]].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Ids in every document, ``[documents]``."""
        ends = np.concatenate([[0], np.cumsum(self._data.sequence_lengths, dtype=np.int64)])
        return ends[self._boundaries[1:]] - ends[self._boundaries[:-1]]

    def largest_ids(self) -> Iterator[int]:
        """The largest id of every 2^24, in the order of the file, which is read once."""
        ids = np.memmap(self._bin_path, dtype=self._data.index.dtype, mode="r")
        for start in range(0, len(ids), _IDS_AT_ONCE):
            yield int(ids[start : start + _IDS_AT_ONCE].max())

    def __getitem__(self, index: int) -> list[np.ndarray]:
        """The sequences of one document, each ids ``[length]``."""
        start, stop = self._boundaries[index], self._boundaries[index + 1]
        # Copies: Megatron unmaps the file with its dataset, under any view that is left.
        return [np.array(self._data[sequence]) for sequence in range(int(start), int(stop))]
