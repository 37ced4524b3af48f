"""A model's weights from wherever they lie: a Hugging Face folder, a checkpoint of this package or of Megatron-LM, or
LoRA adapters and their base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.checkpoint import Description, check_same, load_weights, read_description, resolve
from megatron_tropd.config import Config, ModelConfig, architecture
from megatron_tropd.distributed import Layout
from megatron_tropd.hf_config import is_huggingface
from megatron_tropd.hf_mapping import table_name
from megatron_tropd.huggingface import load_huggingface
from megatron_tropd.integrity import CheckpointError, digest, verify
from megatron_tropd.lora import add_adapters, attach, is_adapter, load_trained_state, merge_adapters, trained_state
from megatron_tropd.megatron_lm import find_iteration, load_megatron_lm
from megatron_tropd.models import chunks_of, global_name, initialize_weights, tensor_cut
from megatron_tropd.replicas import HASH_CHUNK, hash_elements
from megatron_tropd.writing import on_main

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel


def load_weights_of(
    folder: Path,
    model: torch.nn.Module,
    layout: Layout,
    config: ModelConfig,
    *,
    vocab_size: int,
    tokenizer: str,
    allow_legacy: bool = False,
) -> None:
    """Fill ``model``, or the chunks of a rank in a ``ModuleList``, from ``folder`` (all ranks call this).

    ``vocab_size`` is the true size, ``tokenizer`` a fingerprint; ``allow_legacy`` as in `load_megatron_lm`.

    Adapters are added to the weights of their base, which is looked for where it was. Raises CheckpointError or
    HuggingFaceError on every rank.
    """
    if is_huggingface(folder):
        for chunk in chunks_of(model):
            load_huggingface(folder, chunk, layout, config, vocab_size=vocab_size)
        return
    if (iteration := find_iteration(folder)) is not None:
        for chunk in chunks_of(model):
            load_megatron_lm(iteration, chunk, config, vocab_size=vocab_size, allow_legacy=allow_legacy)
        return
    path = resolve(folder)
    found = read_description(path)
    if not found.adapter:
        load_weights(path, model, config, vocab_size=vocab_size, tokenizer=tokenizer)
        return
    on_main(lambda: verify(path), layout.is_main)
    expected = Description(found.step, found.seed, vocab_size, tokenizer, architecture(config))
    check_same(path, replace(found, adapter={}), expected)
    base = found.adapter["base"]
    if base is None:
        for chunk in chunks_of(model):
            initialize_weights(chunk, layout, vocab_size=vocab_size, std=config.init_method_std, seed=found.seed)
    elif Path(base).exists():
        load_weights_of(
            Path(base), model, layout, config, vocab_size=vocab_size, tokenizer=tokenizer, allow_legacy=allow_legacy
        )
    else:
        raise CheckpointError(
            f"{path} holds LoRA adapters of the weights in {base}, which are not there: put them back"
        )
    now = describe_base(base, model, layout, config, vocab_size=vocab_size)
    check_same(path, found, replace(expected, adapter=found.adapter | now))
    for chunk in chunks_of(model):
        attach(chunk, found.adapter)
        state = dist_checkpointing.load({"model": trained_state(chunk)}, str(path))
        load_trained_state(chunk, state["model"])
        merge_adapters(chunk)


def adapt(students: Sequence[GPTModel], config: Config, layout: Layout, *, vocab_size: int) -> dict[str, Any]:
    """With ``lora.rank``: freeze the student's chunks, give them fresh adapters, and return `describe_base`."""
    if not config.lora.rank:
        return {}
    student, models = config.student, torch.nn.ModuleList(students)
    base = describe_base(student.load, models, layout, student, vocab_size=vocab_size)
    for model in students:
        add_adapters(model, config.lora, layout, seed=config.training.seed)
    return base


def describe_base(
    load: str | None, model: torch.nn.Module, layout: Layout, config: ModelConfig, *, vocab_size: int
) -> dict[str, Any]:
    """What a checkpoint of adapters keeps of their base: the folder ``load`` that filled ``model``, and a fingerprint.

    The fingerprint is that of the weights, or where they are themselves merged from adapters, that of the adapters'
    checkpoint: sums of products depend on the layout in their last bits. Every rank calls this.
    """
    base = None if load is None else str(Path(load).absolute())
    if base is not None and not is_huggingface(Path(base)) and find_iteration(Path(base)) is None:
        path = resolve(Path(base))
        if read_description(path).adapter:
            return {"base": str(path), "base_fingerprint": digest(path)}
    return {"base": base, "base_fingerprint": weights_fingerprint(model, layout, config, vocab_size=vocab_size)}


def weights_fingerprint(model: torch.nn.Module, layout: Layout, config: ModelConfig, *, vocab_size: int) -> str:
    """A hash of every weight's name, place and value that is the same in every layout; padding and adapters aside."""
    total = torch.zeros((), dtype=torch.int64, device=layout.device)
    for chunk, own_name, parameter in ((one, *named) for one in chunks_of(model) for named in one.named_parameters()):
        is_copy = own_name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
        name = global_name(chunk, layout, own_name)
        dim, num_blocks = tensor_cut(chunk, name, parameter)
        if is_copy or is_adapter(own_name) or (dim is None and layout.tensor_parallel_rank):
            continue
        if name.startswith("decoder.layers."):
            *layer, within = name.split(".", 3)
            name = ".".join([*layer, table_name(within, config)])  # the same with TransformerEngine's layers
        rows = torch.arange(parameter.shape[0], device=parameter.device)
        if dim == 0:
            rows = _global_rows(rows, num_blocks, layout)
        if "word_embeddings" in name or "output_layer" in name:
            rows = rows[rows < vocab_size]
        columns = parameter[0].numel()
        size, rank = (layout.tensor_parallel_size, layout.tensor_parallel_rank) if dim == 1 else (1, 0)
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        place = torch.arange(columns, device=parameter.device) + rank * columns + key
        step = max(1, HASH_CHUNK // columns)
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            values = parameter.detach()[start : start + len(chosen)].float().reshape(len(chosen), columns)
            total += hash_elements(values, chosen[:, None] * (columns * size) + place)
    dist.all_reduce(total, group=layout.groups.mp)
    return f"{int(total) % 2**64:016x}"


def _global_rows(own: torch.Tensor, num_blocks: int, layout: Layout) -> torch.Tensor:
    """Where this rank's rows are in the whole parameter, of which it has a part of each block."""
    length = len(own) // num_blocks
    size, rank = layout.tensor_parallel_size, layout.tensor_parallel_rank
    return own // length * length * size + rank * length + own % length
