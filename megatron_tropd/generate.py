"""The `generate` command: the teacher answers the training prompts ahead of training, into a store for guidance."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.answer_shards import Writer, open_writer
from megatron_tropd.answers import AnswerHeader
from megatron_tropd.building import load_teacher
from megatron_tropd.config import Config, architecture
from megatron_tropd.distributed import from_main
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_sources import read_training_prompts
from megatron_tropd.rollout import RolloutEngine, build_engine
from megatron_tropd.run import Run, open_run, vocab_size
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.types import Rollout, RolloutRequest

logger = logging.getLogger(__name__)
_OF_ANSWERS = ("max_response_length", "temperature", "top_p", "max_batch_size")
"""Fields of ``rollout`` that a store's header keeps: what the answers depend on."""


def generate(config: Config) -> None:
    """Write one teacher answer for each prompt of ``data.train`` to ``guidance.answers``.

    The teacher samples at ``rollout.temperature`` with the engine that training uses; every data-parallel replica
    answers its share. A store that an earlier call left unfinished is continued; a finished one is left as it is. After
    SIGTERM on any rank the answers in hand are finished and written, and the function returns.
    """
    with open_run(config, "generate") as run:
        prompts = read_training_prompts(config, run.tokenizer, for_teacher=True)[0].prompts
        writer = _open_store(run)
        with writer or nullcontext():
            waiting = _unanswered(prompts, writer)
            num_answers = 0
            with tqdm(
                total=len(waiting), desc="teacher answers", unit="prompt", disable=not (waiting and run.layout.is_main)
            ) as bar:
                for teacher in ("", *config.teachers):
                    mine = [(index, prompt) for index, prompt in waiting if prompt.teacher == teacher]
                    if mine and not run.should_stop():
                        num_answers += _answer(run, teacher, mine, writer, bar)
        dist.barrier()  # no rank goes on to read a store that is still being written
        if num_answers < len(waiting):
            run.monitor.journal.outcome = "sigterm"
            written = f"{num_answers} of the {len(waiting)} answers that were missing"
            logger.warning("SIGTERM: wrote %s; start again with the same command to continue", written)


def _open_store(run: Run) -> Writer | None:
    """The writer on rank 0, None elsewhere; a store that cannot be continued is refused on every rank."""
    path = run.config.guidance.answers
    assert path is not None  # validate() has refused a run without
    writer, problem = None, ""
    if run.layout.is_main:
        try:
            writer = open_writer(
                Path(path), answer_header(run.config, run.tokenizer), run.config.guidance.answers_per_shard
            )
        except (DataError, OSError) as error:
            problem = str(error)
    if problem := from_main(problem):
        raise DataError(problem)
    return writer


def _answer(run: Run, teacher: str, waiting: list[tuple[int, Prompt]], writer: Writer | None, bar: tqdm) -> int:
    """Have ``teacher`` answer until all are answered or the run is to stop; returns how many are."""
    config, layout = run.config, run.layout
    assert config.teacher is not None
    (model,) = load_teacher(run, name=teacher)
    engine = build_engine(
        model,
        layout,
        config.rollout,
        vocab_size=min(
            run.tokenizer.vocab_size,
            run.teacher_tokenizer.vocab_size,
            vocab_size(config.teacher, run.teacher_tokenizer),
        ),
        eos_id=run.tokenizer.eos_id,
        seed=config.training.seed + 1,  # not the draws that the student will sample with
    )
    count = config.rollout.max_batch_size * layout.data_parallel_size
    for start in range(0, len(waiting), count):
        if start and run.should_stop():
            return start
        chunk = waiting[start : start + count]
        answers = _generate_over_replicas(run, engine, chunk)
        for (_, prompt), rollout in zip(chunk, answers, strict=True):
            if writer is not None:
                writer.write(prompt, rollout.response, rollout.finished)
            bar.update()
    return len(waiting)


def _generate_over_replicas(run: Run, engine: RolloutEngine, chunk: list[tuple[int, Prompt]]) -> list[Rollout]:
    """Answers to ``chunk`` in its order, on every rank; each data-parallel replica generates its share."""
    layout = run.layout
    requests = [RolloutRequest(index, _as_the_teacher_reads(prompt), ()) for index, prompt in chunk]
    mine = requests[layout.data_parallel_rank :: layout.data_parallel_size]
    shares: list[list[Rollout]] = [[] for _ in range(layout.data_parallel_size)]
    rollouts = engine.generate(mine, max_response_length=run.config.rollout.max_response_length)
    dist.all_gather_object(shares, rollouts, group=layout.groups.dp)
    return sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.request.sample_id)


def _as_the_teacher_reads(prompt: Prompt) -> Prompt:
    return replace(prompt, tokens=prompt.teacher_tokens or prompt.tokens)


def _unanswered(prompts: list[Prompt], writer: Writer | None) -> list[tuple[int, Prompt]]:
    """(Index in the file, prompt) of what the store lacks, as rank 0 sees it; the same list on every rank."""
    done = writer.num_answers if writer is not None else Counter[str]()
    indices = from_main([index for index, prompt in enumerate(prompts) if not done[prompt.id]])
    return [(index, prompts[index]) for index in indices]


def answer_header(config: Config, tokenizer: Tokenizer) -> AnswerHeader:
    """What the store of this config's answers begins with."""
    context = config.teacher_context
    assert config.teacher is not None
    return AnswerHeader(
        tokenizer=tokenizer.fingerprint,
        teacher={
            "load": config.teacher.load,
            **architecture(config.teacher),
            **({"teachers": config.teachers} if config.teachers else {}),
        },
        generation={
            **{name: getattr(config.rollout, name) for name in _OF_ANSWERS},
            "seed": config.training.seed + 1,
            **({"teacher_context": asdict(context)} if context.is_set else {}),
        },
    )
