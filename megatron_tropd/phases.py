"""Where the time and the memory of a step go on this rank, and which rank is the slowest in each phase.

A step is one phase after another; beginning one ends the one before. On a GPU each phase is an NVTX range (Nsight
Systems shows it) and in a PyTorch profile it is a ``record_function`` of the same name. Every phase ends with a read of
device results by the host, so wall time is the phase's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_tropd.distributed import ON_CPU, Layout

PHASES = ("evaluate", "rollout", "refit", "batch", "schedule", "teacher", "optimizer", "log", "save")
"""``schedule``: forward and backward of both models over all micro-batches, the reduction of gradients included;
``teacher``, the teacher's forward alone, is a part of it. ``refit``, the weights' way into an inference copy, is a part
of what generates first: ``evaluate`` or ``rollout``."""


@dataclass
class Cost:
    """What a phase took on this rank."""

    seconds: float = 0.0
    """Wall time, summed over its occurrences."""
    peak_bytes: int = 0
    """High-water mark: of the CUDA allocator where there is a GPU, else of the process's resident memory."""

    def include(self, other: Cost) -> None:
        """Add another occurrence."""
        self.seconds += other.seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@dataclass
class Phases:
    """The clock of a rank: ``begin`` a phase, ``end`` the last, ``take`` what they cost."""

    on_begin: Callable[[str], None] | None = None
    """Called with the name of every phase that begins."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """Name to cost, since the last ``take``."""

    def __post_init__(self) -> None:
        self._name: str | None = None
        self._started = 0.0
        self._range: Any = None

    def begin(self, name: str) -> None:
        """End the phase in hand, if there is one, and begin ``name``, one of ``PHASES``."""
        assert name in PHASES, name
        self.end()
        if self.on_begin is not None:
            self.on_begin(name)
        _reset_peak_memory()
        if not ON_CPU:
            torch.cuda.nvtx.range_push(name)
        self._range = torch.profiler.record_function(name)
        self._range.__enter__()
        self._name, self._started = name, perf_counter()

    def end(self) -> None:
        """End the phase in hand, if there is one."""
        if self._name is None:
            return
        self.add(self._name, perf_counter() - self._started, _peak_memory())
        self._range.__exit__(None, None, None)
        if not ON_CPU:
            torch.cuda.nvtx.range_pop()
        self._name = None

    def add(self, name: str, seconds: float, peak_bytes: int = 0) -> None:
        """Count time that was measured elsewhere, such as the teacher's part of the schedule."""
        self.costs.setdefault(name, Cost()).include(Cost(seconds, peak_bytes))

    def take(self) -> dict[str, Cost]:
        """The costs since the last call, which are then forgotten; the phase in hand is ended."""
        self.end()
        costs, self.costs = self.costs, {}
        return costs


@dataclass(frozen=True)
class PhaseReport:
    """One phase over all ranks."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    peak_rank: int
    """The rank with the highest memory mark."""
    peak_bytes: int


def compare_ranks(costs: dict[str, Cost], layout: Layout) -> dict[str, PhaseReport]:
    """Slowest rank and highest memory of every phase that some rank had; the same on every rank, which all call it.

    One all-gather of ``[len(PHASES), 2]`` numbers a rank. Where ranks wait for one another inside a phase (collectives
    of schedule and optimizer), the slow one has the others' time there too: ``rollout`` and ``teacher`` tell it apart.
    """
    rows = [(costs[name].seconds, float(costs[name].peak_bytes)) if name in costs else (0.0, 0.0) for name in PHASES]
    mine_P2 = torch.tensor(rows, dtype=torch.float64, device=layout.device)
    all_RP2 = mine_P2.new_empty(layout.world_size * len(PHASES), 2)
    dist.all_gather_into_tensor(all_RP2, mine_P2)
    by_rank = all_RP2.view(layout.world_size, len(PHASES), 2).tolist()
    reports = {}
    for index, name in enumerate(PHASES):
        seconds = [rank[index][0] for rank in by_rank]
        peaks = [rank[index][1] for rank in by_rank]
        if max(seconds) > 0:
            slowest, highest = seconds.index(max(seconds)), peaks.index(max(peaks))
            longest, middle = round(max(seconds), 6), round(median(seconds), 6)
            reports[name] = PhaseReport(slowest, longest, middle, highest, int(max(peaks)))
    return reports


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Linux: lower the mark VmHWM to the present resident size (see proc(5), clear_refs)."""


def _reset_peak_memory() -> None:
    if not ON_CPU:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # another system, or a container that forbids it: the mark is then the whole run's
        _CLEAR.write_text(_RESET_PEAK)


def _peak_memory() -> int:
    """Bytes at the highest point since the last reset."""
    if not ON_CPU:
        return torch.cuda.max_memory_allocated()
    try:
        status = _STATUS.read_text()
    except OSError:
        return psutil.Process().memory_info().rss
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024
