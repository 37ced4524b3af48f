"""An inference copy of the student in a layout of its own, whose weights follow the trainer's.

Pipeline stages slow decoding down, and experts spread over ranks or interleaved stages cannot decode at all. The copy
is cut by tensor parallelism alone, over the same ranks; whenever the trainer's weights have moved, Megatron's
``resharding`` moves them over: each rank sends the slices that others' shards of the copy are made of, point to point.

Megatron plans and executes the transfers. The description of every tensor that it plans from is ours: its own finds
neither the experts of the local layer spec, which it does not number over ranks, nor the second and further chunks of
interleaved stages, and takes the gate and up projections of grouped experts for one block.

Shape suffixes: ``P`` tensors of a rank, ``R`` rows and ``C`` columns of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_tropd import replicas
from megatron_tropd.config import ModelConfig
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.config_model_checks import one_stage
from megatron_tropd.distributed import Layout, active, another_layout, message_group
from megatron_tropd.hf_mapping import is_expert
from megatron_tropd.lora import add_adapters
from megatron_tropd.models import build_model, global_name, tensor_cut

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.resharding.copy_services import NCCLCopyService
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.execution import execute_reshard_plan
from megatron.core.resharding.planner import build_plan_from_rosters, index_metadata_rosters
from megatron.core.resharding.utils import ParameterMetadata, ReshardPlan


class RefitError(ValueError):
    """After a refit a tensor of the inference copy is not the trainer's."""


class Meeting(Protocol):
    """The ranks between which weights move: those of a layout, or of both sides of a job (``sides.Link``)."""

    rank: int
    """This one's number among them."""
    first: int
    """The number of this process's first rank of torch.distributed."""

    def all_gather(self, value: Any) -> list[Any]:
        """What each gives, by rank."""
        ...

    def copy_service(self) -> CopyService:
        """Messages between them, as Megatron's resharding wants it."""
        ...


class _OneWorld:
    """A ``Meeting`` of all ranks of a layout."""

    def __init__(self, layout: Layout):
        self.rank, self.first, self._size = layout.rank, 0, layout.world_size
        self._messages = message_group(layout)

    def all_gather(self, value: Any) -> list[Any]:
        everyone = [value] * self._size
        dist.all_gather_object(everyone, value)
        return everyone

    def copy_service(self) -> CopyService:
        # Megatron's NCCL service sends through whatever backend its group has; its gloo service asks for pinned memory.
        return NCCLCopyService(group=self._messages)


