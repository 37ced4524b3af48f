"""Which tensors of a Hugging Face checkpoint make up which Megatron parameter, and how they are packed.

Letters of a shape: ``V`` vocabulary, ``H`` hidden, ``Q`` all query heads, ``K`` all key (or value) heads, ``D`` one
head, ``F`` feed-forward, ``E`` experts, ``W`` feed-forward of one expert. Megatron names are those of its
TransformerEngine layers, with the experts one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_tropd.config import ModelConfig


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter and the Hugging Face tensors it is packed from."""

    megatron: str
    sources: dict[str, str]
    """Name to shape, in letters."""
    cut: int | None = None
    """Dimension that tensor-parallel ranks share, of every source; None: each rank has the whole."""
    packing: Literal["one", "qkv", "gate-up"] = "one"
    """qkv: for each key/value head its query heads, then the key, then the value; gate-up: one above the other."""


EMBEDDING = Mapping("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "VH"}, cut=0)
FINAL_NORM = Mapping("decoder.final_layernorm.weight", {"model.norm.weight": "H"})
OUTPUT = Mapping("output_layer.weight", {"lm_head.weight": "VH"}, cut=0)
TIED_OUTPUT = replace(OUTPUT, sources=EMBEDDING.sources)

ATTENTION = (
    Mapping("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "H"}),
    Mapping(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "QH", "self_attn.k_proj.weight": "KH", "self_attn.v_proj.weight": "KH"},
        cut=0,
        packing="qkv",
    ),
    Mapping("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "HQ"}, cut=1),
)
DENSE = (
    Mapping("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "H"}),
    Mapping(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "FH", "mlp.up_proj.weight": "FH"},
        cut=0,
        packing="gate-up",
    ),
    Mapping("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "HF"}, cut=1),
)
"""With the attention a layer of Llama and Mistral."""
ROUTER = (
    Mapping("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "H"}),
    Mapping("mlp.router.weight", {"mlp.gate.weight": "EH"}),
)
EXPERT = (
    Mapping(
        "mlp.experts.local_experts.{}.linear_fc1.weight",
        {"mlp.experts.{}.gate_proj.weight": "WH", "mlp.experts.{}.up_proj.weight": "WH"},
        cut=0,
        packing="gate-up",
    ),
    Mapping("mlp.experts.local_experts.{}.linear_fc2.weight", {"mlp.experts.{}.down_proj.weight": "HW"}, cut=1),
)
"""One of them; a Qwen3-MoE layer has these instead of the dense feed-forward."""
QKV_BIAS = (
    Mapping(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        cut=0,
        packing="qkv",
    ),
)
"""What Qwen2 adds."""
QK_NORM = (
    Mapping("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "D"}),
    Mapping("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "D"}),
)
"""What Qwen3 adds."""
LOCAL_NAMES = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
DENSE_LOCAL_NAMES = LOCAL_NAMES | {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
"""Parameters that Megatron's local layers call otherwise; before experts the norm is a layer of its own everywhere."""
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)")
_LOCAL_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")


def mappings(config: ModelConfig) -> Iterator[Mapping]:
    """Every parameter of a model, layers counted over all pipeline stages, in the order of a Hugging Face checkpoint.

    With tied weights the output layer of the last pipeline stage is a second reader of the embedding.
    """
    yield EMBEDDING
    layer = (*ATTENTION, *QKV_BIAS * config.add_qkv_bias, *QK_NORM * config.qk_layernorm, *_feed_forward(config))
    for index in range(config.num_layers):
        for mapping in layer:
            yield replace(
                mapping,
                megatron=f"decoder.layers.{index}.{mapping.megatron}",
                sources={f"model.layers.{index}.{name}": shape for name, shape in mapping.sources.items()},
            )
    yield FINAL_NORM
    yield OUTPUT if config.untie_embeddings_and_output_weights else TIED_OUTPUT


def _feed_forward(config: ModelConfig) -> Iterator[Mapping]:
    if config.num_moe_experts is None:
        yield from DENSE
        return
    yield from ROUTER
    for expert in range(config.num_moe_experts):
        for mapping in EXPERT:
            yield replace(
                mapping,
                megatron=mapping.megatron.format(expert),
                sources={name.format(expert): shape for name, shape in mapping.sources.items()},
            )


def table_name(name: str, config: ModelConfig) -> str:
    """A parameter's name within its layer, as Megatron's local or TransformerEngine layers have it, in the table's."""
    local = LOCAL_NAMES if config.num_moe_experts is not None else DENSE_LOCAL_NAMES
    return expert_name(local.get(name, name))


def expert_name(name: str) -> str:
    """A parameter of TransformerEngine's grouped experts as that of a single one; other names as they are."""
    return _GROUPED_EXPERT.sub(r"experts.local_experts.\2.\1.weight", name)


def global_expert_name(name: str, first_expert: int) -> str:
    """A parameter of a rank's own expert, counted over the whole model: the rank holds those from ``first_expert``."""
    return _LOCAL_EXPERT.sub(lambda found: f"experts.local_experts.{first_expert + int(found[1])}.", name)


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is one expert's alone."""
    return _LOCAL_EXPERT.search(name) is not None


def source_shapes(mapping: Mapping, config: ModelConfig, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The sizes of each source of a mapping."""
    head = head_width(config)
    sizes = {
        "V": vocab_size,
        "H": config.hidden_size,
        "Q": config.num_attention_heads * head,
        "K": (config.num_query_groups or config.num_attention_heads) * head,
        "D": head,
        "F": config.ffn_hidden_size,
        "E": config.num_moe_experts or 0,
        "W": config.moe_ffn_hidden_size or 0,
    }
    return {name: tuple(sizes[letter] for letter in shape) for name, shape in mapping.sources.items()}


def head_width(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.kv_channels or config.hidden_size // config.num_attention_heads


def pack(mapping: Mapping, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    """One rank's parameter from its cuts of the sources, in their order."""
    if mapping.packing != "qkv":
        return torch.cat(list(parts))
    head = head_width(config)
    num_groups = parts[1].shape[0] // head
    groups = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def unpack(mapping: Mapping, parameter: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, ...]:
    """The inverse of ``pack``: one rank's cuts of the sources from its parameter."""
    if mapping.packing == "one":
        return (parameter,)
    if mapping.packing == "gate-up":
        return parameter.chunk(2)
    head = head_width(config)
    queries = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads) * head
    groups = parameter.unflatten(0, (-1, queries + 2 * head))
    return tuple(part.flatten(0, 1) for part in groups.split([queries, head, head], dim=1))
