"""The files of a preprocessed folder: ``train`` and, where a share is held out, ``validation``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Self

from megatron_tropd.preprocessing.examples import Example

if TYPE_CHECKING:
    from megatron_tropd.indexed import IndexedWriter


class Outputs:
    """Writes each example to its split; a context manager. A split without examples has no file."""

    def __init__(self, folder: Path, format: Literal["jsonl", "indexed"], vocab_size: int):
        """JSON lines of prompts, or Megatron's indexed datasets of ids below ``vocab_size``."""
        self._folder = folder
        self._format = format
        self._vocab_size = vocab_size
        self._files: dict[str, IO[bytes]] = {}
        self._writers: dict[str, IndexedWriter] = {}

    def write(self, example: Example, answer_tokens: Sequence[int], *, validation: bool) -> None:
        """Append one example; ``answer_tokens`` are empty where it has no answer."""
        name = "validation" if validation else "train"
        if self._format == "jsonl":
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.jsonl").open("wb")
            self._files[name].write(example.to_line())
            return
        if name not in self._writers:
            from megatron_tropd.indexed import IndexedWriter

            self._writers[name] = IndexedWriter(self._folder / name, self._vocab_size)
        self._writers[name].write([example.tokens, answer_tokens] if answer_tokens else [example.tokens])

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close every file; an index is written last."""
        for file in self._files.values():
            file.close()
        for writer in self._writers.values():
            writer.close()
