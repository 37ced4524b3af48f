"""Bytes on one rank, by component.

Weights, gradients, optimizer state, KV cache and saved activations follow from what Megatron allocates; a test compares
each with bytes measured on the real trainer. Letters as in ``parameters``; ``e`` bytes of an element of the weights'
type, ``a`` query heads on this rank, ``S`` tokens of a sequence, ``T`` tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_tropd.config import Config, ModelConfig
from megatron_tropd.planner.parameters import head_widths, padded_vocabulary, stage_layers, stage_parameters
from megatron_tropd.vocab_parallel.output_head import recommended_chunk_size

Attention = Literal["flash", "unfused"]
"""flash: TransformerEngine's layers, no [S, S] matrix; unfused: Megatron's local layers, which keep one per head."""

RESERVE_BYTES = 4 * 10**9
"""Assumed for what no formula here covers: CUDA context, NCCL buffers, cuBLAS workspace, allocator fragmentation."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. What training and generation need beside the rest never exists at the same time."""

    student_weights: int
    teacher_weights: int
    gradients: int
    """fp32, over all data-parallel ranks the same."""
    optimizer: int
    """fp32 weights (for bf16 models) and Adam's two moments, divided by the data-parallel size where distributed."""
    activations: int
    """What the student's forward saves for the backward, for all micro-batches in flight."""
    teacher_hidden: int
    """The teacher's hidden states between stages and at the output layer."""
    head: int
    """Fused heads: both models' logits of one chunk, the fp32 gradient of the student's output weight."""
    logits: int
    """Both models' whole logits; 0 with the fused heads."""
    workspace: int
    """Transient tensors of one layer; with recomputation its saved activations too."""
    kv_cache: int
    """Keys and values of one batch of the engine at its longest."""
    prefill: int
    """Transient tensors of one layer over a batch's prompts, and the logits of one position."""

    @property
    def resident(self) -> int:
        """What is there from start to end."""
        return self.student_weights + self.teacher_weights + self.gradients + self.optimizer

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
        return self.resident + max(self.training, self.rollout)

    def components(self) -> dict[str, int]:
        """Name to bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def element_bytes(config: Config) -> int:
    """e: 4 for fp32; 2 for bf16, and for ``auto``, which is bf16 on GPUs."""
    return 4 if config.training.precision == "fp32" else 2


def rank_memory(config: Config, world_size: int, *, attention: Attention = "flash") -> list[RankMemory]:
    """Of every pipeline stage, the bytes on one of its ranks, with all sequences as long as the config allows.

    Both models' ``vocab_size`` must be set, and the config valid for ``world_size``.
    """
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = world_size // (tensor * pipeline)
    return [_stage_memory(config, stage, tensor, pipeline, data, attention) for stage in range(pipeline)]


def weight_bytes(num_parameters: int, element: int, *, data: int, distributed: bool) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of a rank's trained parameters.

    Source: Megatron-Core's user guide, "Distributed Optimizer": bf16 weights with fp32 gradients take 18 bytes a
    parameter, or 6 + 12 / d; fp32 weights 16, or 8 + 8 / d.
    """
    state = 8 if element == 4 else 12
    return num_parameters * element, num_parameters * 4, num_parameters * state // (data if distributed else 1)


def _stage_memory(
    config: Config, stage: int, tensor: int, pipeline: int, data: int, attention: Attention
) -> RankMemory:
    student, teacher, training = config.student, config.teacher, config.training
    e, length = element_bytes(config), config.data.max_prompt_length + config.rollout.max_response_length
    size, is_last = training.micro_batch_size, stage == pipeline - 1
    distributed = config.optimizer.use_distributed_optimizer
    own = stage_parameters(student, tensor, pipeline)[stage]
    weights, gradients, optimizer = weight_bytes(own, e, data=data, distributed=distributed)
    num_micro_batches = training.global_batch_size // (size * data)
    saved = activation_bytes(
        student, stage, tensor=tensor, pipeline=pipeline, batch=size, length=length, element=e,
        attention=attention, recompute=training.recompute,
    )  # fmt: skip
    one_layer = _layer_activations(student, tensor, size, length, e, attention)
    transient = _layer_transient(student, tensor, size * length, e)
    teacher_weights = teacher_hidden = 0
    if teacher is not None:
        teacher_weights = stage_parameters(teacher, tensor, pipeline)[stage] * e
        teacher_hidden = size * length * teacher.hidden_size * e * (2 if pipeline > 1 else 1)
        transient = max(transient, _layer_transient(teacher, tensor, size * length, e))
    head, logits = _head_bytes(config, tensor, e) if is_last else (0, 0)
    kv_cache, prefill = _rollout_bytes(config, stage, tensor, pipeline, data, e)
    return RankMemory(
        student_weights=weights,
        teacher_weights=teacher_weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=saved * min(num_micro_batches, pipeline - stage),
        teacher_hidden=teacher_hidden,
        head=head,
        logits=logits,
        workspace=transient + one_layer * training.recompute,
        kv_cache=kv_cache,
        prefill=prefill,
    )


# ---------------------------------------------------------------------------------------------------- activations


