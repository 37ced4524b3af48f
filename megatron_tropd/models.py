"""Student and teacher as Megatron models: architecture from the config, weights independent of the layout."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_tropd.config import ModelConfig
from megatron_tropd.determinism import is_deterministic
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.hf_mapping import expert_name, global_expert_name, is_expert
from megatron_tropd.layer_spec import choose_layer_spec, use_transformer_engine

# isort: split
from megatron.core.fp8_utils import prepare_model_for_fp8_inference
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.transformer import TransformerConfig


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel_size: int) -> int:
    """The embedding's row count: ``vocab_size`` rounded up to a multiple of ``divisible_by * tensor_parallel_size``."""
    multiple = divisible_by * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def build_model(
    config: ModelConfig,
    layout: Layout,
    *,
    vocab_size: int,
    max_sequence_length: int,
    dtype: torch.dtype,
    seed: int | None,
    recompute: bool = False,
    chunk: int = 0,
    megatron_linears: bool = False,
) -> GPTModel:
    """This rank's slice of a model with freshly initialised weights; of several chunks, the one of that number.

    ``vocab_size`` is the true size, before padding; ``max_sequence_length`` in tokens; ``recompute`` trades the memory
    of activations for a second forward; ``megatron_linears``: Megatron's own linear layers and a norm before them, also
    where TransformerEngine has the two in one. The weights are a function of ``seed`` and the parameter's name alone,
    so every parallel layout starts from the same model; with None they are left for a checkpoint to fill.
    """
    transformer_config = build_transformer_config(config, layout, dtype=dtype, recompute=recompute)
    vp_stage = chunk if layout.virtual_pipeline_size > 1 else None
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=choose_layer_spec(
            config, transformer_config, layout.pipeline_rank, vp_stage, megatron_linears=megatron_linears
        ),
        vocab_size=padded_vocab_size(
            vocab_size,
            divisible_by=config.make_vocab_size_divisible_by,
            tensor_parallel_size=layout.tensor_parallel_size,
        ),
        max_sequence_length=max_sequence_length,
        pre_process=layout.has_embedding(chunk),
        post_process=layout.has_output(chunk),
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        rope_scaling=config.rope_scaling_factor is not None,
        rope_scaling_factor=config.rope_scaling_factor or 1.0,
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )
    model.to(device=layout.device, dtype=dtype)
    if config.fp8 is not None:
        # Products in 8 bits want 16 rows at a time: every linear layer pads its input and cuts its output.
        prepare_model_for_fp8_inference(model)
    if seed is not None:
        initialize_weights(model, layout, vocab_size=vocab_size, std=config.init_method_std, seed=seed)
    return model


def build_without_weights(config: ModelConfig, layout: Layout, *, vocab_size: int, dtype: torch.dtype) -> GPTModel:
    """This rank's slice of a model on the meta device: names, shapes and places in a checkpoint, and no memory."""
    meta = torch.device("meta")
    on_meta = replace(layout, device=meta)
    with meta:
        return build_model(config, on_meta, vocab_size=vocab_size, max_sequence_length=1, dtype=dtype, seed=None)


def build_teacher(
    config: ModelConfig,
    layout: Layout,
    *,
    vocab_size: int,
    max_sequence_length: int,
    dtype: torch.dtype,
    seed: int | None,
    chunk: int = 0,
) -> GPTModel:
    """``build_model`` for the frozen judge: no gradients, evaluation mode."""
    teacher = build_model(
        config,
        layout,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        dtype=dtype,
        seed=seed,
        chunk=chunk,
    )
    return teacher.requires_grad_(False).eval()


def chunks_of(model: torch.nn.Module) -> list[GPTModel]:
    """The chunks in a ``ModuleList`` of them, in their order; of a single model, itself."""
    return [module for module in model.modules() if isinstance(module, GPTModel)]


def build_transformer_config(
    config: ModelConfig, layout: Layout, *, dtype: torch.dtype, recompute: bool = False
) -> TransformerConfig:
    """Megatron's configuration of one model in this layout.

    ``calculate_per_token_loss`` makes Megatron sum gradients over micro-batches and data-parallel ranks and divide
    once by the global number of loss terms. Sequence lengths may differ between micro-batches.
    """
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        kv_channels=config.kv_channels or config.hidden_size // config.num_attention_heads,
        normalization=config.normalization,
        layernorm_epsilon=config.layernorm_epsilon,
        gated_linear_unit=config.swiglu,
        activation_func=F.silu if config.swiglu else F.gelu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        num_moe_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_load_balancing_type="aux_loss" if config.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=config.moe_aux_loss_coeff,
        moe_grouped_gemm=config.num_moe_experts is not None and use_transformer_engine(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_size if layout.virtual_pipeline_size > 1 else None,
        expert_model_parallel_size=1 if config.num_moe_experts is None else layout.expert_parallel_size,
        expert_tensor_parallel_size=layout.groups.expt_tp.size(),
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=config.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=config.num_layers_in_last_pipeline_stage,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8=config.fp8,
        fp8_recipe=config.fp8_recipe if config.fp8 else "delayed",
        perform_initialization=False,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron checks it against variable_seq_lengths, experts or not
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        deterministic_mode=is_deterministic(),
        batch_p2p_comm=not ON_CPU,
    )


