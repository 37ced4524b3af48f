"""The soak's judgement, on series whose slope is known, and on logs as ranks leave them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.soak import grows, stretches, trend


def test_a_slope_is_the_change_over_a_thousand_steps() -> None:
    found = trend([1.0 + 0.002 * step for step in range(400)])
    assert found.slope == pytest.approx(2.0) and found.noise == pytest.approx(0.0, abs=1e-9)
    assert grows(found, 1.9) and not grows(found, 2.1)
    assert not grows(trend([1.0 - 0.002 * step for step in range(400)]), 0.0)


def test_the_noise_is_that_of_the_slope_also_where_neighbours_are_alike() -> None:
    generator = np.random.default_rng(0)
    slopes, noises = [], []
    for _ in range(400):
        series = np.convolve(generator.normal(size=409), np.ones(10) / 10, mode="valid")
        found = trend(series.tolist())
        slopes.append(found.slope)
        noises.append(found.noise)
    assert np.sqrt(np.mean(np.square(noises))) == pytest.approx(np.std(slopes), rel=0.15)


def test_stretches_are_what_lies_between_starts_without_warm_up_and_torn_lines(tmp_path: Path) -> None:
    def step(number: int) -> str:
        seconds = {"rollout": 0.25, "schedule": 0.5, "teacher": 0.125, "save": 9.0}
        return json.dumps({"event": "step", "step": number, "seconds": seconds})

    start = json.dumps({"event": "start"})
    lines = [
        start,
        *(step(n) for n in range(30)),
        '{"event": "st',
        start,
        *(step(n) for n in range(20, 45)),
        start,
        step(45),
    ]
    log = tmp_path / "rank_0.jsonl"
    log.write_text("\n".join(lines) + "\n")
    found = stretches(log, 5)
    assert [[steps[0]["step"], steps[-1]["step"]] for steps in found] == [[5, 29], [25, 44]]
    assert {entry["seconds"] for steps in found for entry in steps} == {0.75}
