"""Hugging Face folders into this rank's slice of a model and back out, tensor by tensor.

Reading: each rank opens the safetensors files and takes only the rows or columns it holds, so the host never has more
than one tensor. Writing: a tensor is gathered over tensor-parallel ranks, and each pipeline stage writes the shards of
its own layers. Every function here is called by all ranks, and what one refuses all refuse.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import ModelConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.hf_config import (
    CONFIG,
    HuggingFaceError,
    config_values,
    differing_fields,
    model_config,
    read_config,
)
from megatron_tropd.hf_files import CARRIED_FILES, TensorFiles, listed, plan_shards, write_index, write_shard
from megatron_tropd.hf_mapping import EMBEDDING, OUTPUT, Mapping, mappings, pack, source_shapes, table_name, unpack

# isort: split
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Transfer:
    """What was moved, over all ranks."""

    num_tensors: int
    """Tensors of the Hugging Face checkpoint."""
    num_bytes: int
    """Their size there."""


# -------------------------------------------------------------------------------------------------------- reading


def load_huggingface(
    folder: Path, model: GPTModel, layout: Layout, config: ModelConfig, *, vocab_size: int, progress: bool = False
) -> Transfer:
    """Fill ``model`` from the Hugging Face folder, in the model's dtype; padded vocabulary rows become 0.

    ``vocab_size`` is the true size. Raises HuggingFaceError on every rank where config.json and ``config`` differ,
    where files are missing or damaged, where tensors are missing, unknown or of another shape, or not finite.
    """
    with _refused_together():
        check_architecture(folder, config, vocab_size=vocab_size)
        files, shapes = open_weights(folder, config, vocab_size=vocab_size)
        by_name = {mapping.megatron: mapping for mapping in mappings(config)}
        not_finite: list[str] = []
        parameters = list(model.named_parameters())
        for name, parameter in tqdm(
            parameters, desc="reading", unit="tensor", disable=not (progress and layout.is_main)
        ):
            mapping = _mapping_of(_global_name(model, name, config), by_name)
            parts = _read_parts(files, mapping, parameter, layout, config, vocab_size=vocab_size)
            not_finite.extend(source for source, part in parts.items() if not part.isfinite().all())
            shard = pack(mapping, list(parts.values()), config)
            # Only the vocabulary is padded.
            parameter.data[: shard.shape[0]].copy_(shard)
            parameter.data[shard.shape[0] :].zero_()
        if not_finite:
            raise HuggingFaceError(f"{folder} has NaN or infinite weights: {listed(sorted(not_finite))}")
    return Transfer(len(shapes), sum(files.num_bytes(name) for name in shapes))


def check_architecture(folder: Path, config: ModelConfig, *, vocab_size: int) -> None:
    """Raise HuggingFaceError unless the folder's config.json is of the model that ``config`` describes."""
    differences = differing_fields(model_config(read_config(folder)), config, vocab_size=vocab_size)
    if differences:
        raise HuggingFaceError(f"{folder} is of another model than the config says: {'; '.join(differences)}")


def open_weights(
    folder: Path, config: ModelConfig, *, vocab_size: int
) -> tuple[TensorFiles, dict[str, tuple[int, ...]]]:
    """The folder's tensors and the shapes they must have, checked: only the headers of the files are read."""
    files, shapes = TensorFiles(folder), _all_shapes(config, vocab_size)
    files.check(shapes, tied=None if config.untie_embeddings_and_output_weights else next(iter(EMBEDDING.sources)))
    return files, shapes


def _read_parts(
    files: TensorFiles,
    mapping: Mapping,
    parameter: torch.Tensor,
    layout: Layout,
    config: ModelConfig,
    *,
    vocab_size: int,
) -> dict[str, torch.Tensor]:
    """This rank's cut of each source of one parameter, on the host."""
    parts = {}
    for name, shape in source_shapes(mapping, config, vocab_size=vocab_size).items():
        if mapping.cut is None:
            parts[name] = files.read(name)
            continue
        size = shape[mapping.cut] // layout.tensor_parallel_size
        if "V" in mapping.sources[name]:
            size = parameter.shape[0]
        start = layout.tensor_parallel_rank * size
        parts[name] = files.read(name, mapping.cut, start, min(start + size, shape[mapping.cut]))
    return parts


# -------------------------------------------------------------------------------------------------------- writing


