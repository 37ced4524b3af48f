"""The teacher judges a whole rollout batch before the student's schedule starts, in a layout of its own.

The teacher's layers run forward only through Megatron's schedule and leave one hidden state for each position that
carries loss. They travel to the student's last stage, where each tensor-parallel rank keeps its share of the rows, on
the device or in host memory; the fused loss then multiplies them with the teacher's output weight, cut as the
student's vocabulary is. So the teacher needs neither the student's layout nor, between two passes, the device.

Shape suffixes: ``N`` positions that carry loss, ``C`` one rank's share of N, ``H`` the teacher's hidden size,
``V`` vocabulary shard.
"""

from __future__ import annotations

from time import perf_counter
from typing import Literal

import torch
import torch.distributed as dist

from megatron_tropd.distributed import Layout, message_group
from megatron_tropd.pair import output_weight
from megatron_tropd.teacher_pass import (
    Delivery,
    Judged,
    Place,
    Places,
    TeacherInput,
    TeacherPass,
    deliveries,
    host_copy,
    last_stage_place,
    teacher_input,
)
from megatron_tropd.types import Batch

# isort: split
from megatron.core.models.gpt import GPTModel


class TeacherAhead:
    """The frozen teacher in its own layout, and the way of its hidden states to the student's last stage."""

    def __init__(
        self,
        teacher: GPTModel,
        layout: Layout,
        student_layout: Layout,
        *,
        num_ids: int,
        padded_num_ids: int,
        hidden: Literal["device", "host"] = "device",
        offload: bool = False,
    ):
        """``teacher`` is this rank's slice in ``layout``, of the student's context-parallel size: a model of its
        own, or the student, whose adapters are off for the time of a pass.

        ``num_ids`` is the teacher's true vocabulary, ``padded_num_ids`` its size padded for the student's layout.
        ``hidden`` says where hidden states wait for the student's schedule; with ``offload`` the teacher's layers are
        in host memory but for the time of a pass.
        """
        self.teacher = teacher
        self.layout = layout
        self.student_layout = student_layout
        self.hidden = hidden
        self.seconds = 0.0
        """Time of the last pass."""
        self._pass = TeacherPass(teacher, layout)
        everyone: list[tuple[Place | None, Place | None]] = [(None, None)] * student_layout.world_size
        dist.all_gather_object(everyone, (last_stage_place(layout), last_stage_place(student_layout)))
        self._places = Places.of(everyone)
        self._messages = message_group(student_layout)
        self.head_VH = self._head(num_ids, padded_num_ids)
        """The output weight's shard of this rank in the student's layout; None off its last stage."""
        if offload:
            # The loss reads the output weight between the passes, so where it is the teacher's own it stays.
            self._pass.offload(keep=self.head_VH)

    def judge(self, batch: Batch) -> list[Judged | None]:
        """One pass over the global batch; for each micro-batch of this rank what its loss reads, None off the student's
        last stage. Every rank calls it."""
        started = perf_counter()
        everyone = self._everyones_inputs(batch)
        counts = [[one.num_positions(self.layout) for one in inputs] for inputs in everyone]
        rank, planned = dist.get_rank(), list(deliveries(counts, self._places))
        # Tensor-parallel ranks have the same rows: each keeps what it sends, and that until it is sent.
        sent = {delivery.job for delivery in planned if delivery.source == rank}
        found = {job: rows_NH for job, rows_NH in self._pass.judge(everyone).items() if job in sent}
        judged: list[Judged | None] = [None] * len(batch.micro_batches)
        for delivery in planned:
            share_CH = self._deliver(found.pop(delivery.job) if delivery.source == rank else None, delivery)
            if share_CH is not None:
                judged[delivery.index] = Judged(self._wait_place(share_CH), delivery.num_positions)
        self.seconds = perf_counter() - started
        return judged

    def _everyones_inputs(self, batch: Batch) -> list[list[TeacherInput]]:
        """What the teacher reads, by student replica and micro-batch."""
        mine = [teacher_input(one) for one in batch.micro_batches]
        found = [mine] * self.student_layout.data_parallel_size
        if len(found) > 1:
            dist.all_gather_object(found, mine, group=self.student_layout.groups.dp)
        return found

    def _deliver(self, rows_NH: torch.Tensor | None, delivery: Delivery) -> torch.Tensor | None:
        """Send each tensor-parallel rank of the student's last stage its rows; returns those for this rank."""
        rank, num_rows = dist.get_rank(), delivery.num_rows
        operations, kept = [], None
        if rank == delivery.source:
            assert rows_NH is not None
            for destination, share_CH in zip(delivery.destinations, delivery.shares(rows_NH), strict=True):
                if destination == rank:
                    kept = share_CH.clone()  # not a view that keeps everyone's rows
                elif num_rows:
                    operations.append(dist.P2POp(dist.isend, share_CH.contiguous(), destination, self._messages))
        elif rank in delivery.destinations:
            kept = torch.empty(
                num_rows, self.teacher.config.hidden_size,
                dtype=self.teacher.config.params_dtype, device=self.layout.device,
            )  # fmt: skip
            if num_rows:
                operations.append(dist.P2POp(dist.irecv, kept, delivery.source, self._messages))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return kept

    def _wait_place(self, share_CH: torch.Tensor) -> torch.Tensor:
        if self.hidden == "device" or share_CH.device.type == "cpu":
            return share_CH
        return host_copy(share_CH)

    def _head(self, num_ids: int, padded_num_ids: int) -> torch.Tensor | None:
        """The teacher's output weight cut for the student's layout, one shard at a time to whoever needs it."""
        students = self.student_layout
        if self.layout is students:
            return output_weight(self.teacher) if students.is_last_stage else None
        source = self._places.sources[0, 0][0]
        whole_VH = self._pass.whole_head(num_ids) if self.layout.data_parallel_rank == 0 else None
        num_rows = padded_num_ids // students.tensor_parallel_size
        kept = None
        for shard in range(students.tensor_parallel_size):
            share_VH = torch.zeros(
                num_rows, self.teacher.config.hidden_size,
                dtype=self.teacher.config.params_dtype, device=self.layout.device,
            )  # fmt: skip
            if dist.get_rank() == source:
                assert whole_VH is not None
                rows_VH = whole_VH[shard * num_rows : min((shard + 1) * num_rows, num_ids)]
                share_VH[: rows_VH.shape[0]] = rows_VH
            dist.broadcast(share_VH, source)
            if students.is_last_stage and students.tensor_parallel_rank == shard:
                kept = share_VH
        return kept
