"""LoRA adapters as a folder that PEFT loads beside the base model: adapter_config.json, adapter_model.safetensors.

Megatron has queries, keys and values in one layer, gate and up in another: theirs share A, and B is cut.

Letters of a shape: ``R`` rank, ``I`` input and ``O`` output features of a whole layer.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.hf_config import HuggingFaceError
from megatron_tropd.hf_files import listed, write_shard
from megatron_tropd.hf_mapping import Mapping, mappings, unpack
from megatron_tropd.huggingface import Transfer, refused_together
from megatron_tropd.lora import Adapter, adapted_layers
from megatron_tropd.models import chunks_of, partition_dim


def export_peft(
    model: torch.nn.Module, layout: Layout, config: ModelConfig, lora: LoraConfig, out: Path, *, base: str | None
) -> Transfer:
    """Write the adapters of ``model`` (all ranks call this); ``out`` appears when it is complete.

    ``base`` is what PEFT is told to load the base model from. Raises HuggingFaceError on every rank.
    """
    temporary = out.with_name(out.name + ".incomplete")
    tensors = _gather(model, layout, config)
    with refused_together(f"{temporary} could not be written"):
        if layout.is_main:
            not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            if not_finite:
                raise HuggingFaceError(f"the adapters have NaN or infinite weights: {listed(not_finite)}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_shard(temporary / "adapter_model.safetensors", tensors)
            values = _adapter_config(config, lora, base)
            (temporary / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            os.rename(temporary, out)
    return Transfer(len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _adapter_config(config: ModelConfig, lora: LoraConfig, base: str | None) -> dict[str, Any]:
    targets = {
        source.split(".")[-2]
        for mapping in mappings(config)
        if mapping.megatron.endswith(tuple(f"{target}.weight" for target in lora.target_modules))
        for source in mapping.sources
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _gather(model: torch.nn.Module, layout: Layout, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor by PEFT's name, on rank 0; adapters are small, so each stage sends its own at once."""
    by_name = {mapping.megatron: mapping for mapping in mappings(config)}
    mine: dict[str, torch.Tensor] = {}
    for name, linear in (layer for chunk in chunks_of(model) for layer in adapted_layers(chunk)):
        mine |= _layer_tensors(by_name[f"{name}.weight"], linear.adapter, layout, config)
    if layout.data_parallel_rank:
        mine = {}
    stages: list[dict[str, torch.Tensor]] | None = [{}] * layout.world_size if layout.is_main else None
    dist.gather_object(mine, stages)
    return {name: tensor for stage in stages or () for name, tensor in stage.items()}


def _layer_tensors(mapping: Mapping, adapter: Adapter, layout: Layout, config: ModelConfig) -> dict[str, torch.Tensor]:
    """A and B of each projection that Megatron has in one layer; nothing but on the first tensor-parallel rank."""
    parts_RI, parts_OR = _shards(adapter.lora_A, layout), _shards(adapter.lora_B, layout)
    if layout.tensor_parallel_rank:
        return {}
    whole_RI = torch.cat(parts_RI, dim=1)
    found = {}
    cuts = zip(*(unpack(mapping, part_OR, config) for part_OR in parts_OR), strict=True)
    for source, parts in zip(mapping.sources, cuts, strict=True):
        name = f"base_model.model.{source.removesuffix('.weight')}"
        found[f"{name}.lora_A.weight"] = whole_RI.clone()  # safetensors refuses tensors that share memory
        found[f"{name}.lora_B.weight"] = torch.cat(parts).contiguous()
    return found


def _shards(part: torch.nn.Parameter, layout: Layout) -> list[torch.Tensor]:
    """The parts of all tensor-parallel ranks, on the host of the first; of what is whole, that."""
    shard = part.data.contiguous()
    if partition_dim(part) is None or layout.tensor_parallel_size == 1:
        return [shard.cpu()]
    is_first = layout.tensor_parallel_rank == 0
    received = [torch.empty_like(shard) for _ in range(layout.tensor_parallel_size)] if is_first else None
    dist.gather(shard, received, group=layout.groups.tp, group_dst=0)
    return [each.cpu() for each in received or ()]
