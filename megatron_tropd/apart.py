"""A teacher on the ranks that generate, for a student that trains on others (``sides``).

The teacher's end builds every student replica's micro-batches as the student's end will, so that hidden states can
travel with the rollouts, in one exchange a step, as the rows that each tensor-parallel rank of the student's last stage
keeps. The two ends meet in their constructors, and then for each batch: ``JudgeApart.send``, ``TeacherApart.receive``.

Shape suffixes: ``N`` positions that carry loss, ``C`` one rank's share of N, ``H`` the teacher's hidden size,
``V`` vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tropd.distributed import Layout
from megatron_tropd.sides import Link
from megatron_tropd.teacher_pass import (
    Judged,
    Place,
    Places,
    TeacherInput,
    TeacherPass,
    deliveries,
    host_copy,
    last_stage_place,
)
from megatron_tropd.types import Batch, MicroBatch

# isort: split
from megatron.core.models.gpt import GPTModel

Counts = list[list[list[int]]]
"""Positions that carry loss, by student replica, micro-batch and (one) part."""


@dataclass(frozen=True)
class _Rank:
    """What each rank tells the others when the two ends meet."""

    teacher: Place | None
    student: Place | None
    sequence_cut: int
    student_replicas: int


def _meet(layout: Layout, *, is_teacher: bool) -> tuple[Link, list[_Rank], Places]:
    link = layout.link
    assert link is not None, "this job has one side"
    place, cut = last_stage_place(layout), layout.sequence_cut
    mine = _Rank(place, None, cut, 0) if is_teacher else _Rank(None, place, cut, layout.data_parallel_size)
    everyone: list[_Rank] = link.all_gather(mine)
    return link, everyone, Places.of([(rank.teacher, rank.student) for rank in everyone])


class TeacherApart:
    """The student's end, one of its ``teachers.Judges``."""

    seconds = 0.0
    """The student waits for rollouts, which come judged."""

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        padded_num_ids: int,
        hidden: Literal["device", "host"] = "device",
    ):
        """``layout`` is the student's, ``hidden_size`` and ``dtype`` are the teacher's, ``padded_num_ids`` its
        vocabulary padded for the student's layout. ``hidden`` says where hidden states wait for the schedule."""
        self._layout, self._hidden_size, self._dtype, self._hidden = layout, hidden_size, dtype, hidden
        self._link, everyone, self._places = _meet(layout, is_teacher=False)
        self.sequence_cut = everyone[self._link.leader_of_generators].sequence_cut
        self._judged: dict[int, Judged] = {}
        self._head_VH: torch.Tensor | None = None
        if layout.is_last_stage:
            self._head_VH = self._room(padded_num_ids // layout.tensor_parallel_size)
            self._link.exchange([], [(self._head_VH, self._places.sources[0, 0][0])])

    def receive(self, counts: Counts) -> None:
        """What the teacher left of the next batch's micro-batches, ``counts`` being those of ``JudgeApart.judge``."""
        self._judged = {}  # of a step that was prepared and not taken
        stays = self._hidden == "device" or self._layout.device.type == "cpu"
        for delivery in deliveries(counts, self._places):
            if self._link.rank in delivery.destinations:
                share_CH = self._room(delivery.num_rows)
                # One at a time, so that no more than one is on the device where they wait on the host.
                self._link.exchange([], [(share_CH, delivery.source)] if delivery.num_rows else [])
                waits_CH = share_CH if stays else host_copy(share_CH)
                self._judged[delivery.index] = Judged(waits_CH, delivery.num_positions)

    def judge(self, batch: Batch) -> list[Judged | None]:
        """See ``teachers.Judges``: what has been received, which is let go of."""
        received, self._judged = self._judged, {}
        judged = [received.get(index) for index in range(len(batch.micro_batches))]
        if self._layout.is_last_stage:
            found = [one and one.num_positions for one in judged]
            wanted = [one.loss_positions_N.shape[0] for one in batch.micro_batches]
            assert found == wanted, f"the teacher judged micro-batches of {found} positions, these have {wanted}"
        return judged

    def head(self, batch: MicroBatch) -> torch.Tensor:
        """See ``teachers.Judges``."""
        assert self._head_VH is not None
        return self._head_VH

    def _room(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self._hidden_size, dtype=self._dtype, device=self._layout.device)


class JudgeApart:
    """The teacher's end."""

    def __init__(self, teacher: GPTModel, layout: Layout, *, num_ids: int, padded_num_ids: int, offload: bool = False):
        """``teacher`` is this rank's slice in ``layout``; ``num_ids`` its true vocabulary, ``padded_num_ids`` its size
        padded for the student's layout. With ``offload`` its weights are in host memory but for the time of a pass."""
        self._link, everyone, self._places = _meet(layout, is_teacher=True)
        student = everyone[self._link.leader_of_trainers]
        self.student_sequence_cut, self.student_replicas = student.sequence_cut, student.student_replicas
        self._pass = TeacherPass(teacher, layout)
        self._found: dict[int, torch.Tensor] = {}
        self._counts: Counts = []
        self._send_head(layout, num_ids, padded_num_ids)
        if offload:
            self._pass.offload(keep=None)

    def judge(self, everyone: Sequence[Sequence[TeacherInput]]) -> Counts:
        """One pass over a batch, by student replica and micro-batch. Every rank of this side calls it."""
        self._counts = [[[one.positions_N.shape[0]] for one in inputs] for inputs in everyone]
        # Tensor-parallel ranks have the same rows: each keeps what it sends.
        sent = {one.job for one in deliveries(self._counts, self._places) if one.source == self._link.rank}
        self._found = {job: rows_NH for job, rows_NH in self._pass.judge(everyone).items() if job in sent}
        return self._counts

    def send(self) -> None:
        """What was judged last, to the student's end."""
        for delivery in deliveries(self._counts, self._places):
            if self._link.rank == delivery.source and delivery.num_rows:
                shares = delivery.shares(self._found.pop(delivery.job)).contiguous()
                self._link.exchange(list(zip(shares.unbind(), delivery.destinations, strict=True)), [])

    def _send_head(self, layout: Layout, num_ids: int, padded_num_ids: int) -> None:
        whole_VH = self._pass.whole_head(num_ids) if layout.data_parallel_rank == 0 else None
        if self._link.rank != self._places.sources[0, 0][0]:
            return
        assert whole_VH is not None
        padded_VH = torch.nn.functional.pad(whole_VH, (0, 0, 0, padded_num_ids - num_ids))
        self._link.exchange(
            [
                (share_VH.contiguous(), rank)
                for ranks in self._places.destinations.values()
                for share_VH, rank in zip(padded_VH.chunk(len(ranks)), ranks, strict=True)
            ],
            [],
        )
