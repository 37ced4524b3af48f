"""The teacher judges a whole rollout batch before the student's schedule starts, in a layout of its own.

The teacher's layers run forward only through Megatron's schedule and leave one hidden state for each position that
carries loss. They travel to the student's last stage, where each tensor-parallel rank keeps its share of the rows, on
the device or in host memory; the fused loss then multiplies them with the teacher's output weight, cut as the
student's vocabulary is. So the teacher needs neither the student's layout nor, between two passes, the device.

Shape suffixes: ``B`` sequences, ``S`` positions, ``N`` positions that carry loss, ``C`` one rank's share of N,
``H`` the teacher's hidden size, ``V`` vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal

import torch
import torch.distributed as dist

from megatron_tropd.distributed import Layout, active, message_group
from megatron_tropd.lora import adapters_off
from megatron_tropd.packing import part_of_inputs
from megatron_tropd.pair import loss_position_hidden, model_inputs, output_weight
from megatron_tropd.types import Batch, MicroBatch

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


@dataclass(frozen=True)
class Judged:
    """What the teacher left of one micro-batch for this rank."""

    share_CH: torch.Tensor
    """This tensor-parallel rank's rows of ``[N, H]``, padded to the same number on each."""
    num_positions: int
    """N."""


@dataclass(frozen=True)
class _Input:
    """What the teacher reads of one micro-batch."""

    tokens_BS: torch.Tensor
    positions_N: torch.Tensor
    """In the flattened ``[B * S]``."""
    packed_lengths: tuple[int, ...] | None
    """As `MicroBatch.packed_lengths`."""

    def part(self, layout: Layout) -> _Input:
        """What this context-parallel rank of ``layout`` has of it."""
        return self._part(layout.context_parallel_rank, layout.context_parallel_size)

    def num_positions(self, layout: Layout) -> list[int]:
        """N of every part."""
        size = layout.context_parallel_size
        return [self._part(rank, size).positions_N.shape[0] for rank in range(size)]

    def _part(self, rank: int, size: int) -> _Input:
        if size == 1:
            return self
        cut = part_of_inputs(self.tokens_BS, self.positions_N, self.packed_lengths, rank=rank, size=size)
        return _Input(*cut, self.packed_lengths)


