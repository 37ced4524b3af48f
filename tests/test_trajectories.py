"""Trajectories made for several optimizer steps at once, and the first of more than a step needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_tropd.config import Config, DataConfig, ModelConfig, ObjectiveOptions, TrainingConfig
from megatron_tropd.config_rollout import RolloutConfig
from megatron_tropd.prompt import Prompt
from megatron_tropd.trainer import _objective
from megatron_tropd.trajectories import Trajectories, TrajectoryQueue, first_to_end, has_ended
from megatron_tropd.types import Rollout, RolloutRequest


def rollout(sample_id: int, response: tuple[int, ...], *, finished: bool = True) -> Rollout:
    prompt = Prompt("p", "", (2,), "")
    return Rollout(RolloutRequest(sample_id, prompt, ()), response, (-1.0,) * len(response), finished)


def test_a_queue_makes_what_the_steps_to_the_next_multiple_need() -> None:
    made: list[tuple[int, int]] = []

    def make(step: int, batch: int) -> Trajectories:
        made.append((step, batch))
        return Trajectories([rollout(batch, (5, 6))], {"batch": float(batch)})

    queue = TrajectoryQueue(make, steps_per_rollout=3, train_iters=8)

    def take(step: int, batch: int) -> tuple[int, float, tuple[int, ...]]:
        taken = queue.take(step, batch)
        assert taken.metrics["batch"] == taken.rollouts[0].request.sample_id
        return taken.rollouts[0].request.sample_id, taken.metrics["rollout_age"], taken.rollouts[0].versions

    assert take(0, 0) == (0, 0, ()) and made == [(0, 0), (1, 1), (2, 2)] and not queue.can_pause()
    # Both tokens are of the weights of step 0.
    assert take(1, 1) == (1, 1, (0, 0)) and take(2, 2) == (2, 2, (0, 0)) and queue.can_pause()
    take(3, 3)
    queue.clear()  # back to step 3, with the prompts after those of step 4
    assert take(3, 5) == (5, 0, ()) and made[-3:] == [(3, 5), (4, 6), (5, 7)]
    queue.clear()
    assert take(7, 9) == (9, 0, ()) and made[-1] == (7, 9) and queue.can_pause()  # no step 8


def test_the_first_to_end_are_those_with_the_fewest_new_tokens() -> None:
    rollouts = [
        rollout(9, (3, 4, 1)),
        rollout(4, (3, 3, 3, 3, 3), finished=False),  # a full budget is an end
        rollout(7, (3, 1)),
        rollout(5, (3,), finished=False),  # cut off
        rollout(2, (3, 4, 1)),
        rollout(6, (1,)),
    ]

    def first(count: int) -> list[int]:
        return [chosen.request.sample_id for chosen in first_to_end(rollouts, count, 5)]

    assert first(2) == [7, 6]
    assert first(3) == [7, 2, 6]  # of 9 and 2, as long, the lower id; in the order they came
    assert first(5) == [9, 4, 7, 2, 6]
    continued = replace(rollouts[3].request, prefix=(8, 8), earlier=(8, 8))
    assert has_ended(replace(rollouts[3], request=continued), 5) and not has_ended(rollouts[3], 5)


@pytest.mark.parametrize(("name", "clips"), [("tropd", True), ("opd", True), ("mopd", False), ("rkl-exact", False)])
def test_the_ratio_is_clipped_where_rollouts_are_reused(name: str, clips: bool) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8)
    data = DataConfig(train="train.jsonl")
    config = Config(model, data, "run", objective=name, training=TrainingConfig(steps_per_rollout=2))
    assert _objective(config).clip_ratio_high == (0.28 if clips else None)
    for learn_from, stale in (("finished", True), ("segments", False)):
        partial = RolloutConfig(partial_tokens=2, partial_learn_from=learn_from)  # type: ignore[arg-type]
        partial_config = replace(config, training=TrainingConfig(), rollout=partial)
        assert _objective(partial_config).clip_ratio_low == (0.2 if clips and stale else None)
    assert _objective(replace(config, training=TrainingConfig())).clip_ratio_high is None
    if clips:
        options = ObjectiveOptions(clip_ratio_low=0.1, clip_ratio_high=0.1)
        assert _objective(replace(config, objective_options=options)).clip_ratio_low == 0.1
