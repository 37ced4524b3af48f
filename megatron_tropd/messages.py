"""Counts the messages between two ranks, which their process groups count on those two alone.

Pipeline stages, Megatron's inference and a teacher in its own layout all send with ``torch.distributed.isend`` and
``irecv``, alone or in a batch. torch tells of a group how many operations a rank has begun in it; messages are among
them or not, as the backend has it, and the members of a pipeline begin different numbers of them. So they are counted
here by sender and receiver, and what they have added to the groups' own numbers is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


class MessageCounts:
    """``install()`` before the first message, ``remove()`` after the last; read it from any thread."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}
        """Messages that this rank has begun to send or to receive, by ``source>destination``, global ranks."""
        self.within: dict[str, int] = {}
        """How many operations a process group, by its name, has counted for messages."""
        self._inside = False
        self._originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Take the place of torch's functions."""
        for name in ("isend", "irecv", "batch_isend_irecv"):
            self._originals[name] = getattr(distributed_c10d, name)
            _replace(name, getattr(self, name))

    def remove(self) -> None:
        """Put torch's functions back."""
        for name, original in self._originals.items():
            _replace(name, original)

    def isend(
        self,
        tensor: torch.Tensor,
        dst: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_dst: int | None = None,
    ) -> dist.Work | None:
        """``torch.distributed.isend``, counted."""
        with self._counted(group, [(True, _global_rank(group, dst, group_dst))]):
            return self._originals["isend"](tensor, dst, group, tag, group_dst)

    def irecv(
        self,
        tensor: torch.Tensor,
        src: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_src: int | None = None,
    ) -> dist.Work | None:
        """``torch.distributed.irecv``, counted."""
        with self._counted(group, [(False, _global_rank(group, src, group_src))]):
            return self._originals["irecv"](tensor, src, group, tag, group_src)

    def batch_isend_irecv(self, p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        """``torch.distributed.batch_isend_irecv``, counted."""
        messages = [(operation.op == self.isend, operation.peer) for operation in p2p_op_list]
        with self._counted(p2p_op_list[0].group if p2p_op_list else None, messages):
            return self._originals["batch_isend_irecv"](p2p_op_list)

    @contextmanager
    def _counted(self, group: dist.ProcessGroup | None, messages: Sequence[tuple[bool, int | None]]) -> Iterator[None]:
        """Count ``messages``, each (whether this rank sends, its peer), and what the group counts for them."""
        if self._inside:  # one of a batch, or torch calls itself once more for a TorchFunctionMode
            yield
            return
        me = dist.get_rank()
        for sends, peer in messages:
            pair = f"{me}>{peer}" if sends else f"{peer}>{me}"
            self.begun[pair] = self.begun.get(pair, 0) + 1
        found = group if group is not None else dist.group.WORLD
        assert found is not None
        name, before = found.group_name, _operations(found)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self.within[name] = self.within.get(name, 0) + _operations(found) - before


def _operations(group: dist.ProcessGroup) -> int:
    return group._get_sequence_number_for_group()  # type: ignore[attr-defined]


def _global_rank(group: dist.ProcessGroup | None, rank: int | None, group_rank: int | None) -> int | None:
    if group_rank is None or group is None:
        return group_rank if rank is None else rank
    return dist.get_global_rank(group, group_rank)


def _replace(name: str, function: Callable[..., Any]) -> None:
    for module in (dist, distributed_c10d):
        setattr(module, name, function)
