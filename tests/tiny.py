"""Small models and batches that the multi-rank tests share. Imports Megatron: use it inside ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd import distributed
from megatron_tropd.ahead import TeacherAhead
from megatron_tropd.config import ModelConfig, OptimizerConfig
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.hf_mapping import global_expert_name, is_expert
from megatron_tropd.lora import adapted_layers, add_adapters
from megatron_tropd.models import build_model, build_teacher, keyed_generator, padded_vocab_size
from megatron_tropd.objectives import Objective, preset
from megatron_tropd.optimization import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_tropd.packing import pack
from megatron_tropd.pair import StudentTeacherStage
from megatron_tropd.step import Learner
from megatron_tropd.teachers import TeachersAhead, base_as_teacher
from megatron_tropd.types import Batch, MicroBatch, OutputHeadMode, TokenRegion
from megatron_tropd.weight_gather import WeightGather

# isort: split
from megatron.core.models.gpt import GPTModel

VOCAB_SIZE = 45
STUDENT = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    num_query_groups=2,
    make_vocab_size_divisible_by=8,
)
TEACHER = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    ffn_hidden_size=96,
    num_query_groups=2,
    qk_layernorm=True,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
    make_vocab_size_divisible_by=32,
    init_method_std=0.2,
)
"""Differs from the student in depth, width, heads, norms, biases, tying and padded vocabulary."""


def start(
    *,
    tp: int,
    pp: int,
    vp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    seed: int = 7,
    sequence_parallel: bool = False,
) -> Layout:
    """Process groups of this layout over all ranks, replacing those of an earlier one."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return distributed.initialize(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        seed=seed,
        timeout_minutes=2,
        sequence_parallel=sequence_parallel,
        virtual_pipeline_model_parallel_size=vp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        context_parallel_size=cp,
    )


def build_learner(
    layout: Layout,
    *,
    objective: Objective | None = None,
    student: ModelConfig = STUDENT,
    teacher: ModelConfig | None = TEACHER,
    optimizer: OptimizerConfig | None = None,
    normalization: str = "tokens",
    dtype: torch.dtype = torch.float32,
    output_head: OutputHeadMode = "fused",
    head_chunk_size: int | None = 3,
    ahead: tuple[int, int] | None = None,
    teacher_seeds: Mapping[str, int] | None = None,
    offload: bool = False,
    recompute: bool = False,
    lora: LoraConfig | None = None,
    overlap: bool = False,
) -> Learner:
    """A learner on the tiny pair with deterministic weights; ``ahead``: the teacher's own tensor and pipeline size,
    of several by name where there are ``teacher_seeds``; ``lora``: adapters, whose B is not 0; ``overlap``: of the
    reduction of gradients with the backward."""
    optimizer = optimizer or OptimizerConfig(lr=1e-2)
    sizes = {"vocab_size": VOCAB_SIZE, "max_sequence_length": 64, "dtype": dtype}
    base_is_teacher = lora is not None and lora.base_is_teacher
    has_own = teacher is not None and ahead is None and not base_is_teacher
    stages = [
        StudentTeacherStage(
            _student(student, layout, lora, seed=1, recompute=recompute, chunk=chunk, **sizes),
            build_teacher(teacher, layout, seed=2, chunk=chunk, **sizes) if teacher and has_own else None,
            output_head=output_head,
            base_is_teacher=base_is_teacher and ahead is None,
        )
        for chunk in range(layout.virtual_pipeline_size)
    ]
    teacher_ahead = None
    if base_is_teacher and ahead is not None:
        teacher_ahead = base_as_teacher(stages[0].module, layout, hidden="device")
    elif teacher and ahead is not None:
        seeds = teacher_seeds or {"": 2}
        teacher_ahead = TeachersAhead(
            {name: _teacher_ahead(teacher, layout, ahead, offload, sizes, seed) for name, seed in seeds.items()}
        )
    chunks = wrap_data_parallel(stages, optimizer, layout, overlap=overlap)
    megatron_optimizer = build_optimizer(chunks, optimizer, layout, dtype=dtype)
    return Learner(
        chunks=chunks,
        gather=WeightGather(chunks, overlap=optimizer.overlap_param_gather),
        optimizer=megatron_optimizer,
        scheduler=build_scheduler(megatron_optimizer, optimizer, train_iters=100),
        layout=layout,
        objective=objective or preset("tropd", top_k=5),
        normalization=normalization,
        vocab_size=VOCAB_SIZE,
        head_chunk_size=head_chunk_size,
        ahead=teacher_ahead,
    )


def _student(config: ModelConfig, layout: Layout, lora: LoraConfig | None, **sizes: Any) -> GPTModel:
    model = build_model(config, layout, megatron_linears=lora is not None, **sizes)
    if lora is not None:
        add_adapters(model, lora, layout, seed=4)
        draw_adapters(model, layout)
    return model


def draw_adapters(model: GPTModel, layout: Layout, *, std: float = 0.2) -> None:
    """Values of B that do not depend on the layout."""
    for name, linear in adapted_layers(model):
        part_OR, glu = linear.adapter.lora_B, name.endswith("linear_fc1") and model.config.gated_linear_unit
        size, rank = (layout.tensor_parallel_size, layout.tensor_parallel_rank) if linear.adapter.is_column else (1, 0)
        shape = part_OR.shape[0] * size, part_OR.shape[1]
        whole_OR = std * torch.randn(shape, generator=keyed_generator(5, name))
        blocks = [block.chunk(size)[rank] for block in whole_OR.chunk(2 if glu else 1)]
        part_OR.data.copy_(torch.cat(blocks))


