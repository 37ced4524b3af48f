"""Sources in, a folder of prompt files (or of Megatron datasets) out: parallel, in order, in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import struct
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_tropd.config import TokenizerConfig
from megatron_tropd.jsonl import DataError
from megatron_tropd.preprocessing.examples import Example, Field, Keys, read_example
from megatron_tropd.preprocessing.filters import Contamination, SeenStore
from megatron_tropd.preprocessing.outputs import Outputs
from megatron_tropd.preprocessing.sentences import SentenceTruncation, load_punkt, train_punkt
from megatron_tropd.preprocessing.sources import Chunk, read_chunks, size_on_disk
from megatron_tropd.preprocessing.statistics import Statistics
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.tokenizer_builder import build_tokenizers

_CHUNKS_IN_FLIGHT = 4
"""Chunks a worker may have waiting: what bounds the memory of a slow writer."""


@dataclass(frozen=True)
class Options:
    """What to read, what to keep, what to write."""

    inputs: tuple[str, ...]
    out: str
    tokenizer: TokenizerConfig | None = None
    """Needed by whatever speaks of tokens."""
    keys: Keys = field(default_factory=Keys)
    which: Field = "auto"
    dedup: Literal["prompt", "example", "none"] = "prompt"
    min_prompt_length: int = 1
    max_prompt_length: int | None = None
    max_answer_length: int | None = None
    max_text_length: int | None = None
    """Tokens that a document of ``text`` is cut to, after a whole sentence."""
    punkt: str | None = None
    validation: float = 0.0
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    format: Literal["jsonl", "indexed"] = "jsonl"
    workers: int = 2
    progress: bool = True


@dataclass(frozen=True)
class Kept:
    """What a worker hands back for a record that it keeps."""

    example: Example
    where: str
    digest: bytes
    answer_tokens: list[int]
    validation: bool
    has_id: bool


def preprocess(options: Options) -> Statistics:
    """Read every input, filter, and write ``options.out``, which appears whole at the end or not at all.

    Which records are kept, their order and their split do not depend on the number of workers. Raises DataError at the
    first record that is malformed (its file and line in the message), ValueError for options that cannot be met.
    """
    _check(options)
    total = sum(size_on_disk(path) for path in options.inputs)
    arguments = options, _punkt_parameters(options)
    worker = _Worker(*arguments)  # in this process too: what cannot start is said at once
    statistics = Statistics(worker.fingerprint)
    with _folder(Path(options.out)) as folder, Outputs(folder, options.format, worker.vocab_size) as outputs:
        seen = SeenStore(folder / ".seen")
        chunks = (chunk for path in options.inputs for chunk in read_chunks(path))
        with tqdm(total=total, unit="B", unit_scale=True, desc="preprocess", disable=not options.progress) as bar:
            for chunk_bytes, kept, dropped in _in_order(chunks, worker, arguments, options.workers):
                statistics.drop(dropped)
                for item in kept:
                    if options.dedup != "none" and not seen.add(item.digest):
                        statistics.drop(Counter(duplicate=1))
                    elif item.has_id and not seen.add(_id_digest(item.example.id)):
                        raise DataError(
                            f"{item.where}: id {item.example.id!r} is taken by an earlier line: ids must differ"
                        )
                    else:
                        outputs.write(item.example, item.answer_tokens, validation=item.validation)
                        statistics.keep(item.validation, len(item.example.tokens), len(item.answer_tokens))
                bar.update(chunk_bytes)
        seen.close()
        (folder / ".seen").unlink()
        if not statistics.num_kept:
            raise DataError(f"{', '.join(options.inputs)}: nothing is left: {dict(statistics.dropped) or 'no records'}")
        statistics.write(folder / "statistics.json")
    return statistics


class _Worker:
    """Everything a process needs to judge records on their own."""

    def __init__(self, options: Options, punkt_parameters: Any):
        self._options = options
        self._tokenizer: Tokenizer | None = None
        if options.tokenizer is not None:
            self._tokenizer, _ = build_tokenizers(options.tokenizer)
        self.vocab_size = self._tokenizer.vocab_size if self._tokenizer is not None else 0
        self.fingerprint = self._tokenizer.fingerprint if self._tokenizer is not None else None
        self._contamination = Contamination(_evaluation_texts(options, self._tokenizer), options.ngram)
        self._truncation = None
        if options.max_text_length is not None:
            self._truncation = SentenceTruncation(punkt_parameters, options.max_text_length)

    def __call__(self, chunk: Chunk) -> tuple[int, list[Kept], Counter[str]]:
        """The chunk's size, what is kept of it, and how many records were dropped for what."""
        kept, dropped = [], Counter[str]()
        for where, record in chunk.parsed():
            example = read_example(record, where, self._options.keys, self._options.which, self._tokenizer)
            answer_tokens, reason = self._judge(example, where)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(self._kept(example, where, answer_tokens))
        return chunk.num_bytes, kept, dropped

    def _judge(self, example: Example, where: str) -> tuple[list[int], str]:
        """The answer's ids with the end token, and why the example is dropped ("" where it is not)."""
        options, tokenizer = self._options, self._tokenizer
        answer_tokens: list[int] = []
        if tokenizer is not None:
            if self._truncation is not None and example.is_document:
                example.prompt = self._truncation(example.prompt or "", tokenizer)
                if not example.prompt:
                    return [], "first sentence too long"
            example.tokenize(tokenizer, where)
            num_tokens = len(example.tokens)
            if num_tokens < options.min_prompt_length:
                return [], "prompt too short"
            if num_tokens > (options.max_prompt_length or num_tokens):
                return [], "prompt too long"
            try:
                answer_tokens = [*tokenizer.encode(example.reference), tokenizer.eos_id] if example.reference else []
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
            if len(answer_tokens) > (options.max_answer_length or len(answer_tokens)):
                return [], "answer too long"
        if self._contamination.meets(example.words()):
            return [], "in an evaluation file"
        return answer_tokens, ""

    def _kept(self, example: Example, where: str, answer_tokens: list[int]) -> Kept:
        if self._options.format == "indexed" and not answer_tokens and self._tokenizer is not None:
            example.tokens.append(self._tokenizer.eos_id)  # where documents follow each other, each one ends
        prompt_digest, has_id = example.digest(with_answer=False), example.id is not None
        if example.id is None:
            # Whether a record is a duplicate is not known here; where duplicates may stay, the place tells them apart.
            place = "" if self._options.dedup == "prompt" else f"-{blake2b(where.encode(), digest_size=4).hexdigest()}"
            example.id = prompt_digest.hex() + place
        digest = example.digest(with_answer=True) if self._options.dedup == "example" else prompt_digest
        share = struct.unpack("<Q", prompt_digest[:8])[0] / 2**64
        return Kept(example, where, digest, answer_tokens, share < self._options.validation, has_id)


