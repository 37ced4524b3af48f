"""Megatron-Core, unmodified, on a machine without CUDA.

Megatron asks for CUDA by name in many places (``device="cuda"``, ``torch.cuda.current_device()``, ``tensor.cuda()``).
``install`` sends those requests to the CPU: a ``TorchFunctionMode`` rewrites the device of torch calls, and a few
``torch.cuda`` functions get stand-ins. The same program then runs over gloo. With a GPU present nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    dtype: f"torch.cuda.{name}"
    for dtype, name in (
        (torch.float32, "FloatTensor"),
        (torch.float64, "DoubleTensor"),
        (torch.float16, "HalfTensor"),
        (torch.bfloat16, "BFloat16Tensor"),
        (torch.uint8, "ByteTensor"),
        (torch.int32, "IntTensor"),
        (torch.int64, "LongTensor"),
        (torch.bool, "BoolTensor"),
    )
}
_installed: list[TorchFunctionMode] = []


def install() -> bool:
    """Make CUDA requests land on the CPU if this machine has no CUDA; return whether the CPU backend is active.

    Call before anything of Megatron is used. Calling again does nothing.
    """
    if torch.cuda.is_available():
        return False
    if not _installed:
        # Megatron fuses small functions with torch.compile, which on a CPU costs minutes of compilation per process.
        torch._dynamo.config.disable = True
        _import_megatron_uncompiled()
        _replace_cuda_functions()
        mode = _CudaRequestsToCpu()
        mode.__enter__()
        _installed.append(mode)
        _replace_megatron_functions()
    return True


def _import_megatron_uncompiled() -> None:
    """Import Megatron so that none of its functions is wrapped by torch.compile.

    A wrapped one is looked at by dynamo when it is called, switched off or not, and dynamo refuses the stand-ins. Also,
    dynamo indexes torch.cuda the first time it is asked for anything: before the stand-ins, of which one has several
    names.
    """
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read where functions are decorated
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    disable_jit_fuser()  # for what is imported from here on


class _CudaRequestsToCpu(TorchFunctionMode):
    """Rewrite ``cuda`` devices in torch calls; answer ``Tensor.type()`` with the CUDA name Megatron compares with.

    Memory is pinned for copies to a GPU, so none is.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES[args[0].dtype]
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is dist.all_gather and len({part.shape for part in args[0]}) > 1:
            return _all_gather_uneven(*args, **(kwargs or {}))
        if func is dist.reduce_scatter and len({part.shape for part in args[1]}) > 1:
            return _reduce_scatter_uneven(*args, **(kwargs or {}))
        if func is torch.Tensor.to:
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        return func(*args, **(kwargs or {}))


def _all_gather_uneven(
    parts: list[torch.Tensor], mine: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> None:
    """``dist.all_gather`` of tensors that differ in their first dimension, which gloo lacks (experts' tokens do)."""
    assert not async_op
    longest = max(len(part) for part in parts)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    received = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(received, padded, group=group)
    for part, found in zip(parts, received, strict=True):
        part.copy_(found[: len(part)])


def _reduce_scatter_uneven(
    mine: torch.Tensor, parts: list[torch.Tensor], op: Any, group: dist.ProcessGroup, async_op: bool = False
) -> None:
    """``dist.reduce_scatter`` of the same."""
    assert not async_op
    whole = torch.cat(parts)
    dist.all_reduce(whole, op=op, group=group)
    mine.copy_(whole.split([len(part) for part in parts])[dist.get_rank(group)])


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _Stream:
    """A stream of a device that finishes every operation before it returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    synchronize = wait_stream = wait_event = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        """The event, or a new one, with the time in it."""
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        """All work is always done."""
        return True


class _Event:
    """A time stamp: with nothing asynchronous, recording is reading the clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, *_: Any) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._seconds - self._seconds) * 1e3

    def wait(self, *_: Any) -> None:
        """Nothing is pending."""

    synchronize = wait

    def query(self) -> bool:
        """All work is always done."""
        return True


def _replace_cuda_functions() -> None:
    stream = _Stream()
    nothing = stream._nothing
    stand_ins: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, nothing)


def _replace_megatron_functions() -> None:
    """Helpers of Megatron that go around ``torch.cuda`` and need stand-ins of their own."""
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    communication_utils._is_cuda = lambda tensor: None
    dynamic_context.triton_append_key_value_cache = None  # what it does where there is no Triton
    token_dispatcher.maybe_move_tensor_to_cpu = _as_if_moved


def _as_if_moved(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """The counts by which experts' ranks exchange tokens: Megatron makes numbers of them only where they are CUDA's."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