class Refit:
    """Moves the trainer's weights over to a copy in another layout. Every rank that has a part of either calls each
    method."""

    def __init__(
        self,
        trainer: tuple[Sequence[GPTModel], Layout] | None,
        copy: tuple[GPTModel, Layout] | None,
        meeting: Meeting,
        *,
        check_interval: int,
    ):
        """``trainer`` is this rank's slice of the student, a model for each of its pipeline stages, ``copy`` that of
        the copy; None where it has none. Every ``check_interval``-th refit is checked, beginning with the first (0:
        none)."""
        self._seconds = 0.0
        self._source = torch.nn.ModuleList(trainer[0] if trainer else [])
        self._copy = torch.nn.ModuleList([copy[0]] if copy else [])
        self._layouts = trainer[1] if trainer else None, copy[1] if copy else None
        self._meeting = meeting
        self._check_interval = check_interval
        self._version: int | None = None
        self._num_refits = 0
        self._service = meeting.copy_service()
        self._plan = self._make_plan()

    def follow(self, version: int) -> None:
        """Refit where the trainer's weights have become others since the last call: their ``version`` is another."""
        if version == self._version:
            return
        started = perf_counter()
        self.refit()
        if self._check_interval and self._num_refits % self._check_interval == 0:
            self.check()
        self._num_refits += 1
        self._version = version
        self._seconds += perf_counter() - started

    def pop_seconds(self) -> float:
        """Time of all refits since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def refit(self) -> None:
        """Overwrite the copy with the trainer's weights."""
        torch.cuda.synchronize()  # Megatron copies on a stream of its own, which waits for no optimizer
        execute_reshard_plan(self._plan, self._source, self._copy, service=self._service, group=self._service.group)

    def check(self) -> None:
        """Raise RefitError on every rank where a hash over a whole tensor is not the same on both sides.

        Every rank of either side that holds a tensor, or a shard of it, answers for it.
        """
        of_trainer, of_copy = self._layouts
        everyone = self._meeting.all_gather(
            (_whole_hashes(self._source, of_trainer), _whole_hashes(self._copy, of_copy))
        )
        wanted: dict[str, tuple[int, int]] = {}
        for rank, (trainers, _) in enumerate(everyone):
            for name, found in trainers.items():
                value, first_rank = wanted.setdefault(name, (found, rank))
                if value != found:
                    raise RefitError(
                        f"{name}: the trainer's weights on ranks {first_rank} and {rank} differ, so there is nothing "
                        "to refit from. The last checkpoint is intact: start again with "
                        "guard.replica_check_interval=1, which names the rank at fault"
                    )
        for name, (value, _) in wanted.items():
            ranks = [rank for rank, (_, copies) in enumerate(everyone) if copies and copies[name] != value]
            if ranks:
                raise RefitError(
                    f"{name}: after the refit the inference copy on {_listed(ranks)} is not the trainer's, so rollouts "
                    "would be another model's. The last checkpoint is intact: suspect those machines' memory, device "
                    "or network, and start again with the same command"
                )

    def _make_plan(self) -> ReshardPlan:
        first, (of_trainer, of_copy) = self._meeting.first, self._layouts
        everyone = self._meeting.all_gather(
            (_describe(self._source, of_trainer, first), _describe(self._copy, of_copy, first))
        )
        copies, trainers = index_metadata_rosters(everyone)
        assert all(copy.keys() == trainers.keys() for copy in copies.values() if copy), "the copy is of another model"
        return build_plan_from_rosters(copies, trainers, self._meeting.rank)


class InferenceCopy(Refit):
    """The student once more, for generation alone: no gradients, evaluation mode, in ``layout``."""

    def __init__(
        self,
        trainer: tuple[Sequence[GPTModel], Layout] | None,
        model: GPTModel,
        layout: Layout,
        meeting: Meeting,
        *,
        check_interval: int,
    ):
        super().__init__(trainer, (model, layout), meeting, check_interval=check_interval)
        self.model = model
        self.layout = layout


def build_inference_copy(
    config: ModelConfig,
    trainer: tuple[Sequence[GPTModel], Layout] | None,
    layout: Layout,
    *,
    padded_vocab_size: int,
    max_sequence_length: int,
    dtype: torch.dtype,
    check_interval: int,
    lora: LoraConfig | None = None,
    meeting: Meeting | None = None,
) -> InferenceCopy:
    """The copy of ``trainer`` in ``layout`` (see `InferenceCopy`); it has no weights yet.

    ``padded_vocab_size`` is the trainer's, whose rows the copy has too; with ``lora`` it has adapters like the trainer.
    Every rank of the layout calls it. A trainer on other ranks (None here) builds its `Refit` with the same ``meeting``
    at the same time; by default the trainer is on the same ranks.
    """
    with active(layout):
        model = build_model(
            replace(one_stage(config), make_vocab_size_divisible_by=1),
            layout,
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length,
            dtype=dtype,
            seed=None,
            megatron_linears=lora is not None,
        )
        if lora is not None:
            add_adapters(model, lora, layout, seed=0)
    model.requires_grad_(False).eval()
    if meeting is None:
        assert trainer is not None
        meeting = _OneWorld(trainer[1])
    return InferenceCopy(trainer, model, layout, meeting, check_interval=check_interval)