def _teacher_ahead(
    config: ModelConfig,
    students: Layout,
    parallel_sizes: tuple[int, int],
    offload: bool,
    sizes: dict[str, Any],
    seed: int,
) -> TeacherAhead:
    tp, pp = parallel_sizes
    layout = dataclasses.replace(students, virtual_pipeline_size=1) if students.virtual_pipeline_size > 1 else students
    if (tp, pp) != (students.tensor_parallel_size, students.pipeline_size):
        layout = distributed.another_layout(students, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    with distributed.active(layout):
        teacher = build_teacher(config, layout, seed=seed, **sizes)
    padded = padded_vocab_size(
        VOCAB_SIZE,
        divisible_by=config.make_vocab_size_divisible_by,
        tensor_parallel_size=students.tensor_parallel_size,
    )
    return TeacherAhead(teacher, layout, students, num_ids=VOCAB_SIZE, padded_num_ids=padded, offload=offload)


def sequences(num_sequences: int = 8, *, seed: int = 3) -> list[dict[str, np.ndarray]]:
    """Ragged sequences with prompt, guidance and on-policy positions; the last two carry no loss at all."""
    generator = np.random.default_rng(seed)
    result = []
    for index in range(num_sequences):
        length = int(generator.integers(6, 16))
        regions = np.zeros(length, dtype=np.int64)
        if index < num_sequences - 2:
            start = int(generator.integers(2, 4))
            regions[start:] = TokenRegion.ON_POLICY
            regions[start : start + int(generator.integers(0, 4))] = TokenRegion.GUIDANCE
        result.append(
            {
                "tokens": generator.integers(2, VOCAB_SIZE, length),
                "labels": generator.integers(2, VOCAB_SIZE, length) * (regions > 0),
                "regions": regions,
                "uniforms": generator.random(length, dtype=np.float32),
            }
        )
    return result


def batch_for_rank(
    layout: Layout, rows: list[dict[str, np.ndarray]], *, num_micro_batches: int, packed: bool = False
) -> Batch:
    """This data-parallel rank's share of ``rows``, cut into micro-batches padded each to its own length, or packed."""
    mine = rows[layout.data_parallel_rank :: layout.data_parallel_size]
    size = len(mine) // num_micro_batches
    groups = [mine[i * size : (i + 1) * size] for i in range(num_micro_batches)]
    multiple = 4 if layout.sequence_parallel else 1  # of every tensor parallel size
    chunks = 1 if layout.context_parallel_size == 1 else 2 * layout.context_parallel_size
    multiple *= chunks
    if packed:
        micro_batches = [_packed(group, multiple, chunks) for group in groups]
    else:
        micro_batches = [_micro_batch(group, multiple) for group in groups]
    return Batch(tuple(micro_batches), step=0)


def _packed(rows: list[dict[str, np.ndarray]], multiple: int, chunks: int) -> MicroBatch:
    nothing = {name: values[:1] * 0 for name, values in rows[0].items()}
    lengths = [len(row["tokens"]) + -len(row["tokens"]) % chunks for row in rows]
    return pack(_micro_batch([*rows, nothing], multiple), [*lengths, -sum(lengths) % multiple], None)


def _micro_batch(rows: list[dict[str, np.ndarray]], multiple: int) -> MicroBatch:
    length = max(len(row["tokens"]) for row in rows)
    length += -length % multiple

    def pad(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.pad(row[name], (0, length - len(row[name]))) for row in rows]))

    regions = pad("regions")
    padding = torch.tensor([[position >= len(row["tokens"]) for position in range(length)] for row in rows])
    return MicroBatch(
        tokens_BS=pad("tokens"),
        labels_BS=pad("labels"),
        regions_BS=regions,
        uniforms_BS=pad("uniforms"),
        rollout_log_probs_BS=torch.zeros(regions.shape),
        advantages_BS=None,
        weights_BS=(regions > 0).float(),
        padding_BS=padding,
        loss_positions_N=regions.flatten().nonzero()[:, 0],
        rows_N=regions.nonzero()[:, 0],
        sample_ids=tuple(range(len(rows))),
        num_tokens=int((~padding).sum()),
        num_loss_terms=int((regions > 0).sum()),
    )


def gather_gradient_shards(learner: Learner) -> None:
    """After a schedule with the distributed optimizer: each rank's reduced shard, the only part that is read of what it
    has, into the buffers of all its data-parallel ranks."""
    for chunk in learner.chunks:
        for group in chunk.bucket_groups:
            replicas, rank = (
                group.intra_distributed_optimizer_instance_group,
                group.intra_distributed_optimizer_instance_rank,
            )
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(replicas.size())[rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=replicas)


def whole_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """This stage's student gradients by global name, gathered over tensor-parallel ranks (padded rows cut off)."""
    layout = learner.layout
    result = {}
    for model, own_name, parameter in ((one, *named) for one in learner.students for named in one.named_parameters()):
        if not parameter.requires_grad:
            continue
        name = global_expert_name(own_name, layout.first_expert(model.config.num_moe_experts))
        gradient = parameter.main_grad.detach().clone()
        group = layout.weight_group(is_expert=is_expert(name))
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            parts = [torch.empty_like(gradient) for _ in range(group.size())]
            dist.all_gather(parts, gradient, group=group)
            glu = name.endswith(("linear_fc1.weight", "linear_fc1.adapter.lora_B"))
            blocks = zip(*(part.chunk(2 if glu else 1, dim=parameter.partition_dim) for part in parts), strict=True)
            gradient = torch.cat([block for group in blocks for block in group], dim=parameter.partition_dim)
        if "embedding" in name or "output_layer" in name:
            assert not gradient[VOCAB_SIZE:].any(), f"{name}: padded rows have a gradient"
            gradient = gradient[:VOCAB_SIZE]
        result[_global_name(model, name)] = gradient
    return result


def _global_name(model: torch.nn.Module, name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return ".".join(parts)
