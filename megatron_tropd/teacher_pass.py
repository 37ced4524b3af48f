"""The teacher's forward-only pass over a whole rollout batch, and which of its hidden states go to which rank.

Shape suffixes: ``B`` sequences, ``S`` positions, ``N`` positions that carry loss, ``C`` one rank's share of N,
``H`` the teacher's hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist

from megatron_tropd.distributed import Layout, active
from megatron_tropd.lora import adapters_off
from megatron_tropd.packing import part_of_inputs
from megatron_tropd.pair import loss_position_hidden, model_inputs, output_weight
from megatron_tropd.types import MicroBatch

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


@dataclass(frozen=True)
class TeacherInput:
    """What the teacher reads of one micro-batch, in host memory."""

    tokens_BS: torch.Tensor
    positions_N: torch.Tensor
    """In the flattened ``[B * S]``."""
    packed_lengths: tuple[int, ...] | None
    """As `MicroBatch.packed_lengths`."""

    def part(self, layout: Layout) -> TeacherInput:
        """What this context-parallel rank of ``layout`` has of it."""
        return self._part(layout.context_parallel_rank, layout.context_parallel_size)

    def num_positions(self, layout: Layout) -> list[int]:
        """N of every part."""
        size = layout.context_parallel_size
        return [self._part(rank, size).positions_N.shape[0] for rank in range(size)]

    def _part(self, rank: int, size: int) -> TeacherInput:
        if size == 1:
            return self
        cut = part_of_inputs(self.tokens_BS, self.positions_N, self.packed_lengths, rank=rank, size=size)
        return TeacherInput(*cut, self.packed_lengths)


def teacher_input(batch: MicroBatch) -> TeacherInput:
    """That of a micro-batch."""
    if batch.teacher_tokens_BS is None or batch.teacher_positions_N is None:
        return TeacherInput(batch.tokens_BS.cpu(), batch.loss_positions_N.cpu(), batch.packed_lengths)
    return TeacherInput(batch.teacher_tokens_BS.cpu(), batch.teacher_positions_N.cpu(), batch.teacher_packed_lengths)


class TeacherPass:
    """The frozen teacher in a layout, its layers on the device or, between passes, in host memory."""

    def __init__(self, teacher: GPTModel, layout: Layout):
        """``teacher`` is this rank's slice: a model of its own, or the student, whose adapters are off for the time of
        a pass."""
        self.teacher = teacher
        self.layout = layout
        self._on_host: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def offload(self, keep: torch.Tensor | None) -> None:
        """From now on its weights, but for ``keep``, are on the device for the time of a pass alone."""
        moved = [weight for weight in self.teacher.parameters() if weight is not keep]
        self._on_host = [(weight, host_copy(weight)) for weight in moved]
        self._put_away()

    def judge(self, everyone: Sequence[Sequence[TeacherInput]]) -> dict[int, torch.Tensor]:
        """``[N, H]`` of the jobs that are this replica's, by job, on its last stage; elsewhere nothing.

        ``everyone`` has what the teacher reads, by student replica and micro-batch: each is a job, and they are dealt
        to the teacher's replicas in that order. Every rank of the layout calls it with the same.
        """
        jobs = [one for inputs in everyone for one in inputs]
        shares = _split(len(jobs), self.layout.data_parallel_size)
        mine = shares[self.layout.data_parallel_rank]
        inputs = [jobs[job].part(self.layout) for job in mine]
        if self.layout.expert_parallel_size > 1:  # ranks that share experts run as many micro-batches
            inputs += [self._nothing()] * (max(map(len, shares)) - len(inputs))
        return dict(zip(mine, self._forward(inputs), strict=False))

    def whole_head(self, num_ids: int) -> torch.Tensor | None:
        """``[num_ids, H]``, the output weight, on the ranks of the last stage."""
        if not self.layout.is_last_stage:
            return None
        shard_VH = output_weight(self.teacher).detach()
        parts = [torch.empty_like(shard_VH) for _ in range(self.layout.tensor_parallel_size)]
        dist.all_gather(parts, shard_VH, group=self.layout.groups.tp)
        return torch.cat(parts)[:num_ids]

    def _forward(self, inputs: Sequence[TeacherInput]) -> list[torch.Tensor]:
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

    def _nothing(self) -> TeacherInput:
        """The least that runs through the layers: a token for each rank that shares a sequence, none that counts."""
        return TeacherInput(
            torch.zeros(1, self.layout.sequence_cut, dtype=torch.long), torch.zeros(0, dtype=torch.long), None
        )

    def _put_away(self) -> None:
        for weight, host in self._on_host:
            weight.data = host


def _forward_step(device: torch.device, inputs: Iterator[TeacherInput], teacher: GPTModel) -> tuple[torch.Tensor, None]:
    one = next(inputs)
    hidden = teacher(
        **model_inputs(one.tokens_BS.to(device), one.packed_lengths),
        output_processor=loss_position_hidden,
        output_processor_context=one.positions_N.to(device),
    )
    return hidden, None  # no loss: Megatron collects what the last stage returns


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In pinned memory where there is a device to copy back to."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False).copy_(tensor.data)


# ------------------------------------------------------------------------------------------------- who gets what


@dataclass(frozen=True)
class Judged:
    """What the teacher left of one micro-batch for this rank."""

    share_CH: torch.Tensor
    """This tensor-parallel rank's rows of ``[N, H]``, padded to the same number on each."""
    num_positions: int
    """N."""

    def rows(self, layout: Layout) -> torch.Tensor:
        """``[N, H]`` on the device, gathered over the student's tensor-parallel ranks, which all call it."""
        share_CH = self.share_CH.to(layout.device, non_blocking=True)
        group = layout.groups.tp
        if group.size() > 1:
            everyones_NH = share_CH.new_empty(group.size() * share_CH.shape[0], share_CH.shape[1])
            dist.all_gather_into_tensor(everyones_NH, share_CH, group=group)
            share_CH = everyones_NH
        return share_CH[: self.num_positions]


