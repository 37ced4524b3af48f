"""Bytes on one rank, by component.

Weights, gradients, optimizer state, KV cache and saved activations follow from what Megatron allocates; a test compares
each with bytes measured on the real trainer. ``e``: bytes of an element of the weights' type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

from megatron_tropd.config import Config
from megatron_tropd.config_model_checks import one_stage
from megatron_tropd.engine_choice import Choice, choose_engine, generation_place
from megatron_tropd.planner.activations import LayerSpec, activation_bytes, layer_activations, layer_transient
from megatron_tropd.planner.adapters import added_activations, stage_adapter_parameters
from megatron_tropd.planner.lengths import in_flight
from megatron_tropd.planner.parameters import (
    head_widths,
    layer_expert_parameters,
    padded_vocabulary,
    stage_layers,
    stage_parameters,
)
from megatron_tropd.planner.sizes import Sizes, rollout_layout, student_layout, teacher_layout
from megatron_tropd.vocab_parallel.output_head import recommended_chunk_size


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. Generation, a teacher pass ahead, and the schedule that trains follow one another."""

    student_weights: int
    student_copy: int
    """Weights of the inference copy; 0 where the engine reads the trainer's own."""
    teacher_weights: int
    """0 where the teacher is in host memory between its passes; its output weight for the student's layout counts."""
    gradients: int
    """fp32, over all data-parallel ranks the same."""
    optimizer: int
    """fp32 weights (for bf16 models) and Adam's two moments, divided by the data-parallel size where distributed; what
    waits in host memory does not count."""
    activations: int
    """What the student's forward saves for the backward, for all micro-batches in flight."""
    teacher_hidden: int
    """shared: the teacher's hidden states between stages and at the output layer; ahead: this rank's share of those
    that wait for the student's schedule."""
    head: int
    """Fused heads: both models' logits of one chunk, and where it is trained the student's output weight's gradient in
    fp32."""
    logits: int
    """Both models' whole logits; 0 with the fused heads."""
    workspace: int
    """Transient tensors of one layer; with recomputation its saved activations too."""
    teacher_pass: int
    """ahead: hidden states of the whole pass on the teacher's last stage, transient tensors of a layer, and the weights
    where they come from the host."""
    kv_cache: int
    """Keys and values of one batch of the engine at its longest, or the most that the dynamic engine may have."""
    prefill: int
    """Transient tensors of one layer over the prompts read at once, and the logits of one position."""
    on_host: int = 0
    """In the host's memory, pinned: the teacher between its passes, hidden states that wait there, the optimizer's
    offloaded part. No part of the peak."""

    @property
    def resident(self) -> int:
        """What is there from start to end."""
        return self.student_weights + self.student_copy + self.teacher_weights + self.gradients + self.optimizer

    @property
    def training(self) -> int:
        """What the forward and backward add at their peak."""
        return self.activations + self.teacher_hidden + self.head + self.logits + self.workspace

    @property
    def rollout(self) -> int:
        """What generation adds at its peak."""
        return self.kv_cache + self.prefill

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.resident + max(self.training, self.rollout, self.teacher_pass)

    def components(self) -> dict[str, int]:
        """Name to bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def chosen_engine(config: Config, layout: Sizes) -> Choice:
    """The engine of a GPU in the ``layout`` that generates."""
    return choose_engine(config.rollout, generation_place(config, "train", pipeline=layout.pipeline), on_gpu=True)


def copy_bytes(config: Config) -> int:
    """Weights of the inference copy on a rank, whose vocabulary is padded as the trainer's; 0 without one."""
    tensor, student = config.rollout.tensor_model_parallel_size, config.student
    if tensor is None:
        return 0
    padded = padded_vocabulary(student, config.parallel.tensor_model_parallel_size)
    copied = replace(one_stage(student), vocab_size=padded, make_vocab_size_divisible_by=1)
    adapters = stage_adapter_parameters(copied, config.lora, tensor, 1)
    return (stage_parameters(copied, tensor, 1)[0] + adapters[0]) * element_bytes(config)


def micro_batch_rows(config: Config) -> int:
    """Sequences of a micro-batch where all are as long as the config allows."""
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    tokens = config.training.micro_batch_tokens
    return config.training.micro_batch_size if tokens is None else tokens // longest


def element_bytes(config: Config) -> int:
    """e: 4 for fp32; 2 for bf16, and for ``auto``, which is bf16 on GPUs."""
    return 4 if config.training.precision == "fp32" else 2


