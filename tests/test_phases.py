"""The clock of a rank: on a GPU every phase is an NVTX range, opened and closed in order."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd import phases


def test_every_phase_is_an_nvtx_range_on_a_gpu_and_its_memory_is_the_allocators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(phases, "ON_CPU", False)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * len(calls))
    begun: list[str] = []
    clock = phases.Phases(begun.append)
    clock.begin("rollout")
    clock.begin("schedule")
    clock.add("teacher", 0.5)
    clock.begin("rollout")
    costs = clock.take()
    clock.end()
    assert calls == ["reset", "rollout", "pop", "reset", "schedule", "pop", "reset", "rollout", "pop"]
    assert begun == ["rollout", "schedule", "rollout"]
    # The highest of its occurrences.
    assert {name: cost.peak_bytes for name, cost in costs.items()} == {"rollout": 56, "schedule": 35, "teacher": 0}
    assert costs["teacher"].seconds == 0.5 and clock.costs == {}