def inference_layout(first: Layout, *, tensor_model_parallel_size: int) -> Layout:
    """The layout of a copy over the same ranks: tensor parallelism alone, for single positions do not divide."""
    layout = another_layout(
        first, tensor_model_parallel_size=tensor_model_parallel_size, pipeline_model_parallel_size=1
    )
    return replace(layout, sequence_parallel=False)


def _parameters(
    models: torch.nn.ModuleList, layout: Layout
) -> Iterator[tuple[str, str, torch.nn.Parameter, tuple[int | None, int]]]:
    """(name in ``models``, name in the whole model, parameter, how tensor-parallel ranks share it)."""
    for index, model in enumerate(models):
        for own_name, parameter in model.named_parameters():
            name = global_name(model, layout, own_name)
            yield f"{index}.{own_name}", name, parameter, tensor_cut(model, name, parameter)


def _describe(models: torch.nn.ModuleList, layout: Layout | None, first: int) -> list[ParameterMetadata]:
    """What Megatron's planner wants to know of every parameter of this rank; rank 0 has the number ``first`` there."""
    if layout is None:
        return []
    tensor_ranks, data_ranks = (
        [[first + rank for rank in dist.get_process_group_ranks(group(is_expert=expert))] for expert in (False, True)]
        for group in (layout.weight_group, layout.replica_group)
    )
    return [
        ParameterMetadata(
            name=own_name,
            resolved_name=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            element_size=parameter.element_size(),
            is_tp=dim is not None,
            partition_dim=dim or 0,
            partition_stride=num_blocks,
            owner_rank=first + dist.get_rank(),
            tensor_parallel_group_ranks=tensor_ranks[is_expert(name)],
            data_parallel_group_ranks=data_ranks[is_expert(name)],
        )
        for own_name, name, parameter, (dim, num_blocks) in _parameters(models, layout)
    ]


# ------------------------------------------------------------------------------------------------------- checksums


def _whole_hashes(models: torch.nn.ModuleList, layout: Layout | None) -> dict[str, int]:
    """Global name to the hash of the whole tensor, of every tensor that this rank holds (a part of)."""
    if layout is None:
        return {}
    shards: dict[dist.ProcessGroup | None, dict[str, torch.Tensor]] = {}
    for _, name, parameter, (dim, num_blocks) in _parameters(models, layout):
        group = None if dim is None else layout.weight_group(is_expert=is_expert(name))
        shards.setdefault(group, {})[name] = _shard_hash(parameter.detach(), dim, num_blocks, group)
    hashes: dict[str, int] = {}
    for group in (None, *(group for group in dict.fromkeys((layout.groups.tp, layout.groups.expt_tp)))):
        if group in shards:
            sums_P = torch.stack(list(shards[group].values()))
            if group is not None:
                dist.all_reduce(sums_P, group=group)
            hashes |= dict(zip(shards[group], sums_P.tolist(), strict=True))
    return hashes


def _shard_hash(
    tensor: torch.Tensor, dim: int | None, num_blocks: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """int64 scalar: what this shard adds to the hash of the whole tensor, whose places its elements have."""
    matrix_RC = tensor.reshape(tensor.shape[0], -1)
    num_rows, num_columns = matrix_RC.shape
    rows_R, columns_C = (torch.arange(size, device=tensor.device) for size in matrix_RC.shape)
    width = num_columns
    if group is not None and dim == 0:
        rows_R = _places(rows_R, num_blocks, group)
    elif group is not None:
        columns_C, width = _places(columns_C, num_blocks, group), num_columns * group.size()
    at_once = max(1, replicas.HASH_CHUNK // num_columns)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, num_rows, at_once):
        places = rows_R[start : start + at_once, None] * width + columns_C
        total += replicas.hash_elements(matrix_RC[start : start + at_once].contiguous(), places)
    return total


def _places(own: torch.Tensor, num_blocks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Where indices of a cut dimension are in the whole one, of which this rank has a part of each block."""
    length = len(own) // num_blocks
    return own // length * length * group.size() + group.rank() * length + own % length


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
