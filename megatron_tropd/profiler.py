"""A PyTorch profile of chosen steps, as a trace in the run folder that Perfetto and chrome://tracing open."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps ``start <= step < end`` of one rank into ``<folder>/rank_N_steps_A_to_B.json.gz``."""

    def __init__(self, folder: Path, rank: int, *, start: int, end: int, with_cuda: bool):
        """``with_cuda``: kernels too. A run that is resumed between ``start`` and ``end`` profiles what is left."""
        self._folder, self._rank, self._start, self._end = folder, rank, start, end
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if with_cuda:
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile: torch.profiler.profile | None = None
        self._first = self._last = 0

    def begin_step(self, step: int) -> None:
        """Start where ``step`` is the first to be profiled."""
        if self._profile is None and self._start <= step < self._end:
            self._profile = torch.profiler.profile(activities=self._activities, acc_events=True)
            self._profile.start()
            self._first = step
        self._last = step

    def end_step(self, step: int) -> None:
        """Stop and write where ``step`` is the last to be profiled."""
        if step + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """Write what has been profiled, also of a run that ends in the middle."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{self._rank}_steps_{self._first}_to_{self._last}.json.gz"
        profile.export_chrome_trace(str(path))
        logger.info("profile of steps %d to %d: %s", self._first, self._last, path)
