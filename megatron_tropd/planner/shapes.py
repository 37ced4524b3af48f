"""Models by name, with the values of their published config.json (the Hugging Face repository beside each)."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.config import ConfigError, ModelConfig
from megatron_tropd.hf_config import is_huggingface, model_config, read_config

_QWEN3: dict[str, Any] = {
    "kv_channels": 128, "num_query_groups": 8, "qk_layernorm": True, "rotary_base": 1000000,
    "layernorm_epsilon": 1e-6, "vocab_size": 151936,
}  # fmt: skip
_LLAMA3: dict[str, Any] = {
    "num_query_groups": 8, "rotary_base": 500000, "vocab_size": 128256, "untie_embeddings_and_output_weights": True,
}  # fmt: skip


def _dense(layers: int, hidden: int, heads: int, feed_forward: int, **others: Any) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_hidden_size=feed_forward, **others
    )


SHAPES = {
    "qwen3-0.6b": _dense(28, 1024, 16, 3072, **_QWEN3),  # Qwen/Qwen3-0.6B
    "qwen3-1.7b": _dense(28, 2048, 16, 6144, **_QWEN3),  # Qwen/Qwen3-1.7B
    "qwen3-4b": _dense(36, 2560, 32, 9728, **_QWEN3),  # Qwen/Qwen3-4B
    "qwen3-8b": _dense(36, 4096, 32, 12288, untie_embeddings_and_output_weights=True, **_QWEN3),  # Qwen/Qwen3-8B
    "qwen3-32b": _dense(64, 5120, 64, 25600, untie_embeddings_and_output_weights=True, **_QWEN3),  # Qwen/Qwen3-32B
    "llama3-8b": _dense(32, 4096, 32, 14336, **_LLAMA3),  # meta-llama/Meta-Llama-3-8B
    "llama3-70b": _dense(80, 8192, 64, 28672, **_LLAMA3),  # meta-llama/Meta-Llama-3-70B
    "llama3-405b": _dense(
        126, 16384, 128, 53248, **_LLAMA3 | {"rope_scaling_factor": 8.0}
    ),  # meta-llama/Llama-3.1-405B
}


def find_model(name: str) -> ModelConfig:
    """A built-in shape by name, a Hugging Face folder, or a YAML file with the fields of ``ModelConfig``.

    A folder is also where the weights come from (``load``). Raises ConfigError for anything else, and for a model
    without a vocabulary size.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if is_huggingface(path):
        return replace(model_config(read_config(path)), load=name)
    if not path.is_file():
        raise ConfigError(f"{name!r} is no built-in shape ({', '.join(SHAPES)}), Hugging Face folder or YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = ModelConfig(**values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{name} is not a YAML file with the fields of a model: {error}") from error
    if model.vocab_size is None:
        raise ConfigError(f"{name} has no vocab_size: add it, memory depends on it")
    for field in fields(model):
        value = getattr(model, field.name)
        if "int" in str(field.type).split(" | ") and value is not None and type(value) is not int:
            raise ConfigError(f"{name}: {field.name} is a number, found {value!r}")
    return model
