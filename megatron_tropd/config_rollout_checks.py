"""Whether a configuration's partial rollouts and over-sampling can run. Imports no torch."""

from __future__ import annotations

import math

from megatron_tropd.config import Config
from megatron_tropd.config_require import require


def check_pace(config: Config, num_replicas: int) -> None:
    """What `train` needs of ``rollout.partial_tokens``, ``partial_learn_from`` and ``over_sampling``; ``num_replicas``:
    of the weights that generate."""
    rollout = config.rollout
    require(
        rollout.over_sampling >= 1,
        f"rollout.over_sampling must be at least 1, found {rollout.over_sampling}: it is sequences in flight for each "
        "that a step learns from",
    )
    most = rollout.partial_tokens
    require(most is None or most >= 1, f"rollout.partial_tokens must be at least 1, found {most}: leave it out for off")
    require(
        most is not None or rollout.partial_learn_from == "segments",
        f"rollout.partial_learn_from={rollout.partial_learn_from} needs rollout.partial_tokens, the most tokens that a "
        "sample is given in one step",
    )
    if most is not None:
        _check_partial(config)
    if rollout.over_sampling > 1:
        _check_over_sampling(config, num_replicas)


def _check_partial(config: Config) -> None:
    rollout, training = config.rollout, config.training
    require(
        training.steps_per_rollout == 1,
        f"rollout.partial_tokens continues samples in every step, and training.steps_per_rollout "
        f"{training.steps_per_rollout} generates in some alone: set it to 1; partial_learn_from=finished with "
        "over_sampling reuses rollouts too",
    )
    require(
        config.objective != "seq-kd",
        "objective seq-kd learns from teacher answers alone, so there is nothing to pause: leave out "
        "rollout.partial_tokens",
    )
    require(
        not config.objective_options.task_reward,
        "objective_options.task_reward compares the responses to a prompt, which partial rollouts end in different "
        "steps: leave out the one or rollout.partial_tokens",
    )
    require(
        rollout.over_sampling == 1 or rollout.partial_learn_from == "finished",
        f"rollout.over_sampling={rollout.over_sampling} with partial_learn_from=segments would drop nothing: a step "
        "learns from every sample in flight. Raise training.global_batch_size, or use partial_learn_from=finished",
    )


def _check_over_sampling(config: Config, num_replicas: int) -> None:
    rollout, size = config.rollout, config.training.global_batch_size
    require(
        config.objective != "seq-kd",
        "objective seq-kd learns from teacher answers alone, and rollout.over_sampling is about the student's: set it "
        "to 1",
    )
    found, in_flight = rollout.over_sampling * size, rollout.num_in_flight(size)
    if rollout.partial_tokens is not None:
        require(
            math.isclose(found, in_flight),
            f"rollout.over_sampling {rollout.over_sampling} x training.global_batch_size {size} = {found:g} is no "
            f"number of sequences: try {math.ceil(found) / size:g}",
        )
        return
    require(
        rollout.tensor_model_parallel_size is None or size % num_replicas == 0,
        f"with rollout.over_sampling each of the {num_replicas} replicas of the inference copy keeps as many sequences "
        f"as the others, and training.global_batch_size {size} does not divide: choose a multiple of {num_replicas}, "
        "or raise rollout.tensor_model_parallel_size",
    )
    unit = math.lcm(num_replicas, rollout.samples_per_prompt)
    require(
        math.isclose(found, in_flight) and in_flight % unit == 0,
        f"rollout.over_sampling {rollout.over_sampling} x training.global_batch_size {size} = {found:g} must be a "
        f"multiple of the {num_replicas} replicas that generate and of rollout.samples_per_prompt "
        f"{rollout.samples_per_prompt}: try {math.ceil(found / unit) * unit / size:g}",
    )
