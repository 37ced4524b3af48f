"""The layouts the package runs, those of them that fit, and the fastest of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_checks import problems
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.memory import RankMemory, Sizes, rank_memory, student_layout, teacher_layout
from megatron_tropd.planner.timing import StepTime, step_time

SEQUENCE_PARALLEL = True
"""Whether layouts with sequence parallelism are offered (wherever tensor parallelism is)."""
TEACHER_AHEAD = True
"""Whether a teacher in a layout of its own is offered."""
# These two and the ranges below are all the planner knows about which layouts exist; each is offered only where
# ``config_checks`` accepts it.
PIPELINE_SIZES = (1, 2, 4, 8, 16)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)


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
        """The student's and the teacher's layout."""
        return student_layout(self.config, self.world_size), teacher_layout(self.config, self.world_size)


def plans(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions, *, command: str = "train") -> list[Plan]:
    """The layouts of ``config`` on ``world_size`` GPUs that fit, fastest first; of equals, the simplest.

    Of each pair of layouts the fastest micro-batch size and engine batch that fit, with recomputation where it must be.
    """
    best: dict[tuple[Sizes, Sizes, str, bool], Plan] = {}
    for candidate in _candidates(config, world_size, gpu):
        plan = _sized(candidate, world_size, gpu, assumed, command)
        if plan is None:
            continue
        parallel = candidate.parallel
        key = (*plan.sizes, parallel.teacher_schedule, parallel.offload_teacher)
        if key not in best or (plan.time.total, plan.peak) < (best[key].time.total, best[key].peak):
            best[key] = plan
    return sorted(best.values(), key=_order)


def _order(plan: Plan) -> tuple[float, bool, bool, int]:
    parallel = plan.config.parallel
    return round(plan.time.total, 2), parallel.teacher_schedule == "ahead", parallel.offload_teacher, plan.peak


def _tensor_sizes(gpu: Gpu, world_size: int) -> Iterator[int]:
    size = 1
    while size <= min(gpu.per_node, world_size):
        yield size
        size *= 2


def _splits(model: ModelConfig, gpu: Gpu, world_size: int) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) sizes; tensor parallelism stays inside a node."""
    for tensor in _tensor_sizes(gpu, world_size):
        for pipeline in PIPELINE_SIZES:
            if world_size % (tensor * pipeline) == 0 and model.num_layers % pipeline == 0:
                yield tensor, pipeline


def _candidates(config: Config, world_size: int, gpu: Gpu) -> Iterator[Config]:
    """``config`` in every layout that ``config_checks`` accepts, but for the batch size."""
    for tensor, pipeline in _splits(config.student, gpu, world_size):
        shared = replace(
            config.parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=SEQUENCE_PARALLEL and tensor > 1,
            teacher_schedule="shared",
        )
        choices = [shared]
        if TEACHER_AHEAD and config.teacher is not None:
            for own_tensor, own_pipeline in _splits(config.teacher, gpu, world_size):
                ahead = replace(
                    shared,
                    teacher_schedule="ahead",
                    teacher_tensor_model_parallel_size=own_tensor,
                    teacher_pipeline_model_parallel_size=own_pipeline,
                )
                choices += [ahead, replace(ahead, offload_teacher=True, teacher_hidden="host")]
        for parallel in choices:
            yield replace(config, parallel=parallel)


def _sized(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions, command: str) -> Plan | None:
    """The fastest plan of this layout over micro-batch size, recomputation and engine batch; None where none fits."""
    found: list[Plan] = []
    for recompute in (False, True):
        for size in MICRO_BATCH_SIZES:
            training = replace(config.training, micro_batch_size=size, recompute=recompute)
            sized = replace(config, training=training)
            if problems(sized, world_size, command):
                continue
            plan = _largest_engine_batch(sized, world_size, gpu, assumed)
            if plan is not None:
                found.append(plan)
        if found:
            break
    return min(found, key=lambda plan: plan.time.total, default=None)


def _largest_engine_batch(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions) -> Plan | None:
    rows = config.training.global_batch_size // student_layout(config, world_size).replicas
    while rows:
        sized = replace(config, rollout=replace(config.rollout, max_batch_size=rows))
        memory = rank_memory(sized, world_size)
        if max(each.peak for each in memory.values()) <= gpu.memory - assumed.memory_reserve:
            return Plan(sized, world_size, memory, step_time(sized, world_size, gpu, assumed))
        if max(each.resident + each.training for each in memory.values()) > gpu.memory - assumed.memory_reserve:
            return None
        rows //= 2
    return None
