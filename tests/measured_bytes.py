"""Bytes that the real trainer holds on this rank, by component. Imports Megatron: use it inside ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tropd import static_engine
from megatron_tropd.config_rollout import DynamicEngineConfig, RolloutConfig
from megatron_tropd.optimization import _inner_optimizers
from megatron_tropd.prompt import Prompt
from megatron_tropd.rollout import build_engine
from megatron_tropd.step import Learner
from megatron_tropd.types import RolloutRequest


def storage_bytes(tensors: Any, *, without: Any = ()) -> int:
    """Bytes of the storages behind ``tensors``, each once, but for those behind ``without``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in found.items() if pointer not in known)


def resident_bytes(learner: Learner) -> dict[str, int]:
    """Weights of both models, gradients and optimizer state: what is allocated for them."""
    student = [parameter for model in learner.students for parameter in model.parameters()]
    teachers = [stage.teacher for stage in learner.stages if stage.teacher is not None]
    teacher = [parameter for model in teachers for parameter in model.parameters()]
    buffers = [buffer for chunk in learner.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    state = [
        tensor
        for inner in _inner_optimizers(learner.optimizer)
        for parameter, values in inner.optimizer.state.items()
        for tensor in (parameter, *values.values())
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0
    ]
    return {
        "student_weights": storage_bytes(student),
        "teacher_weights": storage_bytes(teacher),
        "gradients": storage_bytes(buffer.grad_data for buffer in buffers),
        # fp32 models are their own main weights.
        "optimizer": storage_bytes(state, without=student),
    }


class SavedBytes:
    """Bytes that autograd holds for backwards, each storage once, but for those of ``own``."""

    def __init__(self, *own: torch.Tensor):
        self.peak = 0
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._live: Counter[int] = Counter()
        self._bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor):
            yield

    def add(self, storage: torch.UntypedStorage, count: int) -> None:
        """One more (1) or one less (-1) reference."""
        pointer = storage.data_ptr()
        if pointer in self._own:
            return
        if self._live[pointer] == 0 or self._live[pointer] + count == 0:
            self._bytes += count * storage.nbytes()
        self._live[pointer] += count
        self.peak = max(self.peak, self._bytes)


class _Saved:
    """A saved tensor; gone when its graph is."""

    def __init__(self, counter: SavedBytes, tensor: torch.Tensor):
        self.counter, self.tensor = counter, tensor
        counter.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.counter.add(self.tensor.untyped_storage(), -1)


def kv_cache_bytes(
    learner: Learner, *, rows: int, prompt_length: int, max_response_length: int, dynamic: DynamicEngineConfig | None
) -> int:
    """What Megatron allocates for keys and values while ``rows`` sequences are generated; static batching if None."""
    allocated: list[int] = []

    class Watched(static_engine.StaticInferenceContext):  # type: ignore[misc]
        def enable_decode_mode(self) -> None:
            super().enable_decode_mode()
            pairs = self.key_value_memory_dict.values()
            allocated.append(storage_bytes(tensor for pair in pairs for tensor in pair))

    config = RolloutConfig(engine="static", max_batch_size=rows)
    engine = build_engine(
        learner.stage.module,
        learner.layout,
        config if dynamic is None else replace(config, engine="dynamic", dynamic=dynamic),
        vocab_size=learner.vocab_size,
        eos_id=learner.vocab_size + 1,  # never drawn: every sequence fills its budget
        seed=5,
    )
    prompt = Prompt(id="p", text="p", tokens=(2,) * prompt_length, answer="")
    requests = [RolloutRequest(sample, prompt, ()) for sample in range(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_engine, "StaticInferenceContext", Watched)
        engine.generate(requests, max_response_length=max_response_length)
    return max(allocated) if dynamic is None else engine.report.kv_cache_bytes
