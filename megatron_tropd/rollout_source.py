"""Which trajectories `train` learns from: each step's own, the first of a few more, or pieces over several steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_tropd.batch import num_tokens, split_for_rank
from megatron_tropd.config import Config
from megatron_tropd.distributed import Layout
from megatron_tropd.metrics import imbalance, share
from megatron_tropd.partial import Pace, PartialRollouts
from megatron_tropd.rollout import RolloutEngine
from megatron_tropd.training_requests import Requests
from megatron_tropd.trajectories import Trajectories, TrajectoryQueue, TrajectorySource, first_to_end
from megatron_tropd.types import Rollout


def build_source(
    config: Config,
    layout: Layout,
    engine: RolloutEngine,
    requests: Requests,
    *,
    before_generating: Callable[[], None],
    racing: Layout | None = None,
) -> TrajectorySource:
    """What ``rollout`` and ``training.steps_per_rollout`` ask for, for the replicas of ``layout``.

    With over-sampling each replica of ``racing`` generates a share and keeps the first to end: a layout over the same
    ranks, in which ``engine`` takes what it is asked for with ``enough``; None: ``layout``.
    """
    rollout, training = config.rollout, config.training
    if rollout.partial_tokens is not None:
        pace = Pace(
            learn_from=rollout.partial_learn_from,
            max_new_tokens=rollout.partial_tokens,
            num_learned=training.global_batch_size,
            num_in_flight=config.rollout.num_in_flight(config.training.global_batch_size),
            max_response_length=rollout.max_response_length,
        )
        return PartialRollouts(engine, layout, pace, requests, before_generating)

    def make(step: int, batch: int) -> Trajectories:
        before_generating()
        return _generate_whole(config, layout, racing or layout, engine, requests, step, batch)

    return TrajectoryQueue(make, training.steps_per_rollout, training.train_iters)


def _generate_whole(
    config: Config, layout: Layout, racing: Layout, engine: RolloutEngine, requests: Requests, step: int, batch: int
) -> Trajectories:
    """This rank's responses from beginning to end: all that it asked for or, with over-sampling, the first to end."""
    longest, num_learned = config.rollout.max_response_length, config.training.global_batch_size
    count = config.rollout.num_in_flight(num_learned)
    generating = layout if count == num_learned else racing
    rank, size = generating.data_parallel_rank, generating.data_parallel_size
    asked = requests.begin(batch * count, count, step)
    lengths = [requests.expected_length(request) for request in asked]
    # Of ranks that generate for others the number need not divide the batch.
    mine = split_for_rank(asked, lengths, rank=rank, size=size, even=layout.link is None)
    epochs = requests.epochs((batch + 1) * count)
    if count == num_learned:
        rollouts = engine.generate(mine, max_response_length=longest)
        generated = sum(len(rollout.response) for rollout in rollouts)
        return Trajectories(rollouts, {"rollout_imbalance": imbalance(generated, layout), **epochs})
    rollouts = engine.generate(mine, max_response_length=longest, enough=num_learned // size)
    kept = first_to_end(rollouts, num_learned // size, longest)
    generated = sum(len(rollout.response) for rollout in rollouts)
    dropped = generated - sum(len(rollout.response) for rollout in kept)
    metrics = {
        "rollout_imbalance": imbalance(generated, racing),
        "dropped_token_share": share(dropped, generated, racing),
    }
    if racing is not layout:
        everyone = everyones(kept, racing)
        lengths = [num_tokens(rollout) for rollout in everyone]
        kept = split_for_rank(everyone, lengths, rank=layout.data_parallel_rank, size=layout.data_parallel_size)
    return Trajectories(kept, metrics | epochs)


def everyones(mine: Sequence[Rollout], layout: Layout) -> list[Rollout]:
    """Those of all data-parallel replicas of ``layout``, by sample id."""
    shares = [list(mine)] * layout.data_parallel_size
    if len(shares) > 1:
        dist.all_gather_object(shares, list(mine), group=layout.groups.dp)
    return sorted((one for share in shares for one in share), key=lambda one: one.request.sample_id)
