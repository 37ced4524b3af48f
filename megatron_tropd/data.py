"""Prompt files, and the order in which prompts come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.jsonl import DataError, read_objects
from megatron_tropd.procedural import ProceduralTask
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_lines import LineFormat, parse_line
from megatron_tropd.tokenizer import Tokenizer


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: Literal["refuse", "skip"],
    *,
    max_answer_length: int | None = None,
    line_format: LineFormat | None = None,
    source: str = "",
    max_teacher_length: int | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts of a JSONL file, in its order, and how many were skipped for their length.

    A line is ``{"prompt": str, "answer": str (optional), "id": str (optional: the line number)}``, or has
    ``"messages"`` in place of the prompt, which the chat template renders; with ``verifier``, ``choices`` (a list),
    ``tests`` and ``solution`` where a task has them; other keys are ignored. ``line_format`` says how a line is read.
    Lengths are in tokens. ``long_prompts`` says whether a line over budget is refused or skipped and counted. With
    ``max_answer_length`` (what SFT trains on) every line needs an answer or solution, of at most that many tokens with
    its end token. ``max_teacher_length`` is the budget of what the teacher reads (None: of the prompt). A
    ``source`` is noted in every prompt, and put before ids that are line numbers. Raises DataError with file and line
    for anything else, and for a file with no prompt to use.
    """

    def prompts() -> Iterator[tuple[str, Prompt]]:
        lines_of_ids: dict[str, int] = {}
        for number, line in read_objects(path):
            where = f"{path}:{number}"
            default_id = f"{source}:{number}" if source else str(number)
            prompt = replace(parse_line(line, where, default_id, tokenizer, line_format), source=source)
            if prompt.id in lines_of_ids:
                taken = lines_of_ids[prompt.id]
                raise DataError(f"{where}: id {prompt.id!r} is taken by line {taken}: ids must differ")
            lines_of_ids[prompt.id] = number
            yield where, prompt

    return _within_budget(
        str(path), prompts(), tokenizer, max_prompt_length, max_answer_length, long_prompts, max_teacher_length
    )


def procedural_prompts(
    tasks: Sequence[ProceduralTask],
    tokenizer: Tokenizer,
    max_prompt_length: int,
    long_prompts: Literal["refuse", "skip"],
    *,
    source: Mapping[str, Any],
    max_answer_length: int | None = None,
    prompt_template: str = "{prompt}",
) -> tuple[list[Prompt], int]:
    """Tasks as prompts, and how many were skipped for their length; as ``read_prompts`` does with lines.

    ``source`` holds ``kinds``, ``seed`` and ``level``, with which the verifier finds a task again.
    """

    def prompts() -> Iterator[tuple[str, Prompt]]:
        line_format = LineFormat(verifier="reasoning-gym", prompt_template=prompt_template)
        for task in tasks:
            line = {"prompt": task.question, "answer": task.answer, "solution": task.solution}
            where = f"reasoning-gym, {task.name} {task.index}"
            details = {"task": task.name, "options": dict(source["kinds"][task.name]), "index": task.index}
            details |= {"seed": source["seed"], "level": source["level"]}
            parsed = parse_line(line, where, f"{task.name}-{task.index}", tokenizer, line_format)
            yield where, replace(parsed, details=details)

    return _within_budget("reasoning-gym", prompts(), tokenizer, max_prompt_length, max_answer_length, long_prompts)


def _within_budget(
    source: str,
    prompts: Iterator[tuple[str, Prompt]],
    tokenizer: Tokenizer,
    max_prompt_length: int,
    max_answer_length: int | None,
    long_prompts: Literal["refuse", "skip"],
    max_teacher_length: int | None = None,
) -> tuple[list[Prompt], int]:
    """What fits of (where it stands, prompt), and how many do not."""
    kept: list[Prompt] = []
    num_skipped = 0
    for where, prompt in prompts:
        excess = _over_budget(prompt, where, tokenizer, max_prompt_length, max_answer_length, max_teacher_length)
        if excess and long_prompts == "refuse":
            raise DataError(f"{where}: {excess}; shorten it, raise the budget, or set data.long_prompts=skip")
        if excess:
            num_skipped += 1
        else:
            kept.append(prompt)
    if not kept:
        found = f"all {num_skipped} prompts are over the length budget" if num_skipped else "the file is empty"
        raise DataError(f"{source}: no prompt to use: {found}")
    return kept, num_skipped


@dataclass(frozen=True)
class PromptOrder:
    """Endless shuffled epochs over ``num_prompts`` prompts: a resumed run needs only its position.

    Epoch e (positions e * num_prompts to (e + 1) * num_prompts - 1) is a permutation that depends on (seed,
    e) alone.
    """

    num_prompts: int
    seed: int
    source: int = 0
    """Sources of a mixture are shuffled each in its own way."""

    def indices(self, start: int, count: int) -> list[int]:
        """Prompt indices at the positions [start, start + count)."""
        pairs = (divmod(position, self.num_prompts) for position in range(start, start + count))
        return [
            _epoch_permutation(self.seed, epoch + (self.source << 32), self.num_prompts)[offset]
            for epoch, offset in pairs
        ]


@lru_cache(maxsize=16)
def _epoch_permutation(seed: int, epoch: int, num_prompts: int) -> list[int]:
    keys = uniforms(seed, Stream.PROMPT_ORDER, epoch, torch.arange(num_prompts))
    return torch.argsort(keys, stable=True).tolist()


def _over_budget(
    prompt: Prompt,
    where: str,
    tokenizer: Tokenizer,
    max_prompt_length: int,
    max_answer_length: int | None,
    max_teacher_length: int | None,
) -> str:
    """What is longer than its budget, "" if nothing is."""
    num_tokens = len(prompt.tokens)
    if num_tokens > max_prompt_length:
        return f"the prompt has {num_tokens} tokens, the budget (data.max_prompt_length) is {max_prompt_length}"
    if len(prompt.teacher_tokens) > (most := max_prompt_length if max_teacher_length is None else max_teacher_length):
        return f"the teacher's prompt has {len(prompt.teacher_tokens)} tokens, its budget is {most}"
    if max_answer_length is None:
        return ""
    if not (prompt.solution or prompt.answer):
        raise DataError(f'{where}: "answer" is missing or empty: training on reference answers needs one on every line')
    answer_length = len(tokenizer.encode(prompt.solution or prompt.answer)) + 1
    if answer_length > max_answer_length:
        return f"the answer has {answer_length} tokens with its end token, the budget is {max_answer_length}"
    return ""