def activation_bytes(
    model: ModelConfig,
    stage: int,
    *,
    tensor: int,
    pipeline: int,
    batch: int,
    length: int,
    element: int,
    attention: Attention,
    recompute: bool,
) -> int:
    """What the forward of one micro-batch saves for the backward on a rank of ``stage``.

    With recomputation the input of each layer alone. The last stage adds the final norm and the choice of the
    positions that carry loss, the first the token ids.
    """
    tokens, hidden = batch * length, model.hidden_size
    layers = stage_layers(model, pipeline)[stage]
    per_layer = _layer_activations(model, tensor, batch, length, element, attention)
    saved = layers * (tokens * hidden * element if recompute else per_layer)
    if stage == 0:
        saved += tokens * 8
    if stage == pipeline - 1:
        # The norm's output is not saved: only rows of it are read.
        saved += tokens * (_norm_activations(model, hidden, element, attention) - hidden * element + 16)
    return saved


def _layer_activations(
    model: ModelConfig, tensor: int, batch: int, length: int, element: int, attention: Attention
) -> int:
    """Saved by one layer. The input of a linear layer that follows a norm is the norm's output, counted there."""
    per_token = 2 * _norm_activations(model, model.hidden_size, element, attention)
    per_token += _attention_activations(model, tensor, length, element, attention)
    per_token += _feed_forward_activations(model, tensor, element)
    shared = length * length if attention == "unfused" else 0  # the causal mask, one byte, for the whole batch
    return batch * length * per_token + shared


def _norm_activations(model: ModelConfig, width: int, element: int, attention: Attention) -> int:
    """A norm and its output. Local RMSNorm computes in fp32 and keeps the input and the normalised value so."""
    if attention == "unfused" and model.normalization == "RMSNorm":
        return (8 + element) * width + 4
    return 2 * element * width + (8 if model.normalization == "LayerNorm" else 4)


def _attention_activations(model: ModelConfig, tensor: int, length: int, element: int, attention: Attention) -> int:
    queries, keys, _ = (width // tensor for width in head_widths(model))
    heads = model.num_attention_heads // tensor
    groups = (model.num_query_groups or model.num_attention_heads) // tensor
    if attention == "flash":
        norms = (queries + keys) * element + 4 * (heads + groups) if model.qk_layernorm else 0
        # Queries, keys, values, the result (which is the projection's input), and the softmax's log-sum.
        return (2 * queries + 2 * keys) * element + 4 * heads + norms
    norms = 0
    if model.qk_layernorm:
        keys_input = (queries + 2 * keys) * 4 if element == 4 else keys * 4  # in fp32 a view of all of QKV
        norms = 8 * queries + 4 * keys + keys_input + 4 * (heads + groups)
    # Keys and values are repeated for every query head; probabilities in fp32, and in the weights' type to multiply.
    return 4 * queries * element + heads * length * (4 + (element if element != 4 else 0)) + norms


def _feed_forward_activations(model: ModelConfig, tensor: int, element: int) -> int:
    if model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None:
        width = model.moe_ffn_hidden_size // tensor
        # Each chosen expert: its row of the input, the gated product's parts, the product by the router's weight.
        return model.moe_router_topk * (element * (model.hidden_size + 6 * width) + 32)
    width = model.ffn_hidden_size // tensor
    # Gated: both halves (2), the activation, Megatron's copy of the linear half, the product. Else: in and out.
    return element * width * (5 if model.swiglu else 2)


def _layer_transient(model: ModelConfig, tensor: int, tokens: int, element: int) -> int:
    """Live at once inside one layer without autograd: residual, norm, and the feed-forward's halves and product."""
    width = model.ffn_hidden_size
    if model.moe_ffn_hidden_size is not None:
        width = model.moe_ffn_hidden_size * model.moe_router_topk
    return tokens * element * (3 * model.hidden_size + (4 if model.swiglu else 2) * width // tensor)


# ------------------------------------------------------------------------------------------ output layers, rollout


def _head_bytes(config: Config, tensor: int, element: int) -> tuple[int, int]:
    """(fused heads, whole logits) of the last stage, one of which is 0."""
    student, teacher, training = config.student, config.teacher, config.training
    tokens = training.micro_batch_size * config.rollout.max_response_length
    shard = padded_vocabulary(student, tensor) // tensor
    teacher_shard = padded_vocabulary(teacher, tensor) // tensor if teacher is not None else 0
    teacher_hidden = teacher.hidden_size if teacher is not None else 0
    rows = tokens * element * (2 * student.hidden_size + teacher_hidden)
    if training.output_head == "logits":
        return rows, tokens * element * (shard + teacher_shard)
    chunk = training.head_chunk_size or recommended_chunk_size(
        tokens, student.hidden_size, teacher_hidden, fp32_logits=training.fp32_logits
    )
    logits = min(chunk, tokens) * (shard + teacher_shard) * (4 if training.fp32_logits else element)
    gradient = shard * student.hidden_size * 4 if training.output_head == "fused" else 0
    return rows + logits + gradient, 0


def _rollout_bytes(config: Config, stage: int, tensor: int, pipeline: int, data: int, element: int) -> tuple[int, int]:
    """(KV cache, prefill) of the static engine: room for the longest sequence in every row of a batch."""
    student, rollout = config.student, config.rollout
    rows = min(rollout.max_batch_size, config.training.global_batch_size // data)
    _, keys, _ = head_widths(student)
    layers = stage_layers(student, pipeline)[stage]
    length = config.data.max_prompt_length + rollout.max_response_length
    kv_cache = layers * rows * length * 2 * (keys // tensor) * element
    prefill = _layer_transient(student, tensor, rows * config.data.max_prompt_length, element)
    if stage == pipeline - 1:
        prefill += rows * padded_vocabulary(student, tensor) * 4
    return kv_cache, prefill