_worker: _Worker


def _start(options: Options, punkt_parameters: Any) -> None:
    global _worker
    _worker = _Worker(options, punkt_parameters)


def _work(chunk: Chunk) -> tuple[int, list[Kept], Counter[str]]:
    return _worker(chunk)


def _in_order(
    chunks: Iterable[Chunk], worker: _Worker, arguments: tuple[Options, Any], workers: int
) -> Iterator[tuple[int, list[Kept], Counter[str]]]:
    """Results in the order of the chunks, a few of them in flight at a time."""
    if workers == 1:
        yield from map(worker, chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, arguments)
    waiting: deque = deque()
    remaining = iter(chunks)
    try:
        waiting.extend(pool.submit(_work, chunk) for chunk in islice(remaining, workers * _CHUNKS_IN_FLIGHT))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_work, chunk) for chunk in islice(remaining, 1))
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker died, most likely killed for its memory: use fewer --workers, or look for a huge record"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name at the end, or is removed."""
    if out.exists():
        raise DataError(f"{out} exists: choose another --out, or remove it")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, out)
    except (OSError, sqlite3.Error) as error:
        raise DataError(
            f"{out} could not be written ({error}); nothing is left of it: make room, or choose another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(options: Options) -> None:
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation must be in [0, 1), found {options.validation}")
    for name in ("ngram", "workers"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(options, name)}")
    lengths = (options.max_prompt_length, options.max_answer_length, options.max_text_length)
    if any(length is not None and length < 1 for length in lengths):
        raise ValueError("lengths must be at least 1 token")
    needs_tokens = options.format == "indexed" or options.min_prompt_length > 1 or any(lengths)
    if needs_tokens and options.tokenizer is None:
        raise ValueError("lengths and --format=indexed are in tokens: give --tokenizer")
    if options.punkt is not None and options.max_text_length is None:
        raise ValueError("--punkt splits sentences to cut at: give --max-text-length too")


def _punkt_parameters(options: Options) -> Any:
    if options.max_text_length is None:
        return None
    if options.punkt is not None:
        return load_punkt(options.punkt)
    tokenizer = build_tokenizers(options.tokenizer)[0] if options.tokenizer is not None else None
    return train_punkt(
        example.prompt or ""
        for path in options.inputs
        for chunk in read_chunks(path)
        for example in _documents(chunk, options, tokenizer)
    )


def _documents(chunk: Chunk, options: Options, tokenizer: Tokenizer | None) -> Iterator[Example]:
    for where, record in chunk.parsed():
        example = read_example(record, where, options.keys, options.which, tokenizer)
        if example.is_document:
            yield example


def _evaluation_texts(options: Options, tokenizer: Tokenizer | None) -> Iterator[str]:
    for path in options.decontaminate:
        for chunk in read_chunks(path):
            for where, record in chunk.parsed():
                example = read_example(record, where, options.keys, options.which, tokenizer)
                example.answer = ""
                yield example.words()


def _id_digest(identifier: str | None) -> bytes:
    return blake2b(b"id\0" + str(identifier).encode(), digest_size=16).digest()
