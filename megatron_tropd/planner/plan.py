"""One layout of a run with what it takes, and the order in which layouts are listed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.config import Config
from megatron_tropd.config_sides import num_generators
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.memory import RankMemory
from megatron_tropd.planner.sides import generators_of, trainers_of
from megatron_tropd.planner.sizes import Sizes, student_layout, teacher_layout
from megatron_tropd.planner.timing import StepTime

WORTH = 0.03
"""Share of a step that interleaved stages, spread experts and an inference copy (which a job with two sides has) must
each save to come before a layout without them: a prediction is not good enough for less."""


@dataclass(frozen=True)
class Plan:
    """One layout of a run, with what it takes."""

    config: Config
    world_size: int
    memory: dict[str, RankMemory]
    time: StepTime

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank."""
        return max(memory.peak for memory in self.memory.values())

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """The student's and the teacher's layout, with two sides each on its own."""
        count = num_generators(self.config, "train")
        if count:
            trainers, generators = trainers_of(self.config), generators_of(self.config)
            return student_layout(trainers, self.world_size - count), teacher_layout(generators, count)
        return student_layout(self.config, self.world_size), teacher_layout(self.config, self.world_size)


def cost(config: Config, time: StepTime) -> float:
    """Seconds of a step, and what ``WORTH`` adds to them: what layouts are compared by."""
    parallel = config.parallel
    extras = (
        parallel.virtual_pipeline_model_parallel_size > 1,
        max(parallel.expert_model_parallel_size, parallel.teacher_expert_model_parallel_size or 1) > 1,
        config.rollout.tensor_model_parallel_size is not None or config.training.one_step_off,
    )
    return time.total * (1 + WORTH * sum(extras))


def order(plan: Plan) -> tuple[float, bool, bool, int]:
    """Sorts the cheapest first, of equals the simplest."""
    parallel = plan.config.parallel
    seconds = round(cost(plan.config, plan.time), 2)
    return seconds, parallel.teacher_schedule == "ahead", parallel.offload_teacher, plan.peak


def room(memory: dict[str, RankMemory], gpu: Gpu, assumed: Assumptions) -> float:
    """Bytes left on the fullest rank; below 0 where it does not fit, there or in its host's memory."""
    device = gpu.memory - assumed.memory_reserve - max(each.peak for each in memory.values())
    host = assumed.host_memory - max(each.on_host for each in memory.values())
    return device if host >= 0 else min(device, host)
