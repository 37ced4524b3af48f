"""The side of a job that generates and judges, step after step, for the side that trains (``one_step_off``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from time import perf_counter

from megatron_tropd.apart import JudgeApart
from megatron_tropd.batch import num_tokens, split_for_rank
from megatron_tropd.building import (
    batch_of_step,
    load_teacher,
    shared_vocab_size,
    student_padded_vocab_size,
    teacher_vocab_sizes,
)
from megatron_tropd.distributed import active
from megatron_tropd.one_step_off import READY, Generated, Order, Prepared, is_for
from megatron_tropd.refit import InferenceCopy, build_inference_copy, inference_layout
from megatron_tropd.rollout import build_engine
from megatron_tropd.rollout_source import build_source, everyones
from megatron_tropd.run import Run
from megatron_tropd.teacher_pass import TeacherInput, teacher_input
from megatron_tropd.training_requests import Requests
from megatron_tropd.types import Rollout


def serve(run: Run, requests: Requests) -> None:
    """Prepare rollouts until the trainers say that the run is over. Every rank of this side calls it."""
    link = run.layout.link
    assert link is not None
    generator = Generator(run, requests)
    prepared: Prepared | None = None
    while True:
        order: Order | None = link.broadcast(None, link.leader_of_trainers)
        if order is None:
            run.monitor.journal.outcome = "sigterm" if run.should_stop() else "finished"
            return
        link.broadcast(READY, link.leader_of_generators)
        run.monitor.phases.begin("refit")
        generator.copy.follow(order.version)
        if prepared is None or order.given is not None or not is_for(prepared.generated, order.step, order.batch):
            prepared = generator.prepare(order.step, order.batch, weights_of=order.step, given=order.given)
        run.monitor.phases.begin("log")
        link.broadcast(replace(prepared, stop=run.should_stop()), link.leader_of_generators)
        generator.judge.send()
        run.monitor.end_step({})
        prepared = None
        if order.step + 1 < run.config.training.train_iters and not order.last:
            prepared = generator.prepare(order.step + 1, order.batch + 1, weights_of=order.step)


class Generator:
    """The student's copy, the engine on it, and the teacher."""

    def __init__(self, run: Run, requests: Requests):
        """Meets the other side's ``TeacherApart``, then its ``Refit``."""
        config, layout = run.config, run.layout
        self._run = run
        (teacher,) = load_teacher(run)
        num_ids, padded_num_ids = teacher_vocab_sizes(run)
        self.judge = JudgeApart(
            teacher, layout, num_ids=num_ids, padded_num_ids=padded_num_ids, offload=config.parallel.offload_teacher
        )
        assert config.rollout.tensor_model_parallel_size is not None
        self.copy: InferenceCopy = build_inference_copy(
            config.student,
            None,
            inference_layout(layout, tensor_model_parallel_size=config.rollout.tensor_model_parallel_size),
            padded_vocab_size=student_padded_vocab_size(run),
            max_sequence_length=run.max_sequence_length,
            dtype=run.dtype,
            check_interval=config.rollout.refit_check_interval,
            meeting=layout.link,
        )
        with active(self.copy.layout):
            engine = build_engine(
                self.copy.model,
                self.copy.layout,
                config.rollout,
                vocab_size=shared_vocab_size(run, with_teacher=True),
                eos_id=run.tokenizer.eos_id,
                seed=config.training.seed,
            )
        self._source = build_source(config, self.copy.layout, engine, requests, before_generating=lambda: None)

    def prepare(self, step: int, batch: int, *, weights_of: int, given: Generated | None = None) -> Prepared:
        """Generate for ``step``, with the copy's weights, those that ``weights_of`` begins with; or take what is
        ``given``. And judge."""
        run, started = self._run, perf_counter()
        run.monitor.begin_step(step)
        run.monitor.phases.begin("rollout")
        if given is None:
            with active(self.copy.layout):
                trajectories = self._source.take(step, batch)
                rollouts = everyones(trajectories.rollouts, self.copy.layout)
            if weights_of != step:
                rollouts = [replace(one, versions=(weights_of,) * len(one.response)) for one in rollouts]
            given = Generated(step, batch, weights_of, rollouts, trajectories.metrics)
        generated = perf_counter()
        run.monitor.phases.begin("teacher")
        counts = self.judge.judge(self._inputs(given.rollouts, step))
        seconds = {"seconds_generation": generated - started, "seconds_judgement": perf_counter() - generated}
        run.monitor.phases.end()
        return Prepared(given, counts, seconds)

    def _inputs(self, rollouts: Sequence[Rollout], step: int) -> list[list[TeacherInput]]:
        """What the teacher reads of the micro-batches that each student replica will build."""
        size, lengths = self.judge.student_replicas, [num_tokens(one) for one in rollouts]
        multiple = lcm(self._run.layout.sequence_cut, self.judge.student_sequence_cut)
        return [
            [
                teacher_input(one)
                for one in batch_of_step(
                    self._run,
                    split_for_rank(rollouts, lengths, rank=rank, size=size),
                    step,
                    data_parallel_size=size,
                    pad_to_multiple_of=multiple,
                ).micro_batches
            ]
            for rank in range(size)
        ]
