"""Trajectories made for several optimizer steps at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_tropd.config import Config, DataConfig, ModelConfig, ObjectiveOptions, TrainingConfig
from megatron_tropd.trainer import _objective
from megatron_tropd.trajectories import TrajectoryQueue


def test_a_queue_makes_what_the_steps_to_the_next_multiple_need() -> None:
    made: list[tuple[int, int]] = []

    def make(step: int, batch: int) -> list:
        made.append((step, batch))
        return [batch]

    queue = TrajectoryQueue(make, steps_per_rollout=3, train_iters=8)
    assert queue.take(0, 0) == ([0], 0) and made == [(0, 0), (1, 1), (2, 2)] and not queue.is_empty()
    assert queue.take(1, 1) == ([1], 1) and queue.take(2, 2) == ([2], 2) and queue.is_empty()
    queue.take(3, 3)
    queue.clear()  # back to step 3, with the prompts after those of step 4
    assert queue.take(3, 5) == ([5], 0) and made[-3:] == [(3, 5), (4, 6), (5, 7)]
    queue.clear()
    assert queue.take(7, 9) == ([9], 0) and made[-1] == (7, 9) and queue.is_empty()  # no step 8


@pytest.mark.parametrize(("name", "clips"), [("tropd", True), ("opd", True), ("mopd", False), ("rkl-exact", False)])
def test_the_ratio_is_clipped_where_rollouts_are_reused(name: str, clips: bool) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8)
    data = DataConfig(train="train.jsonl")
    config = Config(model, data, "run", objective=name, training=TrainingConfig(steps_per_rollout=2))
    assert _objective(config).clip_ratio_high == (0.28 if clips else None)
    assert _objective(replace(config, training=TrainingConfig())).clip_ratio_high is None
    if clips:
        options = ObjectiveOptions(clip_ratio_low=0.1, clip_ratio_high=0.1)
        assert _objective(replace(config, objective_options=options)).clip_ratio_low == 0.1
