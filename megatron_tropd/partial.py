"""Partial rollouts: samples that are generated a piece at a step, by the weights of that step.

No step waits for the longest response: a sample that has not ended is paused, kept here and in checkpoints, and
continued by the next step's weights. What a step learns from is one of two things:

- ``segments``: whatever was generated in this step, of every sample in flight. Those tokens are the student's of now,
  so learning is strictly on-policy; what older weights wrote before them is context, as a prompt is, and carries no
  loss. Distillation judges every token, so none has to wait for the end of its response.
- ``finished``: whole responses, the same number in every step. Their earlier tokens are stale: of older weights, whose
  log-probs are those the ratio of PPO and the importance weights are taken against.

Every data-parallel rank holds all samples; requests are dealt out anew for every piece. So a checkpoint continues in
any layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_tropd.batch import num_tokens, split_for_rank
from megatron_tropd.distributed import Layout
from megatron_tropd.metrics import imbalance
from megatron_tropd.rollout import RolloutEngine
from megatron_tropd.rollout_records import integer, read_kept, read_record, record_of
from megatron_tropd.training_requests import Requests
from megatron_tropd.trajectories import Trajectories, has_ended
from megatron_tropd.types import Rollout

FILE = "paused_rollouts.jsonl"


@dataclass(frozen=True)
class Pace:
    """How much is generated in a step, and what of it is learned from."""

    learn_from: Literal["segments", "finished"]
    max_new_tokens: int
    """Most tokens of a piece."""
    num_learned: int
    """Sequences that a step learns from."""
    num_in_flight: int
    """Sequences that are begun and not learned from to their end; those that each step fills up to."""
    max_response_length: int


class PartialRollouts:
    """See the module; a ``TrajectorySource``."""

    def __init__(
        self,
        engine: RolloutEngine,
        layout: Layout,
        pace: Pace,
        requests: Requests,
        before_generating: Callable[[], None] = lambda: None,
    ):
        self._engine, self._layout, self._pace, self._requests = engine, layout, pace, requests
        self._before_generating = before_generating
        self._samples: dict[int, Rollout] = {}
        """By id, ascending; ``response`` is all that the student has written."""
        self._next_sample: int | None = None
        """None until the first step says where the data stands."""

    def take(self, step: int, batch: int) -> Trajectories:
        """See ``TrajectorySource``."""
        num_new = self._fill(step, batch)
        learned, metrics = self._segments(step) if self._pace.learn_from == "segments" else self._finished(step)
        rank, size = self._layout.data_parallel_rank, self._layout.data_parallel_size
        # Who generated a sample need not learn from it: lengths are known now.
        mine = split_for_rank(learned, [num_tokens(sample) for sample in learned], rank=rank, size=size)
        assert self._next_sample is not None
        metrics |= {"new_samples": float(num_new), "paused_samples": float(len(self._samples))}
        return Trajectories(mine, metrics | self._requests.epochs(self._next_sample))

    def can_pause(self) -> bool:
        """Always: a checkpoint holds the samples."""
        return True

    def refused(self) -> None:
        """With ``segments``, no sample of the refused step is continued; whole responses have been handed out."""
        if self._pace.learn_from == "segments":
            self.clear()

    def clear(self) -> None:
        """Drop every sample; those that follow are new ones."""
        self._samples = {}

    def _fill(self, step: int, batch: int) -> int:
        """Begin samples until as many as wanted are in flight; returns how many."""
        if self._next_sample is None:
            self._next_sample = batch * self._pace.num_learned
        num_new = self._pace.num_in_flight - len(self._samples)
        for request in self._requests.begin(self._next_sample, num_new, step):
            self._samples[request.sample_id] = Rollout(request, (), (), False)
        self._next_sample += num_new
        return num_new

    def _segments(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The pieces of this step, of every sample; those that have ended are done with."""
        pieces, generated = self._generate(step)
        metrics = self._metrics(step, 1, generated, list(self._samples.values()))
        self._drop(self._ended())
        return pieces, metrics | {"rollout_age": 0.0}

    def _finished(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The oldest samples that have ended, after as many pieces as it takes."""
        rounds = generated = 0
        while len(self._ended()) < self._pace.num_learned:
            _, tokens = self._generate(step)
            rounds, generated = rounds + 1, generated + tokens
        learned = self._ended()[: self._pace.num_learned]
        lags = [step - version for sample in learned for version in sample.versions]
        self._drop(learned)
        return learned, self._metrics(step, rounds, generated, learned) | {"rollout_age": sum(lags) / max(len(lags), 1)}

    def _metrics(self, step: int, rounds: int, generated: int, learned: Sequence[Rollout]) -> dict[str, float]:
        oldest = min((version for sample in learned for version in sample.versions), default=step)
        return {
            "rollout_rounds": float(rounds),
            "rollout_imbalance": imbalance(generated, self._layout),
            "max_version_lag": float(step - oldest),
        }

    def _ended(self) -> list[Rollout]:
        return [sample for sample in self._samples.values() if has_ended(sample, self._pace.max_response_length)]

    def _drop(self, samples: Sequence[Rollout]) -> None:
        for sample in samples:
            del self._samples[sample.request.sample_id]

    def _generate(self, step: int) -> tuple[list[Rollout], int]:
        """A piece of every sample that has not ended, by sample id; and the tokens that this replica generated."""
        paused = [s for s in self._samples.values() if not has_ended(s, self._pace.max_response_length)]
        requests = [replace(sample.request, earlier=sample.response) for sample in paused]
        mine = split_for_rank(
            requests,
            [self._requests.expected_length(request, self._pace.max_new_tokens) for request in requests],
            rank=self._layout.data_parallel_rank,
            size=self._layout.data_parallel_size,
            even=False,
        )
        self._before_generating()
        pieces = self._engine.generate(
            mine, max_response_length=self._pace.max_response_length, max_new_tokens=self._pace.max_new_tokens
        )
        found = _exchange(pieces, self._layout.groups.dp)
        everyone = [Rollout(request, *found[request.sample_id]) for request in requests]
        for piece in everyone:
            self._append(piece, step)
        return everyone, sum(len(piece.response) for piece in pieces)

    def _append(self, piece: Rollout, step: int) -> None:
        sample = self._samples[piece.request.sample_id]
        self._samples[piece.request.sample_id] = Rollout(
            sample.request,
            sample.response + piece.response,
            sample.log_probs + piece.log_probs,
            piece.finished,
            sample.entropies + piece.entropies,
            sample.versions + (step,) * len(piece.response),
        )

    def files(self, *, last: bool = False) -> dict[str, str]:
        """The samples as JSON lines, after a line with the next sample's id; every token with its weights' version."""
        lines: list[dict[str, Any]] = [{"next_sample": self._next_sample or 0}]
        lines += [record_of(sample) for sample in self._samples.values()]
        return {FILE: "".join(json.dumps(line) + "\n" for line in lines)}

    def restore(self, checkpoint: Path) -> None:
        """Raises CheckpointError for a file that ``files`` has not written; without one there are only new samples."""
        kept = read_kept(checkpoint / FILE, self._read)
        if kept is not None:
            self._next_sample, samples = kept
            # The oldest, where a changed config has fewer in flight.
            self._samples = {sample.request.sample_id: sample for sample in samples[: self._pace.num_in_flight]}

    def _read(self, head: dict[str, Any], records: list[dict[str, Any]]) -> tuple[int, list[Rollout]]:
        next_sample = integer(head["next_sample"])
        samples = [read_record(record, self._requests.again) for record in records]
        for sample in samples:
            if sample.request.sample_id >= next_sample:
                raise ValueError(f"sample {sample.request.sample_id} is not below {next_sample}, the next one")
            if len(sample.versions) != len(sample.response):
                raise ValueError(f"sample {sample.request.sample_id}: not one version for each token")
        return next_sample, samples


def _exchange(pieces: Sequence[Rollout], group: dist.ProcessGroup) -> dict[int, tuple[Any, ...]]:
    """The pieces of all ranks of ``group`` by sample id, as `Rollout` takes them after its request, which all have."""
    mine = [(p.request.sample_id, p.response, p.log_probs, p.finished, p.entropies) for p in pieces]
    everyone = [mine]
    if group.size() > 1:
        everyone = [[] for _ in range(group.size())]
        dist.all_gather_object(everyone, mine, group=group)
    return {sample_id: tuple(piece) for found in everyone for sample_id, *piece in found}
