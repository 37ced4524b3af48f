"""Hugging Face's ``config.json`` to ``ModelConfig`` and back, for the families whose mathematics Megatron shares.

Whatever a family can say that Megatron's layers cannot compute is refused by name: a model that loads computes the same
function. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.config import ModelConfig, architecture

CONFIG = "config.json"
_LLAMA3_SCALING = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What Megatron's Llama-3 RoPE scaling fixes; the factor alone is free."""
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}
"""Keys that change the function, with the values that Megatron's layers compute; absent is as good as None."""


class HuggingFaceError(ValueError):
    """A Hugging Face folder that is damaged, inconsistent, or of a model this package cannot express."""


@dataclass(frozen=True)
class Family:
    """What all models of one ``model_type`` have in common."""

    model_type: str
    architecture: str
    """Name of the class in ``transformers`` whose weights are read."""
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    head_dim: int | None = None
    """Width of a head where config.json does not say; None: hidden_size / num_attention_heads."""
    window_flag: bool | None = None
    """``use_sliding_window`` where config.json does not say; None: the family has no such flag."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, window_flag=False),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=128, window_flag=False),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, experts=True, window_flag=False),
    )
}


def is_huggingface(folder: Path) -> bool:
    """Whether ``folder`` holds a Hugging Face model."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises HuggingFaceError where it is missing or not a JSON object."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HuggingFaceError(
            f"{file} cannot be read ({error}): give a folder with a Hugging Face model (`hf download NAME --local-dir "
            "DIR` fetches one from the hub)"
        ) from error
    if not isinstance(values, dict):
        raise HuggingFaceError(f"{file} is not a JSON object: give a folder with a Hugging Face model")
    return values


