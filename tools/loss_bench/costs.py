"""Time, memory, traffic and communication of one implementation's forward and backward."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_parallel_cases import measure_memory  # type: ignore[import-not-found]

from loss_bench.cases import Inputs
from loss_bench.implementations import Implementation
from megatron_tropd.objectives import Objective


def fresh(inputs: Inputs) -> Inputs:
    """A copy of what a step may overwrite, with gradient: the leaf, and the student's output weight."""
    copy = inputs.with_leaf(inputs.leaf.clone().requires_grad_())
    return replace(copy, student_VH=copy.student_VH.detach().requires_grad_()) if copy.from_hidden else copy


def step(implementation: Implementation, inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Forward and backward on `fresh` inputs; returns the leaf's gradient."""
    implementation.loss(inputs, objective).sum().backward()
    assert inputs.leaf.grad is not None
    return inputs.leaf.grad


def seconds(implementation: Implementation, inputs: Inputs, objective: Objective) -> float:
    """One step, all ranks together."""
    copy = fresh(inputs)
    _synchronize(inputs)
    start = time.perf_counter()
    step(implementation, copy, objective)
    _synchronize(inputs)
    return time.perf_counter() - start


def device_seconds(implementation: Implementation, inputs: Inputs, objective: Objective) -> float:
    """Time that a GPU works on one step, whatever the host takes to launch it."""
    copy = fresh(inputs)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(implementation, copy, objective)
        torch.cuda.synchronize()
    return 1e-6 * sum(event.self_device_time_total for event in profiler.key_averages())


def _synchronize(inputs: Inputs) -> None:
    if inputs.leaf.is_cuda:
        torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()


def peak_bytes(implementation: Implementation, inputs: Inputs, objective: Objective) -> int:
    """Most that is allocated at once beyond the inputs; a gradient that takes no input's place counts."""
    copy = fresh(inputs)
    if copy.leaf.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(implementation, copy, objective)
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), measure_memory() as use:
        step(implementation, copy, objective)
    return use.peak


def kept_bytes(implementation: Implementation, inputs: Inputs, objective: Objective) -> int:
    """What the forward leaves for the backward beyond the inputs."""
    copy = fresh(inputs)
    if copy.leaf.is_cuda:
        before = torch.cuda.memory_allocated()
        loss = implementation.loss(copy, objective)
        kept = torch.cuda.memory_allocated() - before
    else:
        with _quiet_stderr(), measure_memory() as use:
            loss = implementation.loss(copy, objective)
        kept = use.kept
    del loss
    return kept


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler behind the memory measure writes lines of its own at every start."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class _Counter(TorchDispatchMode):
    """Collectives in the block, and the bytes that its operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.collectives += func.namespace == "c10d"
        result = func(*args, **kwargs)
        if not func.is_view and func.namespace == "aten" and not func._schema.name.startswith("aten::empty"):
            self.bytes_moved += _bytes((args, kwargs)) + _bytes(result)
        return result


def _bytes(tree: Any) -> int:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(implementation: Implementation, inputs: Inputs, objective: Objective) -> tuple[int, int]:
    """(collectives, bytes read and written by PyTorch operations), forward and backward together."""
    copy = fresh(inputs)
    with _Counter() as counter:
        step(implementation, copy, objective)
    return counter.collectives, counter.bytes_moved


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy on the GPU reads and writes, the limit that kernels are held to; best of ten."""
    source = torch.empty(2**32, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(10):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / (1e-3 * start.elapsed_time(end)))
    return best
