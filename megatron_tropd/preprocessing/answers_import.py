"""Conversations that a teacher has already written, as a store of teacher answers for guidance."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tropd.answer_index import index_path
from megatron_tropd.answers import AnswerHeader, AnswerWriter, prompt_digest
from megatron_tropd.data import read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.mixture import read_mixture
from megatron_tropd.preprocessing.examples import Example, Field, Keys, read_example
from megatron_tropd.preprocessing.sources import read_chunks, size_on_disk
from megatron_tropd.prompt import Prompt
from megatron_tropd.tokenizer import Tokenizer

_ANY_LENGTH = 2**31


@dataclass
class ImportReport:
    """What became of the conversations."""

    written: int = 0
    """Answers in the store, those of an interrupted import included."""
    of_other_prompts: int = 0
    """Conversations whose prompt is not in the prompt file."""
    beyond_limit: int = 0
    """Answers over the number wanted for a prompt."""
    without_answer: int = 0
    """Prompts that nothing answers; training with guidance refuses them."""


def import_answers(
    inputs: Sequence[str],
    prompts_paths: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    keys: Keys | None = None,
    which: Field = "auto",
    num_shards: int = 0,
    answers_per_prompt: int | None = None,
    chat: dict[str, Any] | None = None,
    progress: bool = True,
) -> ImportReport:
    """Write ``out``, a store with the answers to the prompts of the prompt files, matched by the prompts' token ids.

    ``inputs`` are conversations that end with the assistant, or prompts with answers, in any input format. ``out`` is a
    file, or with ``num_shards`` a folder of that many. It takes its name when it is whole: an import that was cut off
    goes on where it stopped. ``chat`` (what the template was given) is recorded. Raises DataError for malformed
    records, and for a conversation of which the rendered prompt is not how the whole begins, token by token.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists: choose another --out, or remove it")
    mixture, _ = read_mixture(
        dict.fromkeys(prompts_paths, 1.0),
        lambda path, source: read_prompts(path, tokenizer, _ANY_LENGTH, "skip", source=source),
    )
    prompts = mixture.prompts
    by_digest: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_digest.setdefault(prompt_digest(prompt), []).append(prompt)
    header = AnswerHeader(tokenizer.fingerprint, {"imported": list(inputs)}, {"chat": chat or {}})
    report, met = ImportReport(), Counter[str]()
    partial = out.parent / f"{out.name}.partial"
    with _telling_of_the_disk(partial), ExitStack() as stack:
        writers = [stack.enter_context(AnswerWriter(path, header)) for path in _shard_paths(partial, num_shards)]
        bar = stack.enter_context(
            tqdm(total=sum(map(size_on_disk, inputs)), unit="B", unit_scale=True, desc="answers", disable=not progress)
        )
        for chunk in (chunk for path in inputs for chunk in read_chunks(path)):
            for where, record in chunk.parsed():
                example = read_example(record, where, keys or Keys(), which, tokenizer)
                prompt_tokens, answer = align(example, where, tokenizer)
                answered = by_digest.get(prompt_digest(Prompt("", "", tuple(prompt_tokens), "")), [])
                report.of_other_prompts += not answered
                for prompt in answered:
                    met[prompt.id] += 1
                    if met[prompt.id] > (answers_per_prompt or _ANY_LENGTH):
                        report.beyond_limit += 1
                        continue
                    report.written += 1
                    writer = writers[zlib.crc32(prompt.id.encode()) % len(writers)]
                    if met[prompt.id] > writer.num_answers[prompt.id]:
                        writer.write(prompt, answer, finished=True)
            bar.update(chunk.num_bytes)
    if not report.written:
        _remove(partial, num_shards)
        raise DataError(
            f"none of the {report.of_other_prompts} conversations answers a prompt of {', '.join(prompts_paths)}: both "
            "are compared by their ids, so the chat template and its options must be those of the training run"
        )
    if not num_shards:
        os.rename(index_path(partial), index_path(out))
    os.rename(partial, out)
    report.without_answer = sum(not met[prompt.id] for prompt in prompts)
    return report


@contextmanager
def _telling_of_the_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{partial} could not be written ({error}): make room and start again with the same command, which goes on "
            "from there"
        ) from error


def align(example: Example, where: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer, which ends with the end token.

    A conversation is rendered whole and without its last message; the second must be how the first begins, token by
    token, or the student would continue another text than the teacher did. What a template writes after the end token
    (a line break) is left out. Raises DataError.
    """
    if not example.reference.strip():
        raise DataError(f"{where}: no answer: the last message must be the assistant's, and have a text")
    example.tokenize(tokenizer, where)
    end = tokenizer.eos_id
    try:
        if example.messages is None:
            return example.tokens, [*tokenizer.encode(example.reference), end]
        messages = [*example.messages, {"role": "assistant", "content": example.reference}]
        whole = tokenizer.encode(tokenizer.render_chat(messages, example.tools, with_answer=True))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    prompt = example.tokens
    if whole[: len(prompt)] != prompt:
        at = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
        raise DataError(
            f"{where}: the rendered prompt is not how the rendered conversation begins: from token {at} on it is "
            f"{tokenizer.decode(prompt[at : at + 8])!r}, there it is {tokenizer.decode(whole[at : at + 8])!r}. "
            "Use a chat template (or its options) that renders both alike"
        )
    answer = whole[len(prompt) :]
    if end not in answer:
        return prompt, [*answer, end]
    length = answer.index(end) + 1
    if tokenizer.decode(answer[length:]).strip():
        raise DataError(f"{where}: the answer goes on after its end token: remove the token from the text")
    return prompt, answer[:length]


def _shard_paths(out: Path, num_shards: int) -> Iterable[Path]:
    if not num_shards:
        return [out]
    return [out / f"shard_{shard:05d}_of_{num_shards:05d}.jsonl" for shard in range(num_shards)]


def _remove(out: Path, num_shards: int) -> None:
    for path in _shard_paths(out, num_shards):
        path.unlink()
        index_path(path).unlink()
    if num_shards:
        out.rmdir()
