"""Process groups, device and seeds: the one module that reads Megatron's ``parallel_state``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tropd import cpu

ON_CPU = cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after the CPU backend)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_tropd.sides import Link, Side, side_of  # noqa: E402


def _megatron_globals() -> dict[str, Any]:
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


_UNINITIALIZED = {name: copy(value) for name, value in _megatron_globals().items()}


@dataclass(frozen=True)
class Layout:
    """This rank's place: process groups and sizes, for everything above."""

    groups: ProcessGroupCollection
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    """Ranks that share the positions of each sequence in training; to generate, each is a replica of its own."""
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_pipeline_size: int
    """Model chunks of each pipeline rank; 1: its layers follow one another."""
    expert_parallel_rank: int
    expert_parallel_size: int
    sequence_parallel: bool
    """Between layers each tensor-parallel rank has its own part of the positions."""
    device: torch.device
    timeout: timedelta
    """How long its process groups wait."""
    owns_world: bool
    """torch.distributed was started for this layout, and ends with it."""
    megatron_globals: dict[str, Any] = field(repr=False)
    """Megatron's `parallel_state` in this layout."""
    link: Link | None = field(default=None, repr=False)
    """To the job's other side, where it has two: this layout is then of one of them alone."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer and computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    def has_embedding(self, chunk: int) -> bool:
        """Whether this rank's model chunk of that number is the model's first."""
        return self.is_first_stage and chunk == 0

    def has_output(self, chunk: int) -> bool:
        """Whether this rank's model chunk of that number is the model's last."""
        return self.is_last_stage and chunk == self.virtual_pipeline_size - 1

    @property
    def sequence_cut(self) -> int:
        """What the positions of a micro-batch must be a multiple of, so that sequence parallelism can cut them."""
        return self.tensor_parallel_size if self.sequence_parallel else 1

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes files."""
        return self.rank == 0

    @property
    def is_model_replica_leader(self) -> bool:
        """One rank for each data-parallel replica: the first tensor- and context-parallel rank of the last stage."""
        return self.is_last_stage and self.tensor_parallel_rank == 0 and self.context_parallel_rank == 0

    def weight_group(self, *, is_expert: bool) -> dist.ProcessGroup:
        """The ranks that share each weight matrix: experts may be cut over fewer of them than other layers."""
        group: dist.ProcessGroup = self.groups.expt_tp if is_expert else self.groups.tp
        return group

    def replica_group(self, *, is_expert: bool) -> dist.ProcessGroup:
        """The ranks that hold the same part of a weight as this one."""
        group: dist.ProcessGroup = self.groups.expt_dp if is_expert else self.groups.dp_cp
        return group

    def first_expert(self, num_experts: int | None) -> int:
        """Number of the first expert that this rank holds, of ``num_experts`` in each layer (None: a dense model)."""
        return self.expert_parallel_rank * ((num_experts or 0) // self.expert_parallel_size)


def initialize(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    seed: int,
    timeout_minutes: float,
    sequence_parallel: bool = False,
    virtual_pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    side: Side | None = None,
) -> Layout:
    """Start torch.distributed (NCCL on GPUs, gloo on the CPU) and Megatron's groups; seed this rank.

    With a ``side`` all of it, ranks and sizes included, is about the ranks of that side.

    Experts are spread over ``expert_model_parallel_size`` ranks of a pipeline stage, and each is cut over
    ``expert_tensor_parallel_size`` ranks (None: like a dense layer).

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them a single
    process forms a group of its own. Groups wait a minute longer than ``timeout_minutes``: the watchdog, which can name
    who is missing, speaks first.
    """
    if "RANK" not in os.environ:
        # Port 0: the store binds a free port, so two runs on one machine do not meet.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    device = cpu.CPU if ON_CPU else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not ON_CPU:
        torch.cuda.set_device(device)
        # On Hopper PyTorch prefers cuDNN's attention, which plans anew for every sequence length. Those of
        # micro-batches differ, and every decoded token has one of its own; flash attention does not plan.
        torch.backends.cuda.enable_cudnn_sdp(False)
    owns_world = not dist.is_initialized()
    assert owns_world or side is None, "a side is a world of its own"
    timeout = timedelta(minutes=timeout_minutes + 1)
    link = _start_world(timeout, side, device) if owns_world else None
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            context_parallel_size=context_parallel_size,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
    seed_everything(seed)
    layout = _current_layout(device, timeout, owns_world, sequence_parallel)
    return replace(layout, virtual_pipeline_size=virtual_pipeline_model_parallel_size, link=link)


def _start_world(timeout: timedelta, side: Side | None, device: torch.device) -> Link | None:
    """``init_process_group``, of one side where there are two, with keys of this start alone.

    torchrun keeps its store over ``--max-restarts``, and with it the addresses of ranks that are gone: a rank that
    looks before the new address is there would try to reach a dead one.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    own = store if side is None else dist.PrefixStore(side.name, store)
    if side is not None:
        rank, size = side.rank, side.size
    dist.init_process_group("gloo" if ON_CPU else "nccl", store=own, rank=rank, world_size=size, timeout=timeout)
    return None if side is None else Link(dist.PrefixStore("link", store), side, device, timeout)


def world_size() -> int:
    """Number of processes torchrun started; 1 without it. Known before any group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_side(num_generators: int) -> Side:
    """This process's side where the job's last ``num_generators`` ranks generate; known before any group exists."""
    return side_of(int(os.environ.get("RANK", "0")), world_size(), num_generators)


def _current_layout(device: torch.device, timeout: timedelta, owns_world: bool, sequence_parallel: bool) -> Layout:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Layout(
        groups=groups,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_size=1,  # Megatron's models and schedules take it as an argument
        expert_parallel_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        device=device,
        timeout=timeout,
        owns_world=owns_world,
        megatron_globals=_megatron_globals(),
    )


def another_layout(
    first: Layout,
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
) -> Layout:
    """A second layout over the same ranks, for a model of its own; work on it inside `active`. Context parallelism is
    that of ``first``.

    Megatron keeps its groups in module globals, so those of ``first`` are put aside while the second are made.
    """
    vars(parallel_state).update({name: copy(value) for name, value in _UNINITIALIZED.items()})
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            context_parallel_size=first.context_parallel_size,
            distributed_timeout_minutes=first.timeout.total_seconds() / 60,
        )
        sequence_parallel = first.sequence_parallel and tensor_model_parallel_size > 1
        layout = _current_layout(first.device, first.timeout, owns_world=False, sequence_parallel=sequence_parallel)
        return replace(layout, link=first.link)
    finally:
        vars(parallel_state).update(first.megatron_globals)


def message_group(layout: Layout) -> dist.ProcessGroup:
    """A process group of all ranks for messages between two of them; every rank calls it."""
    group = dist.new_group(timeout=layout.timeout)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    if not ON_CPU:
        # NCCL's communicator is made by the first operation, and that must be one of all ranks.
        dist.all_reduce(torch.zeros(1, device=layout.device), group=group)
    return group


@contextmanager
def active(layout: Layout) -> Iterator[None]:
    """Make ``layout`` the one that Megatron reads from its globals, then restore the former."""
    former = _megatron_globals()
    vars(parallel_state).update(layout.megatron_globals)
    try:
        yield
    finally:
        vars(parallel_state).update(former)


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tensor-parallel generators. Weights do not depend on this layout-bound seed alone:
    ``models`` initialises them layout-independently."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def from_main[Value](value: Value) -> Value:
    """Rank 0's ``value`` on every rank: nobody decides from its own view of a file system."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def finish(layout: Layout) -> None:
    """Tear down what ``initialize`` started, so that no process is left waiting."""
    if layout.link is not None:
        layout.link.close()
    parallel_state.destroy_model_parallel()
    if layout.owns_world:
        dist.destroy_process_group()
