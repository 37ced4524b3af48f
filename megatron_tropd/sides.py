"""Two sides of one job: ranks that train and ranks that generate, each a ``torch.distributed`` world of its own.

Everything within a side (Megatron's groups, checkpoints, the watchdog) sees that side alone, as if it were the job.
What goes from one to the other takes a link: process groups over all ranks that torch's global state knows nothing of.
Objects travel over gloo, tensors over the device's backend.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

# isort: split
from megatron.core.resharding.copy_services.base import CopyService


@dataclass(frozen=True)
class Side:
    """One of the two, as one of its ranks sees it."""

    name: Literal["trainer", "generator"]
    rank: int
    """Within the side."""
    size: int
    """Ranks of the side."""
    first: int
    """The job's rank of the side's first."""
    job_size: int
    """Ranks of both sides."""

    @property
    def is_generator(self) -> bool:
        """Generates and judges; the other side trains."""
        return self.name == "generator"

    @property
    def ranks(self) -> dict[str, range]:
        """The job's ranks of either side, by its name."""
        num_trainers = self.first if self.is_generator else self.size
        return {"trainer": range(num_trainers), "generator": range(num_trainers, self.job_size)}


def side_of(rank: int, job_size: int, num_generators: int) -> Side:
    """The side of the job's ``rank``: the last ``num_generators`` ranks generate, the others train."""
    num_trainers = job_size - num_generators
    if rank < num_trainers:
        return Side("trainer", rank, num_trainers, 0, job_size)
    return Side("generator", rank - num_trainers, num_generators, num_trainers, job_size)


_FOR_GOOD = timedelta(days=365)


class LinkError(RuntimeError):
    """The other side, or a rank of this one, is not there any more."""


class Link:
    """Between the two sides. Ranks are the job's; every rank of both calls each method but ``exchange``, which the two
    ends of its messages call."""

    def __init__(self, store: dist.Store, side: Side, device: torch.device, timeout: timedelta):
        """``store`` is one that all ranks share, and nobody else but the watchdog writes to.

        ``timeout`` is that of a transfer of tensors. Between two of them a side waits for as long as the other works,
        which may evaluate or export for hours; the watchdog finds a rank that hangs.
        """
        self.side, self.store = side, store
        self.waits = False
        """Whether this rank is in one of the methods."""
        self.rank, self.size = side.first + side.rank, side.job_size
        """Of this rank in the job, and how many there are."""
        self.first = side.first
        """The job's rank of this side's first."""
        self._device = device
        self._objects = self._group(dist.PrefixStore("objects", store), torch.device("cpu"), _FOR_GOOD)
        self._tensors = self._objects
        if device.type == "cuda":
            self._tensors = self._group(dist.PrefixStore("tensors", store), device, timeout)
            # NCCL's communicator is made by the first operation, and that must be one of all ranks.
            self._tensors.allreduce([torch.zeros(1, device=device)]).wait()

    @property
    def leader_of_trainers(self) -> int:
        """Their first rank."""
        return 0

    @property
    def leader_of_generators(self) -> int:
        """Their first rank."""
        return self.side.first if self.side.is_generator else self.side.size

    def all_gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank."""
        mine = _packed(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._waiting():
            self._objects.allgather([sizes], [torch.tensor([len(mine)])]).wait()
            longest = int(max(sizes))
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            self._objects.allgather([found], [torch.nn.functional.pad(mine, (0, longest - len(mine)))]).wait()
        return [_unpacked(one[: int(size)]) for one, size in zip(found, sizes, strict=True)]

    def broadcast(self, value: Any, source: int) -> Any:
        """The ``value`` of ``source``, which gets it back as it is; what others give is not read."""
        mine = _packed(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(mine)])
        with self._waiting():
            self._objects.broadcast([size], _from(source)).wait()
            if self.rank != source:
                mine = torch.empty(int(size), dtype=torch.uint8)
            self._objects.broadcast([mine], _from(source)).wait()
        return value if self.rank == source else _unpacked(mine)

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Contiguous tensors to and from ranks, all at once; those between two ranks in the order that both name."""
        group, batches = self._tensors, self._device.type == "cuda"
        if not sends and not receives:
            return
        with self._waiting():
            if batches:
                group._start_coalescing(self._device)
            works = [group.send([tensor], peer, 0) for tensor, peer in sends]
            works += [group.recv([tensor], peer, 0) for tensor, peer in receives]
            if batches:
                works = [group._end_coalescing(self._device)]
            for work in works:
                work.wait()

    def close(self) -> None:
        """No rank sends or waits any more."""
        if self._tensors is not self._objects:
            self._tensors._get_backend(self._device).shutdown()

    def copy_service(self) -> CopyService:
        """For Megatron's resharding."""
        return _CopyService(self)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        except RuntimeError as error:
            raise LinkError(
                "the link between the ranks that train and those that generate broke: a rank of either has ended. Why "
                "is in its own exit report: logs/rank_N.exit.json, of those that generate in generators/logs"
            ) from error
        finally:
            self.waits = False

    def _group(self, store: dist.Store, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
        group = dist.ProcessGroup(store, self.rank, self.size)
        backend: Any
        if device.type == "cpu":
            kind = dist.ProcessGroup.BackendType.GLOO
            backend = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)
        else:
            kind = dist.ProcessGroup.BackendType.NCCL
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            backend = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        group._set_default_backend(kind)
        group._register_backend(device, kind, backend)
        return group


class _CopyService(CopyService):
    """Megatron's interface to point-to-point messages, over the link."""

    requires_process_group_barrier = False

    def __init__(self, link: Link):
        self.rank, self.world_size, self.group = link.rank, link.size, None
        self._link = link
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._receives: list[tuple[torch.Tensor, int]] = []

    def submit_send(self, src_tensor: torch.Tensor, dest_rank: int, task_id: int | None = None) -> None:
        self._sends.append((src_tensor.detach(), dest_rank))

    def submit_recv(self, dest_tensor: torch.Tensor, src_rank: int, task_id: int | None = None) -> None:
        self._receives.append((dest_tensor.detach(), src_rank))

    def run(self) -> None:
        self._link.exchange(self._sends, self._receives)
        self._sends, self._receives = [], []


def _packed(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())


def _from(source: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = source, 0
    return options