# ----------------------------------------------------------------------------------------------- initial weights


def initialize_weights(model: GPTModel, layout: Layout, *, vocab_size: int, std: float, seed: int) -> None:
    """Fill every matrix with N(0, std), norms with 1 and biases with 0; the same model for every layout.

    Each whole parameter is drawn from a generator keyed on (seed, global parameter name), then cut to this rank's
    shard. Output projections are scaled by 1/sqrt(2 layers), Megatron's default. Padded vocabulary rows are 0.
    """
    config = model.config
    for own_name, parameter in model.named_parameters():
        name = global_name(model, layout, own_name)
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            scale = std / math.sqrt(2.0 * config.num_layers)
        group = layout.weight_group(is_expert=is_expert(name))
        whole = _draw_whole(name, parameter, group, vocab_size=vocab_size, seed=seed)
        parameter.data.copy_(_shard(whole * scale, group, *tensor_cut(model, name, parameter)))


def global_name(model: GPTModel, layout: Layout, own_name: str) -> str:
    """A parameter's name in the whole model, the same in every layout.

    Layers are counted over pipeline stages, experts over ranks; tied output weights share the embedding's name.
    """
    name = global_expert_name(expert_name(own_name), layout.first_expert(model.config.num_moe_experts))
    if match := re.search(r"decoder\.layers\.(\d+)\.", name):
        layer = model.decoder.layers[int(match.group(1))].layer_number - 1
        return name.replace(match.group(0), f"decoder.layers.{layer}.")
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def tensor_cut(model: GPTModel, name: str, parameter: torch.Tensor) -> tuple[int | None, int]:
    """How tensor-parallel ranks share a parameter of this ``global_name``: (dimension, blocks).

    None: every rank has the whole. A gated projection is two blocks (gate, up), each cut on its own.
    """
    glu = model.config.gated_linear_unit and name.endswith(("linear_fc1.weight", "linear_fc1.adapter.lora_B"))
    return partition_dim(parameter), 2 if glu else 1


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter's initial values, by its name over the whole model."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw_whole(
    name: str, parameter: torch.nn.Parameter, group: dist.ProcessGroup, *, vocab_size: int, seed: int
) -> torch.Tensor:
    generator = keyed_generator(seed, name)
    shape = list(parameter.shape)
    if (dim := partition_dim(parameter)) is not None:
        shape[dim] *= group.size()
    if "embedding" not in name and "output_layer" not in name:
        return torch.randn(shape, generator=generator)
    rows = torch.randn([vocab_size, *shape[1:]], generator=generator)
    return torch.cat([rows, rows.new_zeros(shape[0] - vocab_size, *shape[1:])])


def _shard(whole: torch.Tensor, group: dist.ProcessGroup, dim: int | None, num_blocks: int) -> torch.Tensor:
    """This rank's part of a parameter with that ``tensor_cut``."""
    if dim is None:
        return whole
    size, rank = group.size(), group.rank()
    return torch.cat([block.chunk(size, dim=dim)[rank] for block in whole.chunk(num_blocks, dim=dim)], dim=dim)


def partition_dim(parameter: torch.Tensor) -> int | None:
    """The dimension that Megatron cuts over tensor-parallel ranks; None for a replicated parameter."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


# ------------------------------------------------------------------------------------------------- inference traces

_CUT_SEQUENCES: dict[str, Any] = {
    "sequence_parallel": False,
    "scatter_to_sequence_parallel": False,
    "reduce_scatter_embeddings": False,
    "context_parallel_size": 1,
    "cp_group": None,
}
"""Attributes of Megatron's config and modules by which sequences are cut over tensor- or context-parallel ranks, and
their values where they are not."""


@contextmanager
def whole_sequences(model: GPTModel) -> Iterator[None]:
    """Switch sequence and context parallelism off for the time of generation: single positions do not divide over
    ranks, and context-parallel ranks each generate for themselves."""
    switched = [
        (module, name, vars(module)[name])
        for module in (model.config, *model.modules())
        for name in _CUT_SEQUENCES
        if vars(module).get(name)
    ]
    model.rotary_pos_emb.forward.cache_clear()  # tables of this rank's positions
    try:
        for module, name, _ in switched:
            setattr(module, name, _CUT_SEQUENCES[name])
        yield
    finally:
        for module, name, value in switched:
            setattr(module, name, value)


def release_inference_state(model: GPTModel) -> None:
    """Undo what generation leaves behind, so that the model can train again (the one place that does).

    Tensors made in inference mode cannot take part in autograd, so the caches that keep them are emptied: RoPE tables,
    and Megatron's global scratch buffer. A stage's received hidden state is dropped; training mode is restored where
    the model trains.
    """
    get_global_memory_buffer().buffer.clear()
    model.rotary_pos_emb.forward.cache_clear()
    model.rotary_pos_emb_cache.clear()
    model.decoder.input_tensor = None
    model.train(any(parameter.requires_grad for parameter in model.parameters()))