Place = tuple[int, int, int]
"""Of a rank on the last stage of a model: data-parallel replica, context-parallel part, tensor-parallel rank."""


def last_stage_place(layout: Layout) -> Place | None:
    """This rank's; None elsewhere."""
    if not layout.is_last_stage:
        return None
    return layout.data_parallel_rank, layout.context_parallel_rank, layout.tensor_parallel_rank


@dataclass(frozen=True)
class Places:
    """Ranks of the last stages, the same table on every rank; a part is what one context-parallel rank has of every
    sequence."""

    sources: Mapping[tuple[int, int], list[int]]
    """By teacher replica and part: the tensor-parallel ranks, in order."""
    destinations: Mapping[tuple[int, int], list[int]]
    """By student replica and part: the same."""

    @staticmethod
    def of(everyone: Sequence[tuple[Place | None, Place | None]]) -> Places:
        """From each rank's place in (the teacher, the student)."""
        return Places(*(_table([places[which] for places in everyone]) for which in range(2)))


def _table(places: Sequence[Place | None]) -> dict[tuple[int, int], list[int]]:
    ranks = {place: rank for rank, place in enumerate(places) if place is not None}
    found: dict[tuple[int, int], list[int]] = {}
    for replica, part, tensor_rank in sorted(ranks):
        found.setdefault((replica, part), []).append(ranks[replica, part, tensor_rank])
    return found


@dataclass(frozen=True)
class Delivery:
    """The hidden states of one micro-batch, or of one part of it, on their way."""

    job: int
    replica: int
    """Of the student."""
    index: int
    """Of the micro-batch in it."""
    num_positions: int
    """N."""
    source: int
    """A rank that has them."""
    destinations: Sequence[int]
    """The ranks that get a share each, by tensor-parallel rank."""

    @property
    def num_rows(self) -> int:
        """Of a share, padding included."""
        return -(-self.num_positions // len(self.destinations))

    def shares(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """``[destinations, rows, H]``."""
        padded_NH = torch.nn.functional.pad(
            rows_NH, (0, 0, 0, self.num_rows * len(self.destinations) - self.num_positions)
        )
        return padded_NH.unflatten(0, (len(self.destinations), self.num_rows))


def deliveries(counts: Sequence[Sequence[Sequence[int]]], places: Places) -> Iterator[Delivery]:
    """All of one batch, in the same order on every rank. ``counts``: N by student replica, micro-batch and part.

    The teacher's replicas take turns: what a rank has yet to send shrinks as what it has been sent grows.
    """
    jobs = [(replica, index) for replica, inputs in enumerate(counts) for index in range(len(inputs))]
    num_replicas = 1 + max(replica for replica, _ in places.sources)
    for turn in zip_longest(*_split(len(jobs), num_replicas)):
        for teacher_replica, job in enumerate(turn):
            if job is None:
                continue
            replica, index = jobs[job]
            for part, num_positions in enumerate(counts[replica][index]):
                sources = places.sources[teacher_replica, part]
                # The last stage's ranks all have the rows; they take turns.
                source, destinations = sources[job % len(sources)], places.destinations[replica, part]
                yield Delivery(job, replica, index, num_positions, source, destinations)


def _split(count: int, parts: int) -> list[range]:
    """Consecutive ranges of like length."""
    return [range(part * count // parts, (part + 1) * count // parts) for part in range(parts)]