def export_huggingface(
    model: GPTModel,
    layout: Layout,
    config: ModelConfig,
    out: Path,
    reference_folder: Path,
    *,
    vocab_size: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> Transfer:
    """Write ``model`` as a Hugging Face folder in the model's dtype: safetensors shards, index, config, tokenizer.

    ``reference_folder`` is of the same family: what config.json says beyond the architecture, the generation config and
    the tokenizer come from there. Padded vocabulary rows are cut off. ``out`` appears when it is complete: until then
    the files are in ``<out>.incomplete``, which a failure removes. Raises HuggingFaceError on every rank.
    """
    temporary = out.with_name(out.name + ".incomplete")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    with _refused_together():
        values = config_values(config, read_config(reference_folder), vocab_size=vocab_size, dtype=dtype)
        if layout.is_main:
            if out.exists():
                raise HuggingFaceError(f"the output folder {out} exists: remove it or give another")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        itemsize = next(model.parameters()).element_size()
        shapes = _all_shapes(config, vocab_size)
        sizes = {name: _num_elements(shape) * itemsize for name, shape in shapes.items()}
        shards = plan_shards(_names_by_stage(model, layout, config), sizes, max_shard_bytes)
        with _refused_together():
            _write_own_shards(model, layout, config, temporary, shards, vocab_size=vocab_size, progress=progress)
        with _refused_together():
            if layout.is_main:
                write_index(temporary, shards, sizes)
                (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
                for name in CARRIED_FILES:
                    if (reference_folder / name).is_file():
                        shutil.copyfile(reference_folder / name, temporary / name)
                os.rename(temporary, out)
    except HuggingFaceError:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Transfer(len(shapes), sum(sizes.values()))


def _write_own_shards(
    model: GPTModel,
    layout: Layout,
    config: ModelConfig,
    folder: Path,
    shards: dict[str, list[str]],
    *,
    vocab_size: int,
    progress: bool,
) -> None:
    """Gather this stage's tensors one by one, in the order of the shards, and write each shard when it is whole.

    A rank that cannot write goes on gathering, so that no other waits for it, and raises at the end.
    """
    file_of = {name: file for file, names in shards.items() for name in names}
    is_writer = layout.data_parallel_rank == 0 and layout.tensor_parallel_rank == 0
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    failure: OSError | HuggingFaceError | None = None
    owned = _owned_parameters(model, config)
    for mapping, parameter in tqdm(owned, desc="writing", unit="tensor", disable=not (progress and layout.is_main)):
        for name, tensor in _gather(mapping, parameter, layout, config, vocab_size=vocab_size).items():
            if not is_writer or failure is not None:
                continue
            file = file_of[name]
            ready = waiting.setdefault(file, {})
            ready[name] = tensor
            if len(ready) == len(shards[file]):
                try:
                    write_shard(folder / file, waiting.pop(file))
                except (OSError, HuggingFaceError) as error:
                    failure = error
                    waiting.clear()
                ready.clear()  # its tensors, before the next parameter is gathered
    if failure is not None:
        raise failure


def _gather(
    mapping: Mapping, parameter: torch.nn.Parameter, layout: Layout, config: ModelConfig, *, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The whole Hugging Face tensors of one parameter, on the host of the first tensor-parallel rank alone."""
    if layout.data_parallel_rank != 0:
        return {}
    shard = parameter.data.contiguous()
    shards = [shard]
    if mapping.cut is not None and layout.tensor_parallel_size > 1:
        is_first = layout.tensor_parallel_rank == 0
        received = [torch.empty_like(shard) for _ in range(layout.tensor_parallel_size)] if is_first else None
        dist.gather(shard, received, group=layout.groups.tp, group_dst=0)
        shards = received or []
    if layout.tensor_parallel_rank != 0:
        return {}
    cuts = zip(*(unpack(mapping, each.cpu(), config) for each in shards), strict=True)
    whole = {
        name: torch.cat(list(parts), dim=mapping.cut or 0) for name, parts in zip(mapping.sources, cuts, strict=True)
    }
    shapes = source_shapes(mapping, config, vocab_size=vocab_size)
    return {name: tensor[: shapes[name][0]].contiguous() for name, tensor in whole.items()}


def _owned_parameters(model: GPTModel, config: ModelConfig) -> list[tuple[Mapping, torch.nn.Parameter]]:
    """This stage's parameters in checkpoint order; a tied output layer is the first stage's to write."""
    by_name = {mapping.megatron: mapping for mapping in mappings(config)}
    order = {name: index for index, name in enumerate(by_name)}
    found = [(_mapping_of(_global_name(model, name, config), by_name), each) for name, each in model.named_parameters()]
    kept = [
        (mapping, each)
        for mapping, each in found
        if mapping.megatron != OUTPUT.megatron or mapping.sources == OUTPUT.sources
    ]
    return sorted(kept, key=lambda pair: order[pair[0].megatron])


def _names_by_stage(model: GPTModel, layout: Layout, config: ModelConfig) -> list[list[str]]:
    """Hugging Face tensors that each pipeline stage writes, in order; the same list on every rank."""
    mine = [name for mapping, _ in _owned_parameters(model, config) for name in mapping.sources]
    stages: list[list[str]] = [[] for _ in range(layout.pipeline_size)]
    dist.all_gather_object(stages, mine, group=layout.groups.pp)
    return stages


# --------------------------------------------------------------------------------------------------------- names


def _global_name(model: GPTModel, name: str, config: ModelConfig) -> str:
    """A parameter's name in Megatron's TransformerEngine spelling, its layer counted over the whole model."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(1))].layer_number - 1
    return f"decoder.layers.{layer}.{table_name(match.group(2), config)}"


def _mapping_of(name: str, by_name: dict[str, Mapping]) -> Mapping:
    if name not in by_name:
        raise HuggingFaceError(f"the parameter {name} has no counterpart in a Hugging Face checkpoint")
    return by_name[name]


def _all_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mapping in mappings(config):
        shapes |= source_shapes(mapping, config, vocab_size=vocab_size)
    return shapes


def _num_elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@contextmanager
def _refused_together() -> Iterator[None]:
    """What one rank refuses or cannot read or write, every rank raises: nobody goes on to a collective alone."""
    message = ""
    try:
        yield
    except (HuggingFaceError, OSError) as error:
        message = str(error)
    messages = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if found := next((each for each in messages if each), ""):
        raise HuggingFaceError(found)
