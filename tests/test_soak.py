"""The soak's judgement, on series whose slope is known, and on logs as ranks leave them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.soak import Trend, limit, stretches, trend


def test_a_slope_is_the_change_over_a_thousand_steps_whatever_the_levels() -> None:
    found = trend([[1.0 + 0.002 * step for step in range(400)], [5.0 + 0.002 * step for step in range(200)]])
    assert found.slope == pytest.approx(2.0) and found.noise == pytest.approx(0.0, abs=1e-9)
    assert found.freedom == 16 + 8 - 3
    assert limit(found, 1.9, 0.01) < found.slope < limit(found, 2.1, 0.01)
    falling = trend([[1.0 - 0.002 * step for step in range(400)]])
    assert falling.slope < limit(falling, 0.0, 0.01)


def test_the_noise_is_that_of_the_slope_also_where_neighbours_are_alike_and_alarms_are_as_rare_as_said() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        series = [np.convolve(generator.normal(size=409), np.ones(10) / 10, mode="valid") for _ in range(2)]
        found.append(trend([values.tolist() for values in series], block=50))
    noise = np.sqrt(np.mean([line.noise**2 for line in found]))
    assert noise == pytest.approx(np.std([line.slope for line in found]), rel=0.15)
    alarms = np.mean([line.slope > limit(line, 0.0, 0.05) for line in found])
    assert 0.03 < alarms < 0.09  # alike neighbours still reach over the ends of blocks


def test_the_limits_are_those_of_the_tables() -> None:
    # One-sided 5 % and 0.5 % of Student's t distribution with 10 and 30 degrees of freedom, as printed in tables.
    expected = {(0.95, 10): 1.812, (0.995, 10): 3.169, (0.95, 30): 1.697, (0.995, 30): 2.750}
    for (probability, freedom), value in expected.items():
        assert limit(Trend(0.0, 1.0, freedom), 0.0, 1 - probability) == pytest.approx(value, abs=5e-4)


def test_stretches_are_what_lies_between_starts_without_warm_up_and_torn_lines(tmp_path: Path) -> None:
    def step(number: int) -> str:
        seconds = {"rollout": 0.25, "schedule": 0.5, "teacher": 0.125, "save": 9.0}
        return json.dumps({"event": "step", "step": number, "seconds": seconds})

    start = json.dumps({"event": "start"})
    lines = [
        start,
        *(step(n) for n in range(60)),
        '{"event": "st',
        start,
        *(step(n) for n in range(40, 95)),
        start,
        step(95),
    ]
    log = tmp_path / "rank_0.jsonl"
    log.write_text("\n".join(lines) + "\n")
    found = stretches(log, 5)
    assert [[steps[0]["step"], steps[-1]["step"]] for steps in found] == [[5, 59], [45, 94]]
    assert {entry["seconds"] for steps in found for entry in steps} == {0.75}
