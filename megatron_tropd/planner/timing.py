"""Seconds of each part of a step, predicted from published figures of the hardware and stated assumptions.

All of it is arithmetic about the shapes: FLOP over FLOP/s, bytes over bytes/s, latencies by their number. A prediction
ranks layouts and says what limits; it is no measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.config_model_checks import one_stage
from megatron_tropd.planner.adapters import stage_adapter_parameters
from megatron_tropd.planner.hardware import Assumptions, Gpu
from megatron_tropd.planner.lengths import Generation, generation, lengths
from megatron_tropd.planner.memory import chosen_engine, copy_bytes, element_bytes, micro_batch_rows
from megatron_tropd.planner.parameters import (
    active_layer_parameters,
    head_widths,
    padded_vocabulary,
    stage_layers,
    stage_parameters,
)
from megatron_tropd.planner.sizes import Sizes, rollout_layout, student_layout, teacher_layout


@dataclass(frozen=True)
class StepTime:
    """Seconds, one after the other but for what is hidden."""

    rollout: float
    """The student's generation."""
    teacher: float
    """The teacher's forward passes."""
    student: float
    """The student's forward and backward passes."""
    bubble: float
    """Pipeline stages waiting for the first and the last micro-batch."""
    gradients: float
    """Reducing gradients over data-parallel ranks and gathering the new weights; counted as if nothing hid it."""
    optimizer: float
    """Reading and writing weights, gradients and moments."""
    transfer: float
    """Teacher ahead: its hidden states to the student's ranks, and what comes from host memory."""
    refit: float
    """Weights into the inference copy, as if none were on its rank already; 0 where the engine reads the trainer's."""
    hidden: float = 0.0
    """One step off: what the side of the job that is done first takes, which the other hides."""

    @property
    def total(self) -> float:
        """The step."""
        return sum(float(getattr(self, name)) for name in self._parts()) - self.hidden

    @property
    def limit(self) -> str:
        """The largest part, of two sides one that the other does not hide."""
        parts = self._parts()
        if self.hidden:
            sides = ("rollout", "teacher"), ("student", "bubble", "gradients", "optimizer")
            quicker = min(sides, key=lambda side: sum(float(getattr(self, name)) for name in side))
            parts = [name for name in parts if name not in quicker]
        return max(parts, key=lambda name: float(getattr(self, name)))

    def _parts(self) -> list[str]:
        return [field.name for field in fields(self) if field.name != "hidden"]


