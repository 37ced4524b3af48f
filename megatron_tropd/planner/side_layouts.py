"""Jobs with two sides (``training.one_step_off``): how many ranks generate, and the layout of each side.

The sides work at the same time on ranks of their own, so each is looked at alone; of the pairs the fastest are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tropd.config import Config
from megatron_tropd.config_checks import problems
from megatron_tropd.planner.candidates import MICRO_BATCH_SIZES, engine_batches, in_stages, splits
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.lengths import in_flight
from megatron_tropd.planner.memory import RankMemory
from megatron_tropd.planner.plan import Plan, order, room
from megatron_tropd.planner.sides import (
    generator_memory,
    generator_seconds,
    job_memory,
    job_time,
    receiving_ranks,
    refit_seconds,
    trainer_memory,
    trainer_time,
    trainers_evaluate,
    transfer_seconds,
)

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)
"""Of the ranks, those that generate; and whatever leaves 1, 2, 4, ... that train, at least ``FEWEST`` of all."""
FEWEST = 1 / 32
TRIED_IN_VAIN = 2000
"""Pairs after which the search ends, where as many in a row were refused or known."""


@dataclass(frozen=True)
class _Half:
    """One side: the options that are its own, and the seconds it works."""

    parallel: dict[str, Any]
    training: dict[str, Any]
    rollout: dict[str, Any]
    rows: float
    """Of the engine: those that generate have so many, and those that train can have no more, where they evaluate."""
    seconds: float = 0.0
    meeting: float = 0.0
    """Seconds to hand over what it has to, while neither side works."""

    def of(self, config: Config) -> Config:
        """``config`` with these options."""
        parallel = replace(config.parallel, **self.parallel)
        teacher = config.teacher
        if teacher is not None:
            teacher = in_stages(teacher, parallel.teacher_pipeline_model_parallel_size or 1)
        return replace(
            config,
            student=in_stages(config.student, parallel.pipeline_model_parallel_size),
            teacher=teacher,
            parallel=parallel,
            training=replace(config.training, **self.training),
            rollout=replace(config.rollout, **self.rollout),
        )


def side_plans(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions, *, most: int) -> list[Plan]:
    """The ``most`` fastest jobs with two sides that fit: one for each number of ranks that generate and each pair of
    student's and teacher's sizes, the best over the copy's size, micro-batch size and engine batch, with recomputation
    where it must be."""
    search = _SideSearch(_plain(config), world_size, gpu, assumed)
    found: dict[object, Plan] = {}
    in_vain = 0
    for _, count, trainers, generators in sorted(search.pairs(), key=lambda pair: pair[0]):
        sized = generators.of(trainers.of(_with_count(search.config, count)))
        key = (count, *trainers.parallel.values(), *generators.parallel.values())
        plan = None if key in found else search.plan(sized)
        in_vain = in_vain + 1 if plan is None else 0
        if plan is not None:
            found[key] = plan
        if len(found) == most or in_vain == TRIED_IN_VAIN:
            break
    return sorted(found.values(), key=order)


def _plain(config: Config) -> Config:
    """``config`` one step off, without the options of a layout that the search does not choose."""
    parallel = replace(
        config.parallel,
        teacher_schedule="ahead",
        context_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        teacher_expert_model_parallel_size=None,
        teacher_hidden="device",
        offload_teacher=False,
    )
    return replace(config, parallel=parallel, training=replace(config.training, one_step_off=True))


def _with_count(config: Config, count: int) -> Config:
    return replace(config, parallel=replace(config.parallel, generator_ranks=count))


@dataclass(frozen=True)
class _SideSearch:
    config: Config
    world_size: int
    gpu: Gpu
    assumed: Assumptions
    timed: dict[tuple[object, ...], _Half] = field(default_factory=dict)
    """What generates, by layout and engine batch."""

    def pairs(self) -> Iterator[tuple[float, int, _Half, _Half]]:
        """(About the seconds of a step, ranks that generate, what trains, what generates); both use one micro-batch
        size."""
        for count in self._counts():
            config = _with_count(self.config, count)
            for size in MICRO_BATCH_SIZES:
                sized = replace(config, training=replace(config.training, micro_batch_size=size))
                generators = list(self._generators(sized, count))
                for trainers in self._trainers(sized, self.world_size - count):
                    for largest in generators:
                        each = self._generator(sized, count, largest, trainers.rows)
                        seconds = max(trainers.seconds, each.seconds) + trainers.meeting + each.meeting
                        yield seconds, count, trainers, each

    def _counts(self) -> list[int]:
        world, trainers = self.world_size, 1
        counts = {round(share * world) for share in SHARES}
        while trainers < world:
            if trainers >= FEWEST * world:
                counts.add(world - trainers)
            trainers *= 2
        return sorted(counts - {0, world})

    def plan(self, config: Config) -> Plan | None:
        """With the whole job's memory and time, or None where it is refused or does not fit."""
        if problems(config, self.world_size, "train"):
            return None
        memory = job_memory(config, self.world_size)
        if not self._fits(memory):
            return None
        return Plan(config, self.world_size, memory, job_time(config, self.world_size, self.gpu, self.assumed))

    def _trainers(self, config: Config, count: int) -> Iterator[_Half]:
        for tensor, pipeline in splits(config.student, self.gpu, count):
            if config.training.global_batch_size * tensor * pipeline < count:
                continue
            for recompute in (False, True):
                parallel = {
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": pipeline,
                    "sequence_parallel": tensor > 1,
                }
                training = {"micro_batch_size": config.training.micro_batch_size, "recompute": recompute}
                sized = _Half(parallel, training, {}, 0).of(config)
                rows = self._evaluation_rows(sized, count)
                if rows:
                    seconds = trainer_time(sized, count, self.gpu, self.assumed).total
                    ends = receiving_ranks(sized, count)
                    meeting = transfer_seconds(sized, ends, self.world_size, self.gpu, self.assumed)
                    yield _Half(parallel, training, {}, rows, seconds, meeting)
                if rows >= in_flight(config):
                    break

    def _evaluation_rows(self, config: Config, count: int) -> float:
        """The most that the engine may have on the ranks that train; 0 where they do not fit at all."""
        evaluates = trainers_evaluate(config)
        for rows in engine_batches(in_flight(config)) if evaluates else (1,):
            sized = replace(config, rollout=replace(config.rollout, max_batch_size=rows))
            if self._fits(trainer_memory(sized, count)):
                return rows if evaluates else math.inf
        return 0

    def _generators(self, config: Config, count: int) -> Iterator[_Half]:
        """Every layout whose tensor-parallel ranks are of one node, with the largest engine batch that fits."""
        teachers = [(1, 1)] if config.teacher is None else splits(config.teacher, self.gpu, count)
        copies = [tensor for tensor, pipeline in splits(config.student, self.gpu, count) if pipeline == 1]
        first = self.world_size - count if self.world_size > self.gpu.per_node else 0
        copies = [tensor for tensor in copies if first % tensor == 0]
        for tensor, pipeline in teachers:
            if first % tensor:
                continue
            parallel = {"teacher_tensor_model_parallel_size": tensor, "teacher_pipeline_model_parallel_size": pipeline}
            for copy in copies:
                halves = [
                    _Half(parallel, {}, {"tensor_model_parallel_size": copy, "max_batch_size": rows}, rows)
                    for rows in engine_batches(math.ceil(in_flight(config) * copy / count))
                ]
                if self._fits(generator_memory(halves[-1].of(config), count)):
                    yield next(half for half in halves if self._fits(generator_memory(half.of(config), count)))

    def _generator(self, config: Config, count: int, largest: _Half, most: float) -> _Half:
        """That layout with at most ``most`` rows, and the seconds it takes."""
        rows = int(min(largest.rows, most))
        key = (count, config.training.micro_batch_size, rows, *largest.parallel.values(), *largest.rollout.values())
        if key not in self.timed:
            half = replace(largest, rollout={**largest.rollout, "max_batch_size": rows}, rows=rows)
            seconds = sum(generator_seconds(half.of(config), count, self.gpu, self.assumed))
            num_trainers = self.world_size - count
            meeting = refit_seconds(half.of(config), num_trainers, self.world_size, self.gpu, self.assumed)
            self.timed[key] = replace(half, seconds=seconds, meeting=meeting)
        return self.timed[key]

    def _fits(self, memory: dict[str, RankMemory]) -> bool:
        return room(memory, self.gpu, self.assumed) >= 0
