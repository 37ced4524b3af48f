"""What watches a run: journal, clock of the phases, profiler and trackers, put together for one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from megatron_tropd.config import Config
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.journal import Journal
from megatron_tropd.phases import Cost, Phases, compare_ranks
from megatron_tropd.profiler import StepProfiler
from megatron_tropd.trackers import Tracker, build_trackers


class Monitor:
    """A context manager around a run; every rank has one."""

    def __init__(self, config: Config, layout: Layout, folder: Path, command: str):
        trains = command in ("train", "sft")
        monitoring = config.monitoring
        self._layout, self._interval = layout, monitoring.log_interval
        self.journal = Journal(folder, layout.rank, command, train_iters=config.training.train_iters if trains else 0)
        self.phases = Phases(self.journal.beat)
        self._trackers: list[Tracker] = []
        self._profiler: StepProfiler | None = None
        if monitoring.profile and trains and layout.rank in monitoring.profile_ranks:
            start, end = monitoring.profile_step_start, monitoring.profile_step_end
            self._profiler = StepProfiler(folder / "profile", layout.rank, start=start, end=end, with_cuda=not ON_CPU)
        self._interval_costs: dict[str, Cost] = {}

    def __enter__(self) -> Monitor:
        """Open the journal."""
        self.journal.__enter__()
        layout = self._layout
        self.journal.event(
            "layout",
            world_size=layout.world_size,
            tensor_parallel_rank=layout.tensor_parallel_rank,
            pipeline_rank=layout.pipeline_rank,
            context_parallel_rank=layout.context_parallel_rank,
            data_parallel_rank=layout.data_parallel_rank,
            device=str(layout.device),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The exit report first: what follows may hang where the run has."""
        self.phases.end()
        self.journal.__exit__(kind, error, trace)
        if self._profiler is not None:
            self._profiler.close()
        for tracker in self._trackers:
            tracker.close(succeeded=error is None)

    def open_trackers(self, config: Config, folder: Path) -> list[Tracker]:
        """The trackers of rank 0, which the monitor closes; none elsewhere."""
        if self._layout.is_main:
            self._trackers = build_trackers(config, folder)
        return self._trackers

    def begin_step(self, step: int) -> None:
        """Optimizer step ``step``, from 0, begins."""
        self.journal.step = step
        if self._profiler is not None:
            self._profiler.begin_step(step)

    def end_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The step is over, save included: log what it took on this rank.

        Every ``log_interval`` steps the ranks are compared; returns that comparison as scalars, else nothing.
        """
        journal, step = self.journal, self.journal.step
        assert step is not None
        costs = self.phases.take()
        if self._profiler is not None:
            self._profiler.end_step(step)
        journal.steps_done = step + 1
        journal.event(
            "step",
            step=step,
            loss=metrics.get("loss"),
            grad_norm=metrics.get("grad_norm"),
            seconds={name: round(cost.seconds, 6) for name, cost in costs.items()},
            peak_gb={name: round(cost.peak_bytes / 1e9, 4) for name, cost in costs.items() if cost.peak_bytes},
            rss_gb=round(psutil.Process().memory_info().rss / 1e9, 6),
            open_files=psutil.Process().num_fds() if os.name == "posix" else None,
        )
        for name, cost in costs.items():
            self._interval_costs.setdefault(name, Cost()).include(cost)
        if not self._interval or (step + 1) % self._interval:
            return {}
        return self._compare_ranks(step)

    def _compare_ranks(self, step: int) -> dict[str, float]:
        costs, self._interval_costs = self._interval_costs, {}
        reports = compare_ranks(costs, self._layout)
        values: dict[str, Any] = {}
        for name, report in reports.items():
            values[f"phases/{name}_seconds_slowest"] = report.slowest_seconds
            values[f"phases/{name}_seconds_median"] = report.median_seconds
            if report.peak_bytes:
                values[f"phases/{name}_peak_gb"] = report.peak_bytes / 1e9
        if self._layout.is_main:
            phases = {name: asdict(report) for name, report in reports.items()}  # seconds and bytes
            self.journal.event("stragglers", step=step, phases=phases)
        return values
