"""Start N gloo ranks, run one function on each, and hand back what they returned or how they failed.

On a machine without GPUs ranks are forked from a server that has imported torch and Megatron once for the session. CUDA
forbids that, so elsewhere each rank takes seconds to import them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    init_process_group: bool = True,
    fresh: bool = False,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` fresh processes; returns what each returned, in rank order.

    ``function`` is a module-level function; arguments and results are pickled. Each rank finds torchrun's environment
    (RANK, WORLD_SIZE, ...) and, unless ``init_process_group`` is off, an initialised gloo world. The first rank that
    raises, dies or takes longer than ``timeout`` seconds ends all of them: AssertionError with every traceback known.
    ``fresh``: nothing is imported before the function's module, for what must be said before an import.
    """
    context = multiprocessing.get_context("spawn") if fresh else _context()
    environment = dict(os.environ) | _environment(world_size)
    receivers, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        run = (rank, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout, init_process_group)
        process = context.Process(target=_rank_main, args=(sender, run, function, args))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    try:
        return _collect(receivers, timeout)
    finally:
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


@cache
def _context() -> multiprocessing.context.BaseContext:
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_tropd.trainer", "matplotlib.pyplot", "tests.tiny"])
    return context


def _environment(world_size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _rank_main(
    sender: multiprocessing.connection.Connection,
    run: tuple[int, dict[str, str], float, bool],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    rank, environment, timeout, init_process_group = run
    # The server's environment is that of its start, and torch was imported before this one was set.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron's, on every rank: a failure's traceback would drown in them
    faulthandler.dump_traceback_later(max(timeout - 1, 1), exit=False)
    try:
        if init_process_group:
            dist.init_process_group("gloo", rank=rank, world_size=int(environment["WORLD_SIZE"]))
        result = function(*args)
        # No rank leaves while another still talks to it.
        if dist.is_initialized():
            dist.barrier()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _collect(receivers: list[multiprocessing.connection.Connection], timeout: float) -> list[Any]:
    """Wait for every rank; at the first failure, give the others a moment to tell theirs."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(receivers))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            succeeded, outcome = _receive(waiting.pop(rank))
            (results if succeeded else failures)[rank] = outcome
        if failures:
            deadline = min(deadline, time.monotonic() + 1)
    if failures or waiting:
        tracebacks = "\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
        silent = f"\n--- no answer within {timeout} s, or ended with the others: ranks {sorted(waiting)}" * bool(
            waiting
        )
        raise AssertionError(f"{len(failures)} rank(s) failed{silent}\n{tracebacks}")
    return [results[rank] for rank in range(len(receivers))]


def _receive(receiver: multiprocessing.connection.Connection) -> tuple[bool, Any]:
    try:
        return receiver.recv()
    except EOFError:
        return False, "the process ended without a word (killed, or crashed in native code)"
