"""One step off: the next step's rollouts are generated and judged, on ranks of their own, while this one trains.

The trainers lead. Before each step the two sides meet: the trainers say which step they are at and hand their weights
over, the generators hand over the step's rollouts and what the teacher left of them, and begin the next step's with the
weights that they have just got. So rollouts are of the weights of one step before; the first ones, and those after a
rollback, for which nothing is prepared, of the step's own.

A checkpoint holds the rollouts that the next step learns from, whose weights are gone: a resumed run continues bit for
bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from megatron_tropd.apart import Counts, TeacherApart
from megatron_tropd.batch import num_tokens, split_for_rank
from megatron_tropd.distributed import Layout
from megatron_tropd.refit import Refit
from megatron_tropd.rollout_records import integer, read_kept, read_record, record_of
from megatron_tropd.training_requests import Requests
from megatron_tropd.trajectories import Trajectories
from megatron_tropd.types import Rollout

FILE = "next_rollouts.jsonl"
READY = "ready"
"""The generators' answer to an order, before anything is sent: until then the trainers waited for their work."""


@dataclass(frozen=True)
class Generated:
    """The rollouts of a step."""

    step: int
    batch: int
    """As ``TrajectorySource.take`` has them."""
    weights_of: int
    """The step that began with the weights that they are of."""
    rollouts: list[Rollout]
    """Of all ranks, by sample id."""
    metrics: dict[str, float]
    """What is told of how they were made."""


@dataclass(frozen=True)
class Order:
    """What the trainers ask for when the sides meet."""

    step: int
    batch: int
    version: int
    """Of their weights."""
    given: Generated | None = None
    """To be judged as they are; None: to be generated."""
    last: bool = False
    """Nothing will be asked for after it."""


@dataclass(frozen=True)
class Prepared:
    """What the generators give; the hidden states that ``counts`` is about follow."""

    generated: Generated
    counts: Counts
    seconds: dict[str, float]
    """What it took, by metric."""
    stop: bool = False
    """SIGTERM has arrived on one of the generators."""


class OneStepOff:
    """The trainers' end; a ``TrajectorySource``."""

    def __init__(
        self,
        layout: Layout,
        requests: Requests,
        refit: Refit,
        teacher: TeacherApart,
        *,
        train_iters: int,
        version: Callable[[], int],
        before_sending: Callable[[], None],
        stop: Callable[[], None],
    ):
        """``version`` is that of the weights, ``before_sending`` makes them whole; ``stop`` asks the run to end."""
        assert layout.link is not None
        self._layout, self._link = layout, layout.link
        self._requests, self._refit, self._teacher = requests, refit, teacher
        self._train_iters, self._version, self._before_sending = train_iters, version, before_sending
        self._stop = stop
        self._at: tuple[int, int] | None = None
        """(Step, number of the batch) that was taken last."""
        self._next: Prepared | None = None
        """What a checkpoint has asked for already."""
        self._seconds_next = 0.0
        """What that took."""
        self._given: Generated | None = None

    def take(self, step: int, batch: int) -> Trajectories:
        """See ``TrajectorySource``."""
        found, seconds_before = self._next, self._seconds_next
        if found is None or not is_for(found.generated, step, batch):
            found, seconds_before = self._meet(step, batch), 0.0
        self._at, self._next = (step, batch), None
        generated, rank, size = found.generated, self._layout.data_parallel_rank, self._layout.data_parallel_size
        lengths = [num_tokens(one) for one in generated.rollouts]
        mine = split_for_rank(generated.rollouts, lengths, rank=rank, size=size)
        metrics = generated.metrics | found.seconds | {"rollout_age": float(step - generated.weights_of)}
        return Trajectories(mine, metrics, seconds_before)

    def can_pause(self) -> bool:
        """Always: a checkpoint holds the next rollouts."""
        return True

    def refused(self) -> None:
        """The next step takes others anyway."""

    def clear(self) -> None:
        """Forget what is prepared: the next meeting asks for another step, so the generators do too."""
        self._next = None

    def files(self, *, last: bool = False) -> dict[str, str]:
        """The next step's rollouts as JSON lines, after a line that says for which step they are; on the rank that
        writes. Meets the generators, so every rank calls it."""
        if self._at is None or self._at[0] + 1 >= self._train_iters:
            return {}
        step, batch = (number + 1 for number in self._at)
        if self._next is None:
            started = perf_counter()
            self._next = self._meet(step, batch, last=last)
            self._seconds_next = perf_counter() - started
        if not self._layout.is_main:
            return {}
        generated = self._next.generated
        head = {"step": step, "batch": batch, "weights_of": generated.weights_of, "metrics": generated.metrics}
        lines = [head, *map(record_of, generated.rollouts)]
        return {FILE: "".join(json.dumps(line) + "\n" for line in lines)}

    def restore(self, checkpoint: Path) -> None:
        """Raises CheckpointError for a file that ``files`` has not written; without one the next rollouts are new."""
        self._given = read_kept(checkpoint / FILE, self._read)

    def _read(self, head: dict[str, Any], records: list[dict[str, Any]]) -> Generated:
        step, batch, weights_of = (integer(head[name]) for name in ("step", "batch", "weights_of"))
        metrics = {str(name): float(value) for name, value in head["metrics"].items()}
        rollouts = [read_record(record, self._requests.again) for record in records]
        return Generated(step, batch, weights_of, rollouts, metrics)

    def close(self) -> None:
        """The run is over: let the generators go."""
        self._link.broadcast(None, self._link.leader_of_trainers)

    def _meet(self, step: int, batch: int, *, last: bool = False) -> Prepared:
        given, self._given = self._given, None
        if given is not None and not is_for(given, step, batch):
            given = None
        self._before_sending()
        version, link = self._version(), self._link
        started = perf_counter()
        link.broadcast(Order(step, batch, version, given, last), link.leader_of_trainers)
        link.broadcast(READY, link.leader_of_generators)
        waited = perf_counter() - started
        self._refit.follow(version)
        started = perf_counter()
        found: Prepared = link.broadcast(None, link.leader_of_generators)
        waited += perf_counter() - started
        self._teacher.receive(found.counts)
        if found.stop:
            self._stop()
        seconds = found.seconds | {"seconds_waiting": waited, "seconds_refit": self._refit.pop_seconds()}
        return replace(found, seconds=seconds)


def is_for(generated: Generated, step: int, batch: int) -> bool:
    """Whether these are the rollouts of that step, with that batch's prompts and draws."""
    return (generated.step, generated.batch) == (step, batch)
