"""Student and teacher as one pipeline stage: the module Megatron's schedule runs, and its communicator.

At every stage the teacher's layers run under ``no_grad`` and the student's with gradient, on the same micro-batch.
Forward, both hidden states travel to the next stage in one message; backward, the student's gradient alone.

Shape suffixes: ``B`` sequences, ``S`` positions, ``N`` positions that carry loss, ``V`` vocabulary shard, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.layer_spec import use_transformer_engine
from megatron_tropd.lora import adapters_off
from megatron_tropd.types import MicroBatch, OutputHeadMode

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, Shape
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

TEACHER_HIDDEN = "teacher_hidden_SBH"
"""Attribute under which the teacher's hidden state rides on the student's, between forward step and communicator."""


class StudentTeacherStage(torch.nn.Module):
    """This pipeline stage's slice of the student and, when there is one, of the teacher.

    ``module`` is the student: Megatron's helpers look through wrappers by that name, so they find the student's
    config, embedding and output layer, and nothing of the teacher's.
    """

    def __init__(
        self,
        student: GPTModel,
        teacher: GPTModel | None,
        *,
        output_head: OutputHeadMode = "fused",
        base_is_teacher: bool = False,
    ):
        """``base_is_teacher``: the teacher is the student with its adapters off, in the place of ``teacher``."""
        super().__init__()
        self.module = student
        self.teacher = teacher
        self.output_head = output_head
        self.base_is_teacher = base_is_teacher
        self._received_SBH: torch.Tensor | None = None
        self.teacher_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Take the previous stage's hidden states, the teacher's riding on the student's; None at the first stage."""
        (received_SBH,) = input_tensor
        self._received_SBH = received_SBH

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run both slices on one micro-batch.

        Last stage: the final hidden states ``[N, H]`` of both models at the positions that carry loss, in row-major
        order (their logits ``[N, V]`` with ``output_head="logits"``); prompt and padding
        positions never reach the output layers. Earlier stages: the hidden states ``[S, B, H]``, the teacher's attached
        to the student's for the communicator.
        """
        received_SBH, self._received_SBH = self._received_SBH, None
        teacher_output = self._run_teacher(batch, _take_teacher_hidden(received_SBH))
        self.module.set_input_tensor(received_SBH)
        student_output = self._run_model(self.module, batch)
        if teacher_output is not None and not self.module.post_process:
            setattr(student_output, TEACHER_HIDDEN, teacher_output)
        return student_output, teacher_output

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher judges within this stage."""
        return self.teacher is not None or self.base_is_teacher

    def _run_teacher(self, batch: MicroBatch, received_SBH: torch.Tensor | None) -> torch.Tensor | None:
        if not self.has_teacher:
            return None
        teacher = self.module if self.teacher is None else self.teacher
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        teacher.set_input_tensor(received_SBH)
        with torch.no_grad(), adapters_off(teacher):
            output = self._run_model(teacher, batch)
        teacher.set_input_tensor(None)  # Megatron would keep it until the next one comes
        end.record()
        self.teacher_events.append((start, end))
        return output

    def pop_teacher_seconds(self) -> float:
        """Seconds this rank spent in the teacher's forward since the last call."""
        events, self.teacher_events = self.teacher_events, []
        if events:
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3

    def teacher_weight(self) -> torch.Tensor:
        """The teacher's output weight ``[V, H]``, this rank's part of its vocabulary."""
        assert self.has_teacher
        return output_weight(self.module if self.teacher is None else self.teacher)

    def _run_model(self, model: GPTModel, batch: MicroBatch) -> torch.Tensor:
        return model(
            **model_inputs(batch.tokens_BS, batch.packed_lengths),
            padding_mask=_routers_padding(model, batch),
            output_processor=_loss_position_logits if self.output_head == "logits" else loss_position_hidden,
            output_processor_context=batch.loss_positions_N,
        )


def model_inputs(tokens_BS: torch.Tensor, packed_lengths: Sequence[int] | None) -> dict[str, Any]:
    """What Megatron's model reads of a micro-batch: `MicroBatch.tokens_BS` and its ``packed_lengths``.

    There are no position ids: RoPE counts the positions of each sequence, those of this context-parallel rank. There is
    no attention mask: both layer specs are causal by type, and padding follows every token that carries loss.
    """
    packed = None if packed_lengths is None else _packed_parameters(packed_lengths, tokens_BS.device)
    return {"input_ids": tokens_BS, "position_ids": None, "attention_mask": None, "packed_seq_params": packed}


