"""A model into a Hugging Face folder, tensor by tensor; ``huggingface`` is the way in.

A tensor is gathered over tensor-parallel ranks, and each pipeline stage writes the shards of its own layers, each
expert-parallel rank those of its own experts. Every function here is called by all ranks, and what one refuses all
refuse.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import ModelConfig
from megatron_tropd.distributed import Layout, from_main
from megatron_tropd.hf_config import CONFIG, HuggingFaceError, config_values, read_config
from megatron_tropd.hf_files import CARRIED_FILES, listed, plan_shards, require_room, write_index, write_shard
from megatron_tropd.hf_mapping import OUTPUT, Mapping, is_expert, mappings, source_shapes, unpack
from megatron_tropd.huggingface import Transfer, all_shapes, mapping_of, refused_together
from megatron_tropd.lora import is_adapter, merger
from megatron_tropd.models import chunks_of

Load = Callable[[str], torch.Tensor]
"""Reads a parameter of this rank by its name in the model."""
MAX_SHARD_BYTES = 5 * 10**9
_PLAN = "export.json"
"""In a folder that is being written: of what, and which shards it is to have."""


def export_huggingface(
    model: torch.nn.Module,
    layout: Layout,
    config: ModelConfig,
    out: Path,
    reference_folder: Path,
    *,
    vocab_size: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
    source: str | None = None,
    load: Load | None = None,
) -> Transfer:
    """Write ``model``, or the chunks of a rank in a ``ModuleList``, as a Hugging Face folder in the model's dtype:
    safetensors shards, index, config, tokenizer. Adapters are added to the weights.

    ``reference_folder`` is of the same family: what config.json says beyond the architecture, the generation config and
    the tokenizer come from there. Padded vocabulary rows are cut off. With ``load`` the ``model`` needs no weights,
    and no more than a parameter and a shard are in memory.

    ``out`` appears when it is complete: until then the files are in ``<out>.incomplete``, which a failure removes.
    Where a kill left one, and ``source`` names the same weights as then (a digest), the shards in it are kept and only
    the others are written. Raises HuggingFaceError on every rank, for weights that are not finite too.
    """
    temporary = out.with_name(out.name + ".incomplete")
    dtype = next(model.parameters()).dtype
    shapes = all_shapes(config, vocab_size)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(_names_by_writer(model, layout, config), sizes, max_shard_bytes)
    written: list[str] = []
    try:
        with refused_together(f"{temporary} could not be written"):
            values = config_values(config, read_config(reference_folder), vocab_size=vocab_size, dtype=str(dtype)[6:])
            if layout.is_main:
                if out.exists():
                    raise HuggingFaceError(f"the output folder {out} exists: remove it or give another")
                written = _continue_or_begin(temporary, source, shards)
                missing = (sizes[name] for file, names in shards.items() if file not in written for name in names)
                require_room(temporary, sum(missing))
        written = from_main(written)
        if written and layout.is_main and progress:
            tqdm.write(f"{temporary}: {len(written)} of {len(shards)} shards are there already")
        with refused_together(f"{temporary} could not be written"):
            owned = _missing(model, layout, config, shards, written)
            read = _reader(model, load)
            _write_own_shards(
                owned, read, layout, config, temporary, shards, written, vocab_size=vocab_size, progress=progress
            )
        with refused_together(f"{temporary} could not be written"):
            if layout.is_main:
                write_index(temporary, shards, sizes)
                (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
                for name in CARRIED_FILES:
                    if (reference_folder / name).is_file():
                        shutil.copyfile(reference_folder / name, temporary / name)
                (temporary / _PLAN).unlink()
                os.rename(temporary, out)
    except HuggingFaceError:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Transfer(len(shapes), sum(sizes.values()))


def _continue_or_begin(folder: Path, source: str | None, shards: dict[str, list[str]]) -> list[str]:
    """The shards that an export of the same weights, cut the same, left whole in ``folder``; else it is emptied.

    A shard has its name when it is whole.
    """
    plan = json.dumps({"source": source, "shards": shards})
    if source is not None and (folder / _PLAN).is_file() and (folder / _PLAN).read_text(encoding="utf-8") == plan:
        return [file for file in shards if (folder / file).exists()]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _PLAN).write_text(plan, encoding="utf-8")
    return []


def _missing(
    model: torch.nn.Module, layout: Layout, config: ModelConfig, shards: dict[str, list[str]], written: list[str]
) -> list[Owned]:
    """The parameters that this rank has to help to write, without those of shards that are there."""
    there = {name for file in written for name in shards[file]}
    return [each for each in _owned_parameters(model, layout, config) if not there.issuperset(each.mapping.sources)]


def _write_own_shards(
    owned: list[Owned],
    read: Callable[[Owned], torch.Tensor],
    layout: Layout,
    config: ModelConfig,
    folder: Path,
    shards: dict[str, list[str]],
    written: list[str],
    *,
    vocab_size: int,
    progress: bool,
) -> None:
    """Gather this writer's tensors one by one, in the order of the shards, and write each shard when it is whole.

    A rank that cannot write goes on gathering, so that no other waits for it, and raises at the end.
    """
    file_of = {name: file for file, names in shards.items() for name in names}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    not_finite: list[str] = []
    failure: OSError | HuggingFaceError | None = None
    for each in tqdm(owned, desc="writing", unit="tensor", disable=not (progress and layout.is_main)):
        for name, tensor in _gather(each.mapping, read(each), layout, config, vocab_size=vocab_size).items():
            if not tensor.isfinite().all():
                not_finite.append(name)
            if failure is not None or not_finite:
                continue
            file = file_of[name]
            if file in written:
                continue
            ready = waiting.setdefault(file, {})
            ready[name] = tensor
            if len(ready) == len(shards[file]):
                try:
                    write_shard(folder / file, waiting.pop(file))
                except (OSError, HuggingFaceError) as error:
                    failure = error
                    waiting.clear()
                ready.clear()  # its tensors, before the next parameter is gathered
    if not_finite:
        raise HuggingFaceError(
            f"the model has NaN or infinite weights: {listed(not_finite)}; export an earlier checkpoint"
        )
    if failure is not None:
        raise failure


def _gather(
    mapping: Mapping, own: torch.Tensor, layout: Layout, config: ModelConfig, *, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The whole Hugging Face tensors of one parameter, on the host of the first rank that shares it alone."""
    shard = own.contiguous()
    shards = [shard]
    group = layout.weight_group(is_expert=is_expert(mapping.megatron))
    if mapping.cut is not None and group.size() > 1:
        received = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(shard, received, group=group, group_dst=0)
        shards = received or []
    if group.rank() != 0:
        return {}
    cuts = zip(*(unpack(mapping, each.cpu(), config) for each in shards), strict=True)
    whole = {
        name: torch.cat(list(parts), dim=mapping.cut or 0) for name, parts in zip(mapping.sources, cuts, strict=True)
    }
    shapes = source_shapes(mapping, config, vocab_size=vocab_size)
    return {name: tensor[: shapes[name][0]].contiguous() for name, tensor in whole.items()}