@dataclass(frozen=True)
class _Places:
    """Global ranks, the same table on every rank; a part is what one context-parallel rank has of every sequence."""

    sources: dict[tuple[int, int], list[int]]
    """By teacher replica and part: the tensor-parallel ranks of its last stage."""
    destinations: dict[tuple[int, int], list[int]]
    """By student replica and part: the tensor-parallel ranks of its last stage, in order."""


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
        self._places = _find_places(layout, student_layout)
        self._messages = message_group(student_layout)
        self.head_VH = self._head(num_ids, padded_num_ids)
        """The output weight's shard of this rank in the student's layout; None off its last stage."""
        # The loss reads the output weight between the passes, so where it is the teacher's own it stays.
        moved = [weight for weight in teacher.parameters() if weight is not self.head_VH] if offload else []
        self._on_host = [(weight, _host_copy(weight)) for weight in moved]
        self._put_away()

    def judge(self, batch: Batch) -> list[Judged | None]:
        """One pass over the global batch; for each micro-batch of this rank what its loss reads, None off the student's
        last stage. Every rank calls it."""
        started = perf_counter()
        everyone = self._everyones_inputs(batch)
        jobs = [(replica, index) for replica, inputs in enumerate(everyone) for index in range(len(inputs))]
        shares = _split(len(jobs), self.layout.data_parallel_size)
        mine = shares[self.layout.data_parallel_rank]
        inputs = [everyone[replica][index].part(self.layout) for replica, index in jobs[mine.start : mine.stop]]
        if self.layout.expert_parallel_size > 1:  # ranks that share experts run as many micro-batches
            inputs += [self._nothing()] * (max(map(len, shares)) - len(inputs))
        found = self._forward(inputs)
        judged: list[Judged | None] = [None] * len(batch.micro_batches)
        for teacher_replica, share in enumerate(shares):
            for job in share:
                replica, index = jobs[job]
                rows_NH = found[job - mine.start] if found and job in mine else None
                for part, num_positions in enumerate(everyone[replica][index].num_positions(self.layout)):
                    places = (teacher_replica, part), (replica, part)
                    share_CH = self._deliver(rows_NH, num_positions, *places, job)
                    if share_CH is not None:
                        judged[index] = Judged(self._wait_place(share_CH), num_positions)
        self.seconds = perf_counter() - started
        return judged

    def rows(self, judged: Judged) -> torch.Tensor:
        """``[N, H]`` on the device, gathered over the student's tensor-parallel ranks, which all call it."""
        share_CH = judged.share_CH.to(self.student_layout.device, non_blocking=True)
        group = self.student_layout.groups.tp
        if group.size() > 1:
            everyones_NH = share_CH.new_empty(group.size() * share_CH.shape[0], share_CH.shape[1])
            dist.all_gather_into_tensor(everyones_NH, share_CH, group=group)
            share_CH = everyones_NH
        return share_CH[: judged.num_positions]

    def _everyones_inputs(self, batch: Batch) -> list[list[_Input]]:
        """What the teacher reads, by student replica and micro-batch."""
        mine = [_input(one) for one in batch.micro_batches]
        found = [mine] * self.student_layout.data_parallel_size
        if len(found) > 1:
            dist.all_gather_object(found, mine, group=self.student_layout.groups.dp)
        return found

    def _forward(self, inputs: Sequence[_Input]) -> list[torch.Tensor]:
        """``[N, H]`` of every input, on the teacher's last stage; elsewhere nothing."""
        if not inputs:
            return []
        for weight, host in self._on_host:
            weight.data = host.to(self.layout.device, non_blocking=True)
        with active(self.layout), torch.no_grad(), adapters_off(self.teacher):
            found: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, self.layout.device),
                data_iterator=iter(inputs),
                model=[self.teacher],
                num_microbatches=len(inputs),
                seq_length=inputs[0].tokens_BS.shape[1],
                micro_batch_size=inputs[0].tokens_BS.shape[0],
                forward_only=True,
                p2p_communicator=P2PCommunicator(self.layout.groups.pp, self.teacher.config),
                pg_collection=self.layout.groups,
            )
        self._put_away()
        return found if self.layout.is_last_stage else []

    def _nothing(self) -> _Input:
        """The least that runs through the layers: a token for each rank that shares a sequence, none that counts."""
        length = self.layout.tensor_parallel_size if self.layout.sequence_parallel else 1
        return _Input(torch.zeros(1, length, dtype=torch.long), torch.zeros(0, dtype=torch.long), None)

    def _put_away(self) -> None:
        for weight, host in self._on_host:
            weight.data = host

    def _deliver(
        self,
        rows_NH: torch.Tensor | None,
        num_positions: int,
        teacher_place: tuple[int, int],
        student_place: tuple[int, int],
        job: int,
    ) -> torch.Tensor | None:
        """Send each tensor-parallel rank of the student's last stage its rows; returns those for this rank."""
        rank = dist.get_rank()
        sources, destinations = self._places.sources[teacher_place], self._places.destinations[student_place]
        source = sources[job % len(sources)]  # the last stage's ranks all have the rows; they take turns
        num_rows = -(-num_positions // len(destinations))
        operations, kept = [], None
        if rank == source:
            assert rows_NH is not None
            padded_NH = torch.nn.functional.pad(rows_NH, (0, 0, 0, num_rows * len(destinations) - num_positions))
            shares_PCH = padded_NH.unflatten(0, (len(destinations), num_rows))
            for destination, share_CH in zip(destinations, shares_PCH, strict=True):
                if destination == rank:
                    kept = share_CH.clone()  # not a view that keeps everyone's rows
                elif num_rows:
                    operations.append(dist.P2POp(dist.isend, share_CH.contiguous(), destination, self._messages))
        elif rank in destinations:
            kept = torch.empty(
                num_rows, self.teacher.config.hidden_size,
                dtype=self.teacher.config.params_dtype, device=self.layout.device,
            )  # fmt: skip
            if num_rows:
                operations.append(dist.P2POp(dist.irecv, kept, source, self._messages))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return kept

    def _wait_place(self, share_CH: torch.Tensor) -> torch.Tensor:
        if self.hidden == "device" or share_CH.device.type == "cpu":
            return share_CH
        return _host_copy(share_CH)

    def _head(self, num_ids: int, padded_num_ids: int) -> torch.Tensor | None:
        """The teacher's output weight cut for the student's layout, one shard at a time to whoever needs it."""
        students = self.student_layout
        if self.layout is students:
            return output_weight(self.teacher) if students.is_last_stage else None
        source = self._places.sources[0, 0][0]
        whole_VH = self._whole_head(num_ids) if self.layout.data_parallel_rank == 0 else None
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

    def _whole_head(self, num_ids: int) -> torch.Tensor | None:
        if not self.layout.is_last_stage:
            return None
        shard_VH = output_weight(self.teacher).detach()
        parts = [torch.empty_like(shard_VH) for _ in range(self.layout.tensor_parallel_size)]
        dist.all_gather(parts, shard_VH, group=self.layout.groups.tp)
        return torch.cat(parts)[:num_ids]


def _input(batch: MicroBatch) -> _Input:
    """In host memory."""
    if batch.teacher_tokens_BS is None or batch.teacher_positions_N is None:
        return _Input(batch.tokens_BS.cpu(), batch.loss_positions_N.cpu(), batch.packed_lengths)
    return _Input(batch.teacher_tokens_BS.cpu(), batch.teacher_positions_N.cpu(), batch.teacher_packed_lengths)


def _forward_step(device: torch.device, inputs: Iterator[_Input], teacher: GPTModel) -> tuple[torch.Tensor, None]:
    one = next(inputs)
    hidden = teacher(
        **model_inputs(one.tokens_BS.to(device), one.packed_lengths),
        output_processor=loss_position_hidden,
        output_processor_context=one.positions_N.to(device),
    )
    return hidden, None  # no loss: Megatron collects what the last stage returns


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In pinned memory where there is a device to copy back to."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False).copy_(tensor.data)


def _split(count: int, parts: int) -> list[range]:
    """Consecutive ranges of like length."""
    return [range(part * count // parts, (part + 1) * count // parts) for part in range(parts)]


def _find_places(teacher: Layout, student: Layout) -> _Places:
    mine = [
        (layout.data_parallel_rank, layout.context_parallel_rank, layout.tensor_parallel_rank)
        if layout.is_last_stage
        else None
        for layout in (teacher, student)
    ]
    everyone: list[list[tuple[int, int, int] | None]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)

    def table(which: int, layout: Layout) -> dict[tuple[int, int], list[int]]:
        found = {places[which]: rank for rank, places in enumerate(everyone)}
        return {
            (replica, part): [found[replica, part, place] for place in range(layout.tensor_parallel_size)]
            for replica in range(layout.data_parallel_size)
            for part in range(layout.context_parallel_size)
        }

    return _Places(table(0, teacher), table(1, student))