def model_config(values: dict[str, Any]) -> ModelConfig:
    """``config.json`` as a ModelConfig with every size given, the vocabulary's too.

    Reads the names of transformers 4 (``rope_theta``, ``rope_scaling``) and of 5 (``rope_parameters``). Raises
    HuggingFaceError for a family or an option that Megatron cannot express.
    """
    family = _family(values)
    for key, allowed in _ONLY_VALUES.items():
        if values.get(key) not in allowed:
            raise HuggingFaceError(f"{CONFIG}: {key} = {values.get(key)!r} is not supported: only {allowed[0]!r} is")
    _refuse_sliding_window(values, family)
    rotary_base, rope_scaling_factor = _rope(values)
    hidden_size, num_heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
    return ModelConfig(
        num_layers=_size(values, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        ffn_hidden_size=_size(values, "intermediate_size"),
        num_query_groups=values.get("num_key_value_heads") or num_heads,
        kv_channels=values.get("head_dim") or family.head_dim or hidden_size // num_heads,
        layernorm_epsilon=_number(values, "rms_norm_eps"),
        qk_layernorm=family.qk_norm,
        add_qkv_bias=family.qkv_bias,
        **(_experts(values) if family.experts else {}),
        rotary_base=rotary_base,
        rope_scaling_factor=rope_scaling_factor,
        untie_embeddings_and_output_weights=not values.get("tie_word_embeddings", False),
        vocab_size=_size(values, "vocab_size"),
    )


def config_values(config: ModelConfig, reference: dict[str, Any], *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """``config.json`` of a model: ``reference`` with the architecture of ``config`` written over it.

    ``reference`` is a config.json of the same family (token ids, longest position and the like are kept from it);
    ``dtype`` is torch's name for the weights' type. Raises HuggingFaceError where the family cannot express ``config``.
    """
    family = _family(reference)
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    values = dict(reference) | {
        "architectures": [family.architecture],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "rms_norm_eps": config.layernorm_epsilon,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "vocab_size": vocab_size,
    }
    if config.num_moe_experts is not None:
        values[_num_experts_key(reference)] = config.num_moe_experts
        values |= {
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "num_experts_per_tok": config.moe_router_topk,
            "norm_topk_prob": not config.moe_router_pre_softmax,
        }
    if "head_dim" in reference or head_dim != (family.head_dim or config.hidden_size // config.num_attention_heads):
        values["head_dim"] = head_dim
    if "layer_types" in reference:
        values["layer_types"] = ["full_attention"] * config.num_layers
    values["torch_dtype" if "torch_dtype" in reference else "dtype"] = dtype
    _write_rope(values, config)
    differences = differing_fields(model_config(values), config, vocab_size=vocab_size)
    if differences:
        raise HuggingFaceError(
            f"a {family.model_type} {CONFIG} cannot express this model: {'; '.join(differences)}; give a reference "
            f"folder of another family ({', '.join(FAMILIES)})"
        )
    return values


def differing_fields(found: ModelConfig, given: ModelConfig, *, vocab_size: int) -> list[str]:
    """One line for each architecture field in which two models differ; ``vocab_size`` is the true size of ``given``."""
    ours = architecture(given)
    differences = [
        f"{name}: the folder has {value!r}, this run {ours[name]!r}"
        for name, value in architecture(found).items()
        if value != ours[name]
    ]
    if found.vocab_size != vocab_size:
        differences.append(f"vocab_size: the folder has {found.vocab_size}, this run {vocab_size}")
    return differences


def _family(values: dict[str, Any]) -> Family:
    model_type, classes = values.get("model_type"), values.get("architectures")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (classes and family.architecture not in classes):
        known = ", ".join(f"{each.model_type} ({each.architecture})" for each in FAMILIES.values())
        raise HuggingFaceError(
            f"{CONFIG}: model_type {model_type!r} with architectures {classes!r} is not supported; supported: {known}"
        )
    return family


def _experts(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_moe_experts": _size(values, _num_experts_key(values)),
        "moe_ffn_hidden_size": _size(values, "moe_intermediate_size"),
        "moe_router_topk": _size(values, "num_experts_per_tok"),
        "moe_router_pre_softmax": not values.get("norm_topk_prob", False),
    }


def _num_experts_key(values: dict[str, Any]) -> str:
    """transformers 5 writes ``num_local_experts``, 4 wrote ``num_experts``."""
    return "num_local_experts" if "num_local_experts" in values else "num_experts"


def _refuse_sliding_window(values: dict[str, Any], family: Family) -> None:
    window = values.get("sliding_window")
    if window is None or (family.window_flag is not None and not values.get("use_sliding_window", family.window_flag)):
        return
    if window >= _size(values, "max_position_embeddings"):
        return
    if family.window_flag is not None and values.get("max_window_layers", 0) >= _size(values, "num_hidden_layers"):
        return
    raise HuggingFaceError(
        f"{CONFIG}: sliding_window = {window} is shorter than max_position_embeddings, and this package computes full "
        "attention only: use a model whose sliding_window is null"
    )


def _rope(values: dict[str, Any]) -> tuple[int, float | None]:
    """Base period and Llama-3 scaling factor (None: no scaling)."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    base = rope.get("rope_theta", values.get("rope_theta", 10000))
    if not isinstance(base, int | float) or base != int(base):
        raise HuggingFaceError(f"{CONFIG}: rope_theta = {base!r} is not a whole number, which Megatron needs")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()) or kind not in ("default", "llama3"):
        raise HuggingFaceError(
            f"{CONFIG}: RoPE scaling {rope!r} is not supported: only none (default) and llama3 are; Megatron's GPT "
            "model computes no other"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise HuggingFaceError(f"{CONFIG}: RoPE on a part of each head ({rope!r}) is not supported")
    if kind == "default":
        return int(base), None
    wrong = {key: rope.get(key) for key, value in _LLAMA3_SCALING.items() if rope.get(key) != value}
    if wrong:
        raise HuggingFaceError(
            f"{CONFIG}: llama3 RoPE scaling with {wrong} is not supported: Megatron fixes {_LLAMA3_SCALING}"
        )
    return int(base), _number(rope, "factor")


def _write_rope(values: dict[str, Any], config: ModelConfig) -> None:
    scaling: dict[str, Any] | None = None
    if config.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": config.rope_scaling_factor, **_LLAMA3_SCALING}
    theta = float(config.rotary_base)
    if "rope_parameters" in values:
        values["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        for stale in ("rope_theta", "rope_scaling"):
            values.pop(stale, None)
    else:
        values |= {"rope_theta": theta, "rope_scaling": scaling}


def _size(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise HuggingFaceError(f"{CONFIG}: {key} must be a whole number of at least 1, found {value!r}")
    return value


def _number(values: dict[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise HuggingFaceError(f"{CONFIG}: {key} must be a number above 0, found {value!r}")
    return float(value)