def step_time(config: Config, world_size: int, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """The parts of one step of `train`; both models' ``vocab_size`` must be set."""
    student, teacher = student_layout(config, world_size), teacher_layout(config, world_size)
    gradients, optimizer = _update_seconds(config, student, gpu, assumed)
    size, batch = micro_batch_rows(config), config.training.global_batch_size
    shared_by = config.training.steps_per_rollout
    again, chunks = int(config.training.recompute), config.parallel.virtual_pipeline_model_parallel_size
    passes = again + (2 if config.lora.rank else 3)  # a frozen weight takes no gradient
    num_student = batch / (size * student.data)
    is_ahead = config.parallel.teacher_schedule == "ahead"
    one_student = micro_batch_seconds(config, config.student, student, passes, 4 + 2 * again, gpu, assumed, chunks)
    one_teacher = 0.0
    if config.teacher is not None:
        own_chunks = 1 if is_ahead else chunks
        one_teacher = micro_batch_seconds(config, config.teacher, teacher, 1, 2, gpu, assumed, own_chunks)
    if is_ahead:
        num_teacher = math.ceil(batch / size / teacher.data)
        bubble = (student.pipeline - 1) * one_student / chunks + (teacher.pipeline - 1) * one_teacher
    else:
        num_teacher = math.ceil(num_student)
        bubble = (student.pipeline - 1) * (one_student + one_teacher) / chunks
    return StepTime(
        rollout=rollout_seconds(config, rollout_layout(config, world_size), gpu, assumed),
        teacher=num_teacher * one_teacher,
        student=num_student * one_student,
        bubble=bubble,
        gradients=gradients,
        optimizer=optimizer,
        transfer=_transfer_seconds(config, student, teacher, gpu, assumed),
        refit=copy_bytes(config) / (link_between(student.world, gpu) * assumed.network_efficiency) / shared_by,
    )


def forward_flops(model: ModelConfig, *, tokens: float, length: float, head_tokens: float) -> float:
    """FLOP of the whole model's forward: two for each weight and token, causal attention, the output layer.

    ``length``: tokens of a sequence; ``head_tokens``: those that reach the output layer.
    """
    queries, _, _ = head_widths(model)
    layer = 2 * active_layer_parameters(model) + 2 * queries * length  # scores and values, half of them masked
    return model.num_layers * layer * tokens + 2 * padded_vocabulary(model, 1) * model.hidden_size * head_tokens


def micro_batch_seconds(
    config: Config,
    model: ModelConfig,
    layout: Sizes,
    passes: int,
    rounds: int,
    gpu: Gpu,
    assumed: Assumptions,
    chunks: int = 1,
) -> float:
    """One micro-batch on the slowest stage: ``passes`` times the FLOP of a forward, ``rounds`` reductions a layer.

    Two all-reduces a layer (or, sequence parallel, the same bytes as reduce-scatter and all-gather), and as many in
    the backward; recomputation runs the forward's once more. A layer of experts has one of the two, and takes tokens to
    its experts and back instead. ``chunks``: interleaved stages, each of which is sent to.
    """
    long, size = lengths(config, assumed), micro_batch_rows(config)
    tokens = size * long.sequence
    stages = stage_layers(model, layout.pipeline)
    one_layer = forward_flops(model, tokens=tokens, length=long.sequence, head_tokens=0) / model.num_layers
    flops = [layers * one_layer for layers in stages]
    flops[-1] += 2 * padded_vocabulary(model, 1) * model.hidden_size * size * long.response
    layers = stages[flops.index(max(flops))]
    products = max(flops) / (layout.tensor * layout.context) / (gpu.flops * assumed.matrix_efficiency)
    compute = passes * max(products, layers * assumed.training_layer_overhead)
    hidden = tokens / layout.context * model.hidden_size * element_bytes(config)
    link = link_between(layout.world, gpu) * assumed.network_efficiency
    num_reductions = layers * rounds / (1 if model.num_moe_experts is None else 2)
    reduce = num_reductions * all_reduce_seconds(hidden, layout.tensor, gpu.nvlink, assumed)
    # Keys and values: gathered in every forward, their gradients reduce-scattered once.
    _, keys, _ = head_widths(model)
    gathered = 2 * tokens * keys / layout.tensor * element_bytes(config) * (layout.context - 1) / layout.context
    exchange = layers * {2: 1, 4: 2, 6: 3}[rounds] * gathered / link
    dispatch = layers * rounds * expert_dispatch_seconds(model, hidden, layout, gpu, assumed)
    send = 0.0
    if layout.pipeline > 1:
        sent = hidden / (layout.tensor if config.parallel.sequence_parallel else 1)
        send = (1 if rounds == 2 else 2) * chunks * sent / link
    return compute + reduce + exchange + dispatch + send


def expert_dispatch_seconds(model: ModelConfig, hidden: float, layout: Sizes, gpu: Gpu, assumed: Assumptions) -> float:
    """Taking one micro-batch's tokens, ``hidden`` bytes, to their experts in one layer, or back; 0 without experts.

    Each tensor-parallel rank sends its share, once for each expert that a token goes to, to the ranks that these are
    spread over; the ranks that share an expert gather what any of them got.
    """
    if model.num_moe_experts is None or layout.experts is None:
        return 0.0
    shared_by = layout.experts_shared_by or 1
    spread = layout.experts // shared_by
    link = link_between(layout.experts, gpu)
    sent = hidden / layout.tensor * model.moe_router_topk * ((spread - 1) / spread + shared_by - 1)
    return sent / (link * assumed.network_efficiency) + (assumed.collective_latency if layout.experts > 1 else 0.0)


def link_between(num_ranks: int, gpu: Gpu) -> float:
    """Bytes/s between any two of so many ranks."""
    return gpu.nvlink if num_ranks <= gpu.per_node else gpu.network


def all_reduce_seconds(num_bytes: float, ranks: int, link: float, assumed: Assumptions) -> float:
    """A ring: each rank sends 2 (n - 1) / n of the bytes."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * num_bytes / (link * assumed.network_efficiency) + assumed.collective_latency


@dataclass(frozen=True)
class Decoding:
    """One replica's generation of a step, token after token."""

    steps: float
    """Forwards, each of one token for every row of the engine."""
    rows: float
    """Rows in such a forward, on average."""
    context: float
    """Positions that a row attends to, on average."""


def decoding(config: Config, does: Generation, layout: Sizes) -> Decoding:
    """How often a replica in ``layout`` decodes, and what, in one generation.

    Static batching: batch after batch, each to its longest response with all its rows. Dynamic batching: a row that
    ends makes room for the next, so that only the last responses wait for the longest.
    """
    all_rows = does.sequences / layout.replicas
    rows = min(config.rollout.max_batch_size, all_rows)
    if chosen_engine(config, layout).kind == "static":
        steps = math.ceil(all_rows / rows) * does.longest
        return Decoding(steps * does.rounds, rows, does.read + does.longest / 2)
    steps = all_rows / rows * does.tokens + does.longest - does.tokens
    return Decoding(steps * does.rounds, all_rows * does.tokens / steps, does.context)


def rollout_seconds(config: Config, layout: Sizes, gpu: Gpu, assumed: Assumptions) -> float:
    """Prefill, as if no prompt were shared, and ``decoding``.

    A decoded token costs the longer of reading weights and cache, and the products; the launch overhead of the engine
    that ``auto`` chooses on a GPU (or the one asked for) and two all-reduces for every layer. Pipeline stages follow
    one another.
    """
    does, e = generation(config, assumed), element_bytes(config)
    if does is None:
        return 0.0
    model = one_stage(config.student) if layout.pipeline == 1 else config.student
    decodes = decoding(config, does, layout)
    products = gpu.flops * assumed.matrix_efficiency * layout.tensor
    read = does.rounds * does.sequences / layout.replicas
    prefill = forward_flops(model, tokens=read * does.read, length=does.read, head_tokens=read) / products
    _, keys, _ = head_widths(model)
    weights = sum(stage_parameters(model, layout.tensor, layout.pipeline)) * e
    cache = model.num_layers * decodes.rows * decodes.context * 2 * keys / layout.tensor * e
    load = (weights + cache) / (gpu.memory_bandwidth * assumed.memory_efficiency)
    multiply = (
        forward_flops(model, tokens=decodes.rows, length=2 * decodes.context, head_tokens=decodes.rows) / products
    )
    has_graphs = chosen_engine(config, layout).cuda_graphs
    launch = assumed.decode_layer_overhead if has_graphs else assumed.eager_layer_overhead
    reduce = all_reduce_seconds(decodes.rows * model.hidden_size * e, layout.tensor, gpu.nvlink, assumed)
    token = max(load, multiply) + model.num_layers * (launch + 2 * reduce)
    return prefill + decodes.steps * token


def _transfer_seconds(config: Config, student: Sizes, teacher: Sizes, gpu: Gpu, assumed: Assumptions) -> float:
    """Each student replica's hidden states over one link, and through the host and back where they wait there."""
    parallel, model, e = config.parallel, config.teacher, element_bytes(config)
    if model is None or parallel.teacher_schedule == "shared":
        return 0.0
    rows = config.training.global_batch_size * lengths(config, assumed).response / student.replicas
    hidden = rows * model.hidden_size * e
    link = link_between(student.world, gpu)
    seconds = hidden / (link * assumed.network_efficiency) if teacher != student else 0.0
    if parallel.teacher_hidden == "host":
        seconds += 2 * hidden / student.tensor / assumed.host_bandwidth
    if parallel.offload_teacher:
        weights = max(stage_parameters(model, teacher.tensor, teacher.pipeline, teacher.experts)) * e
        seconds += weights / assumed.host_bandwidth
    return seconds


def _update_seconds(config: Config, layout: Sizes, gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    """(communication of gradients and weights, optimizer) of the largest stage."""
    e, trained = element_bytes(config), stage_parameters(config.student, layout.tensor, layout.pipeline, layout.experts)
    if config.lora.rank:
        trained = stage_adapter_parameters(config.student, config.lora, layout.tensor, layout.pipeline)
    count = max(trained)
    link = link_between(layout.world, gpu)
    moved = (layout.replicas - 1) / layout.replicas * count * (4 + e)
    shards = layout.replicas if config.optimizer.use_distributed_optimizer else 1
    # Gradient and three fp32 values read, three and the weight written.
    touched = count / shards * (4 + 12 + 12 + e)
    on_host = config.optimizer.optimizer_offload_fraction if config.optimizer.optimizer_cpu_offload else 0.0
    step = (1 - on_host) * touched / (gpu.memory_bandwidth * assumed.memory_efficiency)
    # The gradient in fp32 to the host, the step there, the weight in fp32 back.
    step += on_host * (touched / assumed.host_memory_bandwidth + count / shards * 8 / assumed.host_bandwidth)
    return moved / (link * assumed.network_efficiency), step
