"""A rank killed in each phase of a step: what the restarted run leaves is what an undisturbed one leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import faults

TRIALS = 5


def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    identical = faults.run_trials(TRIALS, seed=1, folder=tmp_path)
    output = capsys.readouterr().out
    assert identical == TRIALS, output
    assert all(f" {phase} " in output for phase in faults.PHASES)
    record_property("trials", ("killed runs restarted, each identical to the undisturbed one", identical))


def test_every_trial_is_drawn_from_its_seed_alone() -> None:
    drawn = [faults.draw_fault(0, trial) for trial in range(50)]
    assert drawn == [faults.draw_fault(0, trial) for trial in range(50)]
    assert {(fault.layout, fault.rank, fault.phase) for fault in drawn} >= {
        (layout, rank, phase) for layout in faults.LAYOUTS for rank in range(2) for phase in faults.PHASES
    }
