"""Prompts and answers of a Megatron indexed dataset, read from the mapped file when a step asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np

from megatron_tropd.indexed import IndexedCorpus
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import Tokenizer


class IndexedPrompts(Sequence[Prompt]):
    """The documents of a corpus as prompts, each made when it is asked for: ids stay on the disk.

    A document of two sequences is a prompt and its answer, the end token included. One of a single sequence is a text:
    with ``with_answer`` its first id is the prompt and the rest the answer, so that SFT learns the whole text; else it
    is a prompt, less an end token.
    """

    def __init__(
        self, corpus: IndexedCorpus, documents: np.ndarray, tokenizer: Tokenizer, *, source: str, with_answer: bool
    ):
        """``documents``: indices in ``corpus``, those that are taken."""
        self._corpus = corpus
        self._documents = documents
        self._tokenizer = tokenizer
        self._source = source
        self._with_answer = with_answer

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """One prompt, or a list of them."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        document = int(self._documents[index])
        parts = [part.tolist() for part in self._corpus[document]]
        if len(parts) == 1 and self._with_answer:
            parts = [parts[0][:1], parts[0][1:]]
        elif len(parts) == 1 and parts[0][-1] == self._tokenizer.eos_id:
            parts = [parts[0][:-1]]
        tokens, answer = parts[0], parts[1] if len(parts) > 1 else []
        return Prompt(
            id=self._id(document),
            text=self._tokenizer.decode(tokens),
            tokens=tuple(tokens),
            answer=self._tokenizer.decode(answer),
            source=self._source,
            answer_tokens=tuple(answer),
        )

    @property
    def ids(self) -> Iterator[str]:
        """Every prompt's id: the number of its document, from 1."""
        return (self._id(document) for document in self._documents.tolist())

    def _id(self, document: int) -> str:
        return f"{self._source}:{document + 1}" if self._source else str(document + 1)


def read_indexed_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: Literal["refuse", "skip"],
    *,
    max_answer_length: int | None = None,
    source: str = "",
) -> tuple[IndexedPrompts, int]:
    """The documents of the ``.idx`` at ``path`` as prompts, and how many were skipped for their length.

    Arguments and errors are ``data.read_prompts``'s; with ``max_answer_length`` every document needs an answer. Raises
    DataError too for ids that the tokenizer does not have, and where a ``statistics.json`` beside the file says that
    another tokenizer wrote it.
    """
    corpus = IndexedCorpus(path)
    _check_tokenizer(Path(path), corpus, tokenizer)
    counts, first, lengths = corpus.num_sequences, corpus.first_lengths, corpus.lengths
    with_answer = max_answer_length is not None
    _refuse_first(
        (counts < 1) | (counts > 2), path, "has not one sequence (a text) or two (prompt and answer): write it again"
    )
    is_text = counts == 1
    prompts = np.where(is_text, 1 if with_answer else lengths, first)
    answers = lengths - prompts
    _refuse_first(prompts < 1, path, "has an empty prompt: write it again without it")
    if with_answer:
        _refuse_first(answers < 1, path, "has no answer, which training on answers needs: write it again without it")
    excess = (prompts > max_prompt_length) | (answers > (max_answer_length or np.inf))
    if long_prompts == "refuse":
        _refuse_first(
            excess,
            path,
            f"is over its budget of {max_prompt_length} ids for the prompt and {max_answer_length} for the answer with "
            "its end token; raise the budget, or set data.long_prompts=skip",
        )
    documents = np.flatnonzero(~excess)
    if not len(documents):
        raise DataError(f"{path}: no prompt to use: all {len(excess)} documents are over the length budget")
    prompts_read = IndexedPrompts(corpus, documents, tokenizer, source=source, with_answer=with_answer)
    return prompts_read, int(excess.sum())


def _refuse_first(wrong: np.ndarray, path: str | Path, what: str) -> None:
    if wrong.any():
        raise DataError(f"{path}: document {int(wrong.argmax()) + 1} {what}")


def _check_tokenizer(path: Path, corpus: IndexedCorpus, tokenizer: Tokenizer) -> None:
    largest = max(corpus.largest_ids())
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{path}: id {largest} is not in [0, {tokenizer.vocab_size}), the tokenizer's ids: use the tokenizer that "
            "wrote the dataset"
        )
    statistics = path.with_name("statistics.json")
    if not statistics.is_file():
        return  # not written by tools/preprocess_data.py
    try:
        written_by = json.loads(statistics.read_text(encoding="utf-8")).get("tokenizer")
    except (ValueError, AttributeError, OSError) as error:
        raise DataError(f"cannot read {statistics} ({error}): preprocess again, or remove the file") from error
    if written_by not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{path}: the ids are those of another tokenizer ({written_by[:12]}..., this run has "
            f"{tokenizer.fingerprint[:12]}...): use the same tokenizer, or preprocess again with this one"
        )