def _packed_parameters(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """The boundaries of packed sequences: in host memory, where our attention and Megatron's RoPE read them without
    waiting for the device, but for TransformerEngine, which wants them there."""
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if use_transformer_engine():
        boundaries = boundaries.to(device, non_blocking=True)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _take_teacher_hidden(student_SBH: torch.Tensor | None) -> torch.Tensor | None:
    """What rides on it, taken off: the student's tensor lives until its backward, the teacher's must not."""
    return None if student_SBH is None else vars(student_SBH).pop(TEACHER_HIDDEN, None)


def _routers_padding(model: GPTModel, batch: MicroBatch) -> torch.Tensor | None:
    """What a load-balancing loss leaves out, as Megatron takes it; None where there is no such loss."""
    config = model.config
    if not config.moe_aux_loss_coeff:
        return None
    if model.pre_process or not config.sequence_parallel:
        return batch.padding_BS
    # The first stage cuts it with the embedded tokens; the later ones leave it as they get it.
    group = model.pg_collection.tp
    return batch.padding_BS.chunk(group.size(), dim=1)[group.rank()]


def output_weight(model: GPTModel) -> torch.Tensor:
    """The last stage's shard ``[V, H]``; the embedding's where the two are tied."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def loss_position_hidden(
    *, hidden_states: torch.Tensor, output_layer: Any, context: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Megatron's ``output_processor``: hidden states ``[N, H]`` of the positions ``context`` (in ``[B * S]``).

    What the output layer does to its input happens here instead: under sequence parallelism ``[S / tp, B, H]`` is
    gathered, and the backward sums the gradient over the ranks that share the vocabulary.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())  # DDP's wait for the weights, which calling the layer would have run
    if output_layer.sequence_parallel:
        return _select(gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group), context)
    return copy_to_tensor_model_parallel_region(_select(hidden_states, context), group=output_layer.tp_group)


def _select(hidden_SBH: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """The rows ``[N, H]`` of these positions in ``[B * S]``; only they are copied."""
    num_positions = hidden_SBH.shape[0]
    return hidden_SBH[positions_N % num_positions, positions_N // num_positions]


def _loss_position_logits(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    context: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Megatron's ``output_processor``: logits ``[N, V]`` of the positions ``context`` (in ``[B * S]``)."""
    rows_NH = loss_position_hidden(hidden_states=hidden_states, output_layer=output_layer, context=context)
    return torch.nn.functional.linear(rows_NH, output_layer.weight if output_weight is None else output_weight)


class Communicator(P2PCommunicator):
    """Megatron's point-to-point communicator, also between two interleaved stages.

    Both neighbours of a rank are then the same one. Megatron 0.19.2 exchanges the shapes of what goes either way, and
    batched messages too, in an order in which that rank takes the forward's for the backward's: so the directions
    follow one another here. (All ranks of the interleaved schedule come to such an exchange together; those of 1F1B do
    not, and have no need.)
    """

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Shape,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        assert wait_on_reqs, "overlap_p2p_comm is not supported"
        exchange = partial(super()._communicate, tensor_shape=tensor_shape)
        forward: dict[str, Any] = {"tensor_send_next": tensor_send_next, "recv_prev": recv_prev}
        backward: dict[str, Any] = {"tensor_send_prev": tensor_send_prev, "recv_next": recv_next}
        if self.virtual_pipeline_model_parallel_size in (None, 1) or self.total_stages > 2:
            received_prev, received_next, requests = exchange(**forward, **backward)
        else:
            received_prev, _, _ = exchange(**forward, tensor_send_prev=None, recv_next=False)
            _, received_next, requests = exchange(tensor_send_next=None, recv_prev=False, **backward)
        return received_prev, received_next, requests


class PairCommunicator(Communicator):
    """A communicator with a forward payload of two hidden states.

    Forward messages are ``[S, B, H_student + H_teacher]``; backward messages stay the student's ``[S, B, H_student]``.
    ``config`` is the student's and must have ``variable_seq_lengths`` (shapes travel with the messages).
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: TransformerConfig):
        assert config.variable_seq_lengths
        super().__init__(pp_group, config)
        self.student_hidden_size = config.hidden_size

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Shape,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        if tensor_send_next is not None:
            tensor_send_next = self._pack(tensor_send_next)
        received_prev, received_next, requests = super()._communicate(
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
        if received_prev is not None:
            received_prev = self._unpack(received_prev)
        return received_prev, received_next, requests

    def _pack(self, student_SBH: torch.Tensor) -> torch.Tensor:
        teacher_SBH = _take_teacher_hidden(student_SBH)
        assert teacher_SBH is not None
        return torch.cat([student_SBH.detach(), teacher_SBH], dim=-1)

    def _unpack(self, received_SBH: torch.Tensor) -> torch.Tensor:
        # Copies, so that the student's part, kept for the backward, does not keep the teacher's alive.
        student_SBH = received_SBH.detach()[..., : self.student_hidden_size].clone().requires_grad_()
        setattr(student_SBH, TEACHER_HIDDEN, received_SBH.detach()[..., self.student_hidden_size :].contiguous())
        return student_SBH


def build_communicator(stage: StudentTeacherStage, pp_group: dist.ProcessGroup) -> P2PCommunicator:
    """The communicator this stage needs, with or without a teacher."""
    config = stage.module.config
    return Communicator(pp_group, config) if not stage.has_teacher else PairCommunicator(pp_group, config)
