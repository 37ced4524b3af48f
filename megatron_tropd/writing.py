"""Tensors to a checkpoint folder by Megatron's writers, at once or in the background; errors told on every rank."""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.distributed import from_main
from megatron_tropd.integrity import CheckpointError

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

_PR_SET_PDEATHSIG = 1


def write_state(state: ShardedStateDict, folder: Path) -> None:
    """Write ``state`` (all ranks call this); where a rank cannot, every rank says which, and nothing stays behind."""
    _use_own_results()
    _all_or_none(folder, lambda: dist_checkpointing.save(state, str(folder)))


def sharded_tensors(state: ShardedStateDict) -> Iterator[ShardedTensor]:
    """All tensors of ``state``, and the parts of those that are cut up when they are written (gated layers' halves)."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            yield from (part for part in nested_values(entry.build()) if isinstance(part, ShardedTensor))
        elif isinstance(entry, ShardedTensor):
            yield entry


def on_main(action: Callable[[], None], is_main: bool) -> None:
    """Run ``action`` on rank 0; its failure is a CheckpointError on every rank."""
    failure = ""
    if is_main:
        try:
            action()
        except (OSError, CheckpointError) as error:
            failure = str(error)
    if failure := from_main(failure):
        raise CheckpointError(failure)


class WriteResults:
    """What a writer, this process or one forked from it, has found: one value, in an unnamed file that both have open.

    In the place of the queue behind a server process that Megatron starts on every rank: a SIGTERM to the whole process
    group, as schedulers send it, ends that server, and the rank that was to save on SIGTERM cannot; and it stays behind
    where a rank is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the last reference)

    def put(self, value: Any) -> None:
        """Called by the writer, once."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Called when the writer is done; raises ``queue.Empty`` where it has died before."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error


def _use_own_results() -> None:
    assert hasattr(filesystem_async, "_results_queue")
    filesystem_async._results_queue = WriteResults()


class BackgroundWriter:
    """One checkpoint at a time, written by a forked process of each rank while training goes on.

    Megatron copies tensors on a GPU to the host first; on the CPU the fork sees the memory as it was. All ranks call
    every method together.
    """

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()
        self._folder: Path | None = None
        self._publish: Callable[[], None] | None = None

    def start(self, state: ShardedStateDict, folder: Path, publish: Callable[[], None]) -> None:
        """Begin to write ``state``; ``publish`` is called on every rank when all of it is on the disk.

        Waits for an earlier one first.
        """
        self.finish()
        _use_own_results()

        def begin() -> None:
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(_write_until_parent_ends, os.getpid(), request.async_fn))
            self._queue.schedule_async_request(request)

        _all_or_none(folder, begin)
        self._folder, self._publish = folder, publish

    def poll(self) -> None:
        """Publish what has been written, if it has; returns at once. Raises CheckpointError where a rank failed."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait until nothing is outstanding, and publish it."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        folder, publish = self._folder, self._publish
        if folder is None or publish is None:
            return
        done: list[int] = []
        try:
            _all_or_none(folder, lambda: done.extend(self._queue.maybe_finalize_async_calls(blocking=blocking)))
        except CheckpointError:
            self._folder = self._publish = None
            raise
        if done:
            self._folder = self._publish = None
            publish()


def _write_until_parent_ends(parent: int, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """``write`` in the forked process, which a killed rank takes along: a restart writes to the same place.

    SIGTERM to the whole process group is the rank's to answer, which waits for what is being written.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)  # OpenMP's threads have not come along
    write(*arguments, **options)


def _all_or_none(folder: Path, action: Callable[[], None]) -> None:
    """``action`` on every rank; where one fails, every rank raises CheckpointError and ``folder`` is removed."""
    failure = ""
    try:
        action()
    except CheckpointException as error:  # a BaseException, told to rank 0 alone
        failure = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items()))
    except (OSError, RuntimeError, CheckpointingException) as error:
        failure = f"rank {dist.get_rank()}: {error}"
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, " ".join(failure.split())[:500])
    if any(failures):
        free = shutil.disk_usage(folder.parent).free
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be written ({'; '.join(text for text in failures if text)}; {free / 1e9:,.1f} GB are "
            "free there): free some space, or save elsewhere, and try again; older checkpoints are intact"
        )
