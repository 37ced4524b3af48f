"""Bytes that the real trainer holds on this rank, by component. Imports Megatron: use it inside ranks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_tropd import pair, static_engine, step
from megatron_tropd.ahead import TeacherAhead
from megatron_tropd.config_rollout import DynamicEngineConfig, RolloutConfig
from megatron_tropd.optimization import _inner_optimizers
from megatron_tropd.prompt import Prompt
from megatron_tropd.rollout import build_engine
from megatron_tropd.step import Learner
from megatron_tropd.teacher_pass import TeacherPass
from megatron_tropd.types import Batch, RolloutRequest
from megatron_tropd.vocab_parallel import fused_head, output_head


def storage_bytes(tensors: Any, *, without: Any = ()) -> int:
    """Bytes of the storages behind ``tensors``, each once, but for those behind ``without``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in found.items() if pointer not in known)


def resident_bytes(learner: Learner) -> dict[str, int]:
    """Weights of both models, gradients and optimizer state: what is allocated for them."""
    student = [parameter for model in learner.students for parameter in model.parameters()]
    teachers = [stage.teacher for stage in learner.stages if stage.teacher is not None]
    ahead = [] if learner.ahead is None else list(learner.ahead.teachers.values())
    teacher = [parameter for model in teachers for parameter in model.parameters()]
    teacher += [parameter for one in ahead for parameter in one.teacher.parameters()]
    teacher += [one.head_VH for one in ahead if one.head_VH is not None]
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


class LiveBytes:
    """Bytes of tensors of which it was told, for as long as they live."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """``size``: those that count of its storage's."""
        size = tensor.untyped_storage().nbytes() if size is None else size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._remove, size)
        return tensor

    def _remove(self, size: int) -> None:
        self.now -= size


@contextmanager
def watch_teacher_hidden(teacher_hidden_size: int) -> Iterator[LiveBytes]:
    """The teacher's hidden states in the shared schedule: what is sent, what is received, what the output layer's rows
    are taken from."""
    live = LiveBytes()
    select = pair._select
    unpack, pack = pair.PairCommunicator._unpack, pair.PairCommunicator._pack

    def of_teacher(message: torch.Tensor) -> torch.Tensor:
        return live.add(message, message.nbytes * teacher_hidden_size // message.shape[-1])

    def watched_select(hidden_SBH: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            live.add(hidden_SBH)
        return select(hidden_SBH, positions_N)

    def watched_pack(self: Any, student_SBH: torch.Tensor) -> torch.Tensor:
        packed = live.add(getattr(student_SBH, pair.TEACHER_HIDDEN))  # is there until the message is
        message = of_teacher(pack(self, student_SBH))
        del packed
        return message

    def watched_unpack(self: Any, received_SBH: torch.Tensor) -> torch.Tensor:
        found = unpack(self, of_teacher(received_SBH))
        live.add(getattr(found, pair.TEACHER_HIDDEN))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "_select", watched_select)
        patch.setattr(pair.PairCommunicator, "_pack", watched_pack)
        patch.setattr(pair.PairCommunicator, "_unpack", watched_unpack)
        yield live


@contextmanager
def watch_head() -> Iterator[LiveBytes]:
    """What the last stage has at the output layers: both models' rows and the gradient of the student's, and with the
    fused heads a chunk of both models' logits and the gradient of the student's weight."""
    live = LiveBytes()
    logits, loss = output_head.OutputHead.logits, step.fused_head_loss

    class Gradients(fused_head._Gradients):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            live.add(self._hidden_NH)
            if self._weight is not None:
                live.add(self._weight._total_VH)

    def watched_loss(student: Any, teacher: Any, *args: Any, **options: Any) -> Any:
        for head in (student, teacher):
            live.add(head.hidden_NH)
        return loss(student, teacher, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_head.OutputHead, "logits", lambda *args, **options: live.add(logits(*args, **options)))
        patch.setattr(fused_head, "_Gradients", Gradients)
        patch.setattr(step, "fused_head_loss", watched_loss)
        yield live


@contextmanager
def watch_logits() -> Iterator[LiveBytes]:
    """Both models' whole logits, where the last stage makes them."""
    live, loss = LiveBytes(), step.distillation_loss

    def watched_loss(student_NV: torch.Tensor, teacher_NV: torch.Tensor, *args: Any, **options: Any) -> Any:
        for logits_NV in (student_NV, teacher_NV):
            live.add(logits_NV)
        return loss(student_NV, teacher_NV, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "distillation_loss", watched_loss)
        yield live


def ahead_bytes(learner: Learner, batch: Batch) -> dict[str, int]:
    """A pass of the teacher ahead: the hidden states of the whole of it on this rank, the shares that wait for the
    student's schedule, and the most of both at once."""
    live, judge, deliver = LiveBytes(), TeacherPass.judge, TeacherAhead._deliver
    found = {}

    def watched_judge(self: TeacherPass, everyone: Any) -> dict[int, torch.Tensor]:
        rows = judge(self, everyone)
        for rows_NH in rows.values():
            live.add(rows_NH)
        found["pass"] = live.now
        return rows

    def watched_deliver(self: TeacherAhead, rows_NH: torch.Tensor | None, delivery: Any) -> torch.Tensor | None:
        share_CH = deliver(self, rows_NH, delivery)
        return None if share_CH is None else live.add(share_CH)

    assert learner.ahead is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherPass, "judge", watched_judge)
        patch.setattr(TeacherAhead, "_deliver", watched_deliver)
        judged = learner.ahead.judge(batch)
    waiting = storage_bytes(one.share_CH for one in judged if one is not None)
    assert live.now == waiting, "hidden states are there that nothing waits for"
    return {**found, "waiting": waiting, "peak": live.peak}


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
