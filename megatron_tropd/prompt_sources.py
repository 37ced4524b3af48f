"""The prompts that a config names: files, procedural tasks, and mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_tropd.config import Config, ConfigError
from megatron_tropd.data import procedural_prompts, read_prompts
from megatron_tropd.indexed_prompts import read_indexed_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.mixture import Mixture, read_mixture
from megatron_tropd.procedural import SOURCES, make_tasks
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_lines import LineFormat
from megatron_tropd.tokenizer import Tokenizer


def read_training_prompts(
    config: Config,
    tokenizer: Tokenizer,
    *,
    samples_per_prompt: int = 1,
    max_answer_length: int | None = None,
    for_teacher: bool = False,
) -> tuple[Mixture, dict[str, int]]:
    """The prompts of ``data.train`` in their order, and how many of each source were skipped for their length.

    ``max_answer_length`` and ``for_teacher`` as in ``read_prompt_file``; a step takes
    ``global_batch_size / samples_per_prompt`` prompts.
    """
    train, training = config.data.train, config.training
    return read_mixture(
        {train: 1.0} if isinstance(train, str) else train,
        partial(read_prompt_file, config, tokenizer, max_answer_length=max_answer_length, for_teacher=for_teacher),
        seed=training.seed,
        prompts_per_step=training.global_batch_size // samples_per_prompt,
    )


def read_prompt_file(
    config: Config,
    tokenizer: Tokenizer,
    path: str,
    source: str = "",
    *,
    max_answer_length: int | None = None,
    for_teacher: bool = False,
) -> tuple[Sequence[Prompt], int]:
    """Prompts of a file, of an indexed dataset (its ``.idx``), or procedural tasks; and how many were too long.

    ``source`` names them in a mixture. With ``max_answer_length`` (what SFT trains on) each needs an answer or
    solution of at most that many tokens. With ``for_teacher`` what ``teacher_context`` makes of them is kept beside
    them; procedural tasks and indexed datasets have no such text (ConfigError where one is asked for).
    """
    data, tasks, context = config.data, config.tasks, config.teacher_context
    with_context = for_teacher and context.is_set
    if with_context and (path in SOURCES or Path(path).suffix == ".idx"):
        raise ConfigError(f"teacher_context needs prompts that are text lines; {path} has none: write them to JSONL")
    if path in SOURCES:
        made = make_tasks(
            tasks.kinds,
            SOURCES[path],
            seed=tasks.seed,
            level=tasks.level,
            num_train=tasks.num_train,
            num_validation=tasks.num_validation,
        )
        prompts, num_skipped = procedural_prompts(
            made,
            tokenizer,
            data.max_prompt_length,
            data.long_prompts,
            source=vars(tasks),
            max_answer_length=max_answer_length,
            prompt_template=data.prompt_template,
        )
        return [replace(prompt, source=source) for prompt in prompts], num_skipped
    if Path(path).suffix == ".idx":
        return read_indexed_prompts(
            path,
            tokenizer,
            data.max_prompt_length,
            data.long_prompts,
            max_answer_length=max_answer_length,
            source=source,
        )
    return read_prompts(
        path,
        tokenizer,
        data.max_prompt_length,
        data.long_prompts,
        max_answer_length=max_answer_length,
        line_format=LineFormat(
            data.verifier,
            data.prompt_key,
            data.answer_key,
            data.prompt_template,
            context.prompt_template if with_context else None,
            context.system_prompt if with_context else None,
            tuple(config.teachers) if for_teacher else (),
        ),
        source=source,
        max_teacher_length=context.max_prompt_length,
    )


def refuse_unshared(prompts: Sequence[Prompt], tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> None:
    """Raise DataError for a prompt with an id that only the student's tokenizer has: the teacher cannot read it."""
    size = teacher_tokenizer.vocab_size
    for prompt in prompts if size < tokenizer.vocab_size else ():
        if (highest := max(prompt.tokens + prompt.teacher_tokens)) >= size:
            raise DataError(
                f"prompt {prompt.id!r} has the id {highest}, the teacher's tokenizer only {size} ids: take "
                "the prompt out, or use a teacher that knows the token"
            )
