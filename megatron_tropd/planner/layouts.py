"""The layouts the package runs, those of them that fit, and the fastest of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_tropd.config import Config
from megatron_tropd.config_checks import problems
from megatron_tropd.planner.candidates import CONTEXT_SIZES, MICRO_BATCH_SIZES, engine_batches, students, with_teachers
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.lengths import in_flight
from megatron_tropd.planner.memory import RankMemory, rank_memory
from megatron_tropd.planner.plan import Plan, cost, order, room
from megatron_tropd.planner.side_layouts import side_plans
from megatron_tropd.planner.sizes import Sizes, rollout_layout
from megatron_tropd.planner.timing import step_time

MOST = 100
"""Layouts that a search hands back."""


def plans(
    config: Config, world_size: int, gpu: Gpu, assumed: Assumptions, *, command: str = "train", most: int = MOST
) -> list[Plan]:
    """The ``most`` fastest layouts of ``config`` on ``world_size`` GPUs that fit, fastest first but for what ``WORTH``
    adds to some; of equals, the simplest.

    Of each pair of tensor, pipeline and data parallel sizes of student and teacher there is one, the best over
    interleaved stages, spread experts, sizes of an inference copy, micro-batch size and engine batch, with
    recomputation where it must be. Sequences are cut (context parallelism) only where nothing fits otherwise. A config
    with ``training.one_step_off`` gets jobs with two sides (``side_plans``).
    """
    if config.training.one_step_off:
        return side_plans(config, world_size, gpu, assumed, most=most)
    for context in CONTEXT_SIZES:
        search = _Search(config, world_size, gpu, assumed, command, most)
        search.over(context)
        if search.found:
            return sorted(search.found.values(), key=order)[:most]
    return []


@dataclass
class _Search:
    """Best first: students in the order of what they cost at least, until no further one can be among the best."""

    config: Config
    world_size: int
    gpu: Gpu
    assumed: Assumptions
    command: str
    most: int
    found: dict[tuple[Sizes, Sizes, str, bool], Plan] = field(default_factory=dict)

    def over(self, context: int) -> None:
        """Fill ``found``."""
        everyone = students(self.config, self.world_size, self.gpu, self.command, context=context)
        alone = [(self._least(one), one) for one in everyone if self._fits_alone(one)]
        for least, student in sorted(alone, key=lambda pair: pair[0]):
            if least > self._limit():
                break
            for candidate in with_teachers(student, self.world_size, self.gpu):
                self._try(candidate)

    def _try(self, candidate: Config) -> None:
        if self._least(candidate, candidate.teacher is not None) > self._limit():
            return
        plan = self._sized(candidate)
        if plan is None:
            return
        key = (*plan.sizes, candidate.parallel.teacher_schedule, candidate.parallel.offload_teacher)
        if key not in self.found or order(plan) < order(self.found[key]):
            self.found[key] = plan

    def _limit(self) -> float:
        """What a further layout must not exceed."""
        if len(self.found) < self.most:
            return math.inf
        return sorted(cost(plan.config, plan.time) for plan in self.found.values())[self.most - 1]

    def _least(self, config: Config, with_teacher: bool = False) -> float:
        """The cost at least: at the best micro-batch size, with all rows decoded at once."""
        wide = self._with_rows(config if with_teacher else replace(config, teacher=None), self._all_rows(config))
        sized = (
            replace(wide, training=replace(config.training, micro_batch_size=size, recompute=False))
            for size in MICRO_BATCH_SIZES
        )
        return min(cost(each, step_time(each, self.world_size, self.gpu, self.assumed)) for each in sized)

    def _fits_alone(self, config: Config) -> bool:
        """Whether the student would fit if there were no teacher, at its smallest."""
        training = replace(config.training, micro_batch_size=1, recompute=True)
        alone = self._with_rows(replace(config, teacher=None, training=training), 1)
        return self._room(rank_memory(alone, self.world_size)) >= 0

    def _sized(self, config: Config) -> Plan | None:
        """The fastest plan of this layout over micro-batch size, recomputation and engine batch, if any fits."""
        found: list[Plan] = []
        for recompute in (False, True):
            for size in MICRO_BATCH_SIZES:
                training = replace(config.training, micro_batch_size=size, recompute=recompute)
                sized = replace(config, training=training)
                if problems(sized, self.world_size, self.command):
                    if size == 1:
                        return None  # nor is any other accepted
                    continue
                plan = self._largest_engine_batch(sized)
                if plan is None:
                    break  # nor does a larger micro-batch fit
                found.append(plan)
            if found:
                break
        return min(found, key=lambda plan: plan.time.total, default=None)

    def _largest_engine_batch(self, config: Config) -> Plan | None:
        for rows in engine_batches(self._all_rows(config)):
            sized = self._with_rows(config, rows)
            memory = rank_memory(sized, self.world_size)
            if self._room(memory) >= 0:
                return Plan(sized, self.world_size, memory, step_time(sized, self.world_size, self.gpu, self.assumed))
            limit = self.gpu.memory - self.assumed.memory_reserve
            if max(each.resident + max(each.training, each.teacher_pass) for each in memory.values()) > limit:
                return None
        return None

    def _room(self, memory: dict[str, RankMemory]) -> float:
        return room(memory, self.gpu, self.assumed)

    def _all_rows(self, config: Config) -> int:
        return math.ceil(in_flight(config) / rollout_layout(config, self.world_size).replicas)

    @staticmethod
    def _with_rows(config: Config, rows: int) -> Config:
        return replace(config, rollout=replace(config.rollout, max_batch_size=rows))
