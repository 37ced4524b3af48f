"""Jobs with two sides (``training.one_step_off``): how many ranks generate, and the layout of each side.

The sides work at the same time on ranks of their own, so each is looked at alone; of the pairs the fastest are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.config import Config
from megatron_tropd.config_checks import problems
from megatron_tropd.planner.candidates import MICRO_BATCH_SIZES, engine_batches, splits
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.memory import RankMemory
from megatron_tropd.planner.plan import Plan, order
from megatron_tropd.planner.sides import (
    generator_memory,
    generator_seconds,
    job_memory,
    job_time,
    trainer_memory,
    trainer_time,
)

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)
"""Of the ranks, those that generate."""
TRIED_IN_VAIN = 2000
"""Pairs after which the search ends, where as many in a row were refused or known."""


@dataclass(frozen=True)
class _Half:
    """One side: the options that are its own, and the seconds it works."""

    parallel: dict[str, Any]
    training: dict[str, Any]
    rollout: dict[str, Any]
    seconds: float

    def of(self, config: Config) -> Config:
        """``config`` with these options."""
        return replace(
            config,
            parallel=replace(config.parallel, **self.parallel),
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

    def pairs(self) -> Iterator[tuple[float, int, _Half, _Half]]:
        """(About the seconds of a step, ranks that generate, what trains, what generates); both use one micro-batch
        size."""
        counts = {round(share * self.world_size) for share in SHARES}
        for count in sorted(counts - {0, self.world_size}):
            config = _with_count(self.config, count)
            for size in MICRO_BATCH_SIZES:
                sized = replace(config, training=replace(config.training, micro_batch_size=size))
                generators = list(self._generators(sized, count))
                for trainers in self._trainers(sized, self.world_size - count):
                    for each in generators:
                        yield max(trainers.seconds, each.seconds), count, trainers, each

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
                half = _Half(parallel, training, {}, 0.0)
                # What an evaluation would take is looked at with the whole job.
                sized = replace(half.of(config), rollout=replace(config.rollout, max_batch_size=1))
                if self._fits(trainer_memory(sized, count)):
                    yield replace(half, seconds=trainer_time(sized, count, self.gpu, self.assumed).total)
                    break

    def _generators(self, config: Config, count: int) -> Iterator[_Half]:
        teachers = [(1, 1)] if config.teacher is None else splits(config.teacher, self.gpu, count)
        copies = [tensor for tensor, pipeline in splits(config.student, self.gpu, count) if pipeline == 1]
        for tensor, pipeline in teachers:
            parallel = {"teacher_tensor_model_parallel_size": tensor, "teacher_pipeline_model_parallel_size": pipeline}
            for copy in copies:
                alone = _Half(parallel, {}, {"tensor_model_parallel_size": copy, "max_batch_size": 1}, 0.0)
                if not self._fits(generator_memory(alone.of(config), count)):
                    continue
                in_flight = config.rollout.num_in_flight(config.training.global_batch_size)
                for rows in engine_batches(math.ceil(in_flight * copy / count)):
                    half = replace(alone, rollout={**alone.rollout, "max_batch_size": rows})
                    sized = half.of(config)
                    if self._fits(generator_memory(sized, count)):
                        yield replace(half, seconds=sum(generator_seconds(sized, count, self.gpu, self.assumed)))
                        break

    def _fits(self, memory: dict[str, RankMemory]) -> bool:
        return max(each.peak for each in memory.values()) <= self.gpu.memory - self.assumed.memory_reserve