@dataclass(frozen=True)
class Owned:
    """A parameter that this rank helps to write."""

    mapping: Mapping
    name: str
    """In this rank's model."""
    parameter: torch.nn.Parameter


def _reader(model: torch.nn.Module, load: Load | None) -> Callable[[Owned], torch.Tensor]:
    """What to write of a parameter: by ``load``, or its own values with the adapter, if any, added."""
    merged = merger(model)
    return lambda each: merged(each.parameter) if load is None else load(each.name)


def _owned_parameters(model: torch.nn.Module, layout: Layout, config: ModelConfig) -> list[Owned]:
    """What this rank helps to write, in checkpoint order: one and the same on those that share a parameter.

    Each is written by the first of its replicas; a tied output layer is the first stage's to write.
    """
    by_name = {mapping.megatron: mapping for mapping in mappings(config)}
    order = {name: index for index, name in enumerate(by_name)}
    owned = []
    for chunk, name, parameter in ((one, *named) for one in chunks_of(model) for named in one.named_parameters()):
        if is_adapter(name):
            continue
        mapping = mapping_of(chunk, name, layout, config, by_name)
        replicas = layout.replica_group(is_expert=is_expert(mapping.megatron))
        is_tied_output = mapping.megatron == OUTPUT.megatron and mapping.sources != OUTPUT.sources
        if replicas.rank() == 0 and not is_tied_output:
            owned.append(Owned(mapping, name, parameter))
    return sorted(owned, key=lambda each: order[each.mapping.megatron])


def _names_by_writer(model: torch.nn.Module, layout: Layout, config: ModelConfig) -> list[list[str]]:
    """Hugging Face tensors that each writing rank has, in order, stage by stage; the same list on every rank."""
    mine = [
        name
        for each in _owned_parameters(model, layout, config)
        if layout.weight_group(is_expert=is_expert(each.mapping.megatron)).rank() == 0
        for name in each.mapping.sources
    ]
    ranks: list[list[str]] = [[] for _ in range(layout.world_size)]
    dist.all_gather_object(ranks, mine)
    return [names for names in ranks if names]