def rank_memory(
    config: Config, world_size: int, *, layer_spec: LayerSpec = "transformer-engine"
) -> dict[str, RankMemory]:
    """Bytes on a rank of every kind, with all sequences as long as the config allows, by a name such as ``stage 0``.

    Kinds differ by the pipeline stage of the student and, where it has a layout of its own, of the teacher. Both
    models' ``vocab_size`` must be set, and the config valid for ``world_size``.
    """
    student, teacher = student_layout(config, world_size), teacher_layout(config, world_size)
    kinds: dict[str, RankMemory] = {}
    num_kinds = math.lcm(student.pipeline, teacher.pipeline)
    for kind in range(num_kinds):
        # Megatron counts pipeline stages outermost.
        stage, teacher_stage = kind * student.pipeline // num_kinds, kind * teacher.pipeline // num_kinds
        name = f"stage {stage}" + f", teacher {teacher_stage}" * (teacher != student)
        generating = rollout_layout(config, world_size)
        kinds[name] = _Rank(config, stage, teacher_stage, student, teacher, generating, layer_spec).memory()
    return kinds


def weight_bytes(num_parameters: int, element: int, *, data: int, distributed: bool) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of a rank's trained parameters.

    Source: Megatron-Core's user guide, "Distributed Optimizer": bf16 weights with fp32 gradients take 18 bytes a
    parameter, or 6 + 12 / d; fp32 weights 16, or 8 + 8 / d.
    """
    state = 8 if element == 4 else 12
    return num_parameters * element, num_parameters * 4, num_parameters * state // (data if distributed else 1)


@dataclass(frozen=True)
class _Rank:
    """A rank of one kind."""

    config: Config
    stage: int
    teacher_stage: int
    student: Sizes
    teacher: Sizes
    generating: Sizes
    layer_spec: LayerSpec

    @property
    def is_last(self) -> bool:
        return self.stage == self.student.pipeline - 1

    @property
    def length(self) -> int:
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    def memory(self) -> RankMemory:
        config, sizes, training = self.config, self.student, self.config.training
        e, size = element_bytes(config), micro_batch_rows(config)
        weights, gradients, optimizer = self._student_bytes(e)
        if config.lora.rank:
            weights, gradients, optimizer = self._adapter_bytes(weights, e)
        whole_optimizer = optimizer
        if config.optimizer.optimizer_cpu_offload:
            optimizer = round(optimizer * (1 - config.optimizer.optimizer_offload_fraction))
        one_micro_batch = partial(
            activation_bytes,
            config.student,
            self.stage,
            tensor=sizes.tensor,
            pipeline=sizes.pipeline,
            context=sizes.context,
            batch=size,
            length=_part(self.length, sizes),
            element=e,
            layer_spec=self.layer_spec,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        in_flight = self._in_flight(math.ceil(training.global_batch_size / (size * sizes.data)))
        positions = size * _part(self.length, sizes)
        workspace = layer_transient(config.student, sizes.tensor, positions, e)
        if training.recompute:
            cut = sizes.tensor if config.parallel.sequence_parallel else 1
            hidden = config.student.hidden_size // cut
            workspace += layer_activations(
                config.student, sizes.tensor, sizes.context, positions, e, self.layer_spec, hidden
            )
        teacher_weights, teacher_hidden, teacher_pass, teacher_transient = self._teacher_bytes(e)
        head, logits = _head_bytes(config, sizes, e) if self.is_last else (0, 0)
        kv_cache, prefill = self._rollout_bytes(e)
        return RankMemory(
            student_weights=weights,
            student_copy=copy_bytes(config),
            teacher_weights=teacher_weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=int((one_micro_batch(recompute=training.recompute) + self._added_activations(e)) * in_flight),
            teacher_hidden=teacher_hidden,
            head=head,
            logits=logits,
            workspace=max(workspace, teacher_transient),
            teacher_pass=teacher_pass,
            kv_cache=kv_cache,
            prefill=prefill,
            on_host=whole_optimizer - optimizer + self._on_host(e),
        )

    def _in_flight(self, num_micro_batches: int) -> float:
        """Micro-batches whose activations wait for their backward; a chunk of the rank's layers counts for its part.

        Source: the number of forwards before the first backward in Megatron's schedules; Narayanan et al. 2021 (arXiv
        2104.04473) for the interleaved one.
        """
        chunks, stages = self.config.parallel.virtual_pipeline_model_parallel_size, self.student.pipeline
        if chunks == 1:
            return min(num_micro_batches, stages - self.stage)
        forwards = 2 * (stages - self.stage - 1) + (chunks - 1) * stages + 1
        return min(num_micro_batches * chunks, forwards) / chunks

    def _student_bytes(self, e: int) -> tuple[int, int, int]:
        """(weights, gradients, optimizer state); that of experts is divided by the ranks that hold the same ones."""
        student, sizes, spread = self.config.student, self.student, self.student.experts or self.student.tensor
        whole = stage_parameters(student, sizes.tensor, sizes.pipeline, spread)[self.stage]
        experts = stage_layers(student, sizes.pipeline)[self.stage] * layer_expert_parameters(student, spread)
        distributed = self.config.optimizer.use_distributed_optimizer
        dense_bytes = weight_bytes(whole - experts, e, data=sizes.replicas, distributed=distributed)
        replicas = sizes.tensor * sizes.replicas // spread
        expert_bytes = weight_bytes(experts, e, data=replicas, distributed=distributed)
        weights, gradients, optimizer = map(sum, zip(dense_bytes, expert_bytes, strict=True))
        return weights, gradients, optimizer

    def _adapter_bytes(self, base: int, e: int) -> tuple[int, int, int]:
        """(weights, gradients, optimizer state) where ``base`` bytes of weights are frozen beside the adapters."""
        sizes, is_distributed = self.student, self.config.optimizer.use_distributed_optimizer
        counts = stage_adapter_parameters(self.config.student, self.config.lora, sizes.tensor, sizes.pipeline)
        own, gradients, optimizer = weight_bytes(counts[self.stage], e, data=sizes.replicas, distributed=is_distributed)
        return base + own, gradients, optimizer

    def _added_activations(self, e: int) -> int:
        config, sizes = self.config, self.student
        if not config.lora.rank or config.training.recompute:
            return 0
        return added_activations(
            config.student,
            config.lora,
            self.stage,
            tensor=sizes.tensor,
            pipeline=sizes.pipeline,
            tokens=micro_batch_rows(config) * _part(self.length, sizes),
            element=e,
            layer_spec=self.layer_spec,
            sequence_parallel=config.parallel.sequence_parallel,
        )

    def _teacher_bytes(self, e: int) -> tuple[int, int, int, int]:
        """(weights, waiting hidden states, pass ahead, transient tensors beside the student's)."""
        teacher, parallel = self.config.teacher, self.config.parallel
        if teacher is None:
            return 0, 0, 0, 0
        sizes = self.teacher
        tokens = micro_batch_rows(self.config) * _part(self.length, sizes)
        weights = 0
        if not self.config.lora.base_is_teacher:
            weights = stage_parameters(teacher, sizes.tensor, sizes.pipeline, sizes.experts)[self.teacher_stage] * e
        count = 1 + len(self.config.teachers)
        transient = layer_transient(teacher, sizes.tensor, tokens, e)
        if parallel.teacher_schedule == "shared":
            return weights, self._teacher_hidden(tokens * teacher.hidden_size * e), 0, transient
        row = teacher.hidden_size * e
        own_pass = transient + self._passed(row)
        table = padded_vocabulary(teacher, self.student.tensor) // self.student.tensor * row
        is_apart = sizes != self.student or sizes.experts != self.student.experts
        is_apart = is_apart or parallel.virtual_pipeline_model_parallel_size > 1  # a teacher ahead has one chunk
        head = table if self.is_last and is_apart else 0
        if parallel.offload_teacher:
            return head * count, self._waiting(row), own_pass + weights, 0
        return (weights + head) * count, self._waiting(row), own_pass, 0

    def _teacher_hidden(self, whole: int) -> int:
        """shared: of a micro-batch's ``whole`` hidden states, what is on its way between stages, or at the output
        layer."""
        pipeline, parallel = self.teacher.pipeline, self.config.parallel
        if pipeline == 1:
            return whole
        on_its_way = (2 if parallel.virtual_pipeline_model_parallel_size == 1 else 3) * whole
        if parallel.sequence_parallel:
            on_its_way //= self.teacher.tensor
        return max(whole, on_its_way) if self.is_last else on_its_way

    def _passed(self, row: int) -> int:
        """ahead: hidden states, of ``row`` bytes each, at the end of a pass: the larger of those this rank has judged
        and those that wait on it, and one micro-batch's that are being handed over."""
        sizes, size = self.teacher, micro_batch_rows(self.config)
        per_replica = math.ceil(self.config.training.global_batch_size / (size * self.student.data))
        judged = 0
        one = size * _response_part(self.config, sizes) * row
        if self.teacher_stage == sizes.pipeline - 1:
            judged = math.ceil(per_replica * self.student.data / sizes.data) * one
        waiting = self._waiting(row)
        return max(judged, waiting) + (one if judged or waiting else 0)

    def _waiting(self, row: int, *, place: str = "device") -> int:
        if not self.is_last or self.config.parallel.teacher_hidden != place:
            return 0
        sequences = math.ceil(self.config.training.global_batch_size / self.student.data)
        return sequences * _response_part(self.config, self.student) * row // self.student.tensor

    def _on_host(self, e: int) -> int:
        """Of the teacher's weights and hidden states."""
        teacher, parallel, sizes = self.config.teacher, self.config.parallel, self.teacher
        if teacher is None or parallel.teacher_schedule == "shared":
            return 0
        waiting = self._waiting(teacher.hidden_size * e, place="host")
        if not parallel.offload_teacher or self.config.lora.base_is_teacher:
            return waiting
        counts = stage_parameters(teacher, sizes.tensor, sizes.pipeline, sizes.experts)
        return waiting + counts[self.teacher_stage] * e * (1 + len(self.config.teachers))

    def _rollout_bytes(self, e: int) -> tuple[int, int]:
        """(KV cache, prefill): room for the longest sequence in every row of a batch.

        The dynamic engine takes whole blocks and one more, at most what the config lets it have; and it reads prompts
        in parts.
        """
        student, rollout, sizes = self.config.student, self.config.rollout, self.generating
        has_copy = rollout.tensor_model_parallel_size is not None
        rows = min(rollout.max_batch_size, math.ceil(in_flight(self.config) / sizes.replicas))
        _, keys, _ = head_widths(student)
        layers = student.num_layers if has_copy else stage_layers(student, sizes.pipeline)[self.stage]
        token = layers * 2 * (keys // sizes.tensor) * e
        cache, read = rows * self.length * token, rows * self.config.data.max_prompt_length
        if chosen_engine(self.config, sizes).kind == "dynamic":
            size = rollout.dynamic.block_size_tokens
            cache = (rows * math.ceil(self.length / size) + 1) * size * token
            if rollout.dynamic.buffer_size_gb is not None:
                cache = min(cache, int(rollout.dynamic.buffer_size_gb * 2**30))
            read = min(read, rollout.dynamic.max_tokens)
        prefill = layer_transient(student, sizes.tensor, read, e)
        if self.is_last or has_copy:
            prefill += rows * padded_vocabulary(student, sizes.tensor) * 4
        return cache, prefill


def _part(length: int, sizes: Sizes) -> int:
    """Positions of a sequence on one context-parallel rank: two chunks."""
    return length if sizes.context == 1 else 2 * math.ceil(length / (2 * sizes.context))


def _response_part(config: Config, sizes: Sizes) -> int:
    """Response positions of a sequence on the context-parallel rank that has most: its two chunks lie as far from the
    front as from the back."""
    prompt, response = config.data.max_prompt_length, config.rollout.max_response_length
    if sizes.context == 1:
        return response
    num_chunks = 2 * sizes.context
    chunk = math.ceil((prompt + response) / num_chunks)
    of_chunk = [max(0, min(chunk, (index + 1) * chunk - prompt)) for index in range(num_chunks)]
    return max(of_chunk[rank] + of_chunk[num_chunks - 1 - rank] for rank in range(sizes.context))


def _head_bytes(config: Config, sizes: Sizes, element: int) -> tuple[int, int]:
    """(fused heads, whole logits) of the last stage, one of which is 0."""
    student, teacher, training = config.student, config.teacher, config.training
    tensor, tokens = sizes.tensor, micro_batch_rows(config) * _response_part(config, sizes)
    shard = padded_vocabulary(student, tensor) // tensor
    teacher_shard = padded_vocabulary(teacher, tensor) // tensor if teacher is not None else 0
    teacher_hidden = teacher.hidden_size if teacher is not None else 0
    rows = tokens * element * (2 * student.hidden_size + teacher_hidden)
    if training.output_head == "logits":
        return rows, tokens * element * (shard + teacher_shard)
    chunk = training.head_chunk_size or recommended_chunk_size(
        tokens, shard, student.hidden_size, teacher_hidden, fp32_logits=training.fp32_logits
    )
    logits = min(chunk, tokens) * (shard + teacher_shard) * (4 if training.fp32_logits else element)
    is_frozen = config.lora.rank > 0
    gradient = shard * student.hidden_size * 4 if training.output_head == "fused" and not is_frozen else 0
    return rows + logits + gradient, 0
