"""Hugging Face folders into this rank's slice of a model, tensor by tensor; ``hf_export`` is the way back.

Each rank opens the safetensors files and takes only the rows, columns or experts it holds, so the host never has more
than one parameter. Every function here is called by all ranks, and what one refuses all refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import ModelConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.hf_config import HuggingFaceError, differing_fields, model_config, read_config
from megatron_tropd.hf_files import TensorFiles, listed
from megatron_tropd.hf_mapping import (
    EMBEDDING,
    Mapping,
    global_expert_name,
    is_expert,
    mappings,
    pack,
    source_shapes,
    table_name,
)

# isort: split
from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class Transfer:
    """What was moved, over all ranks."""

    num_tensors: int
    """Tensors of the Hugging Face checkpoint."""
    num_bytes: int
    """Their size there."""


def load_huggingface(
    folder: Path, model: GPTModel, layout: Layout, config: ModelConfig, *, vocab_size: int, progress: bool = False
) -> Transfer:
    """Fill ``model`` from the Hugging Face folder, in the model's dtype; padded vocabulary rows become 0.

    ``vocab_size`` is the true size. Raises HuggingFaceError on every rank where config.json and ``config`` differ,
    where files are missing or damaged, where tensors are missing, unknown or of another shape, or not finite.
    """
    with refused_together(f"{folder} could not be read"):
        check_architecture(folder, config, vocab_size=vocab_size)
        files, shapes = open_weights(folder, config, vocab_size=vocab_size)
        by_name = {mapping.megatron: mapping for mapping in mappings(config)}
        not_finite: list[str] = []
        parameters = list(model.named_parameters())
        for name, parameter in tqdm(
            parameters, desc="reading", unit="tensor", disable=not (progress and layout.is_main)
        ):
            mapping = mapping_of(model, name, layout, config, by_name)
            shard, wrong = read_parameter(files, mapping, len(parameter), layout, config, vocab_size=vocab_size)
            not_finite.extend(wrong)
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
    files, shapes = TensorFiles(folder), all_shapes(config, vocab_size)
    files.check(shapes, tied=None if config.untie_embeddings_and_output_weights else next(iter(EMBEDDING.sources)))
    return files, shapes


def read_parameter(
    files: TensorFiles, mapping: Mapping, num_rows: int, layout: Layout, config: ModelConfig, *, vocab_size: int
) -> tuple[torch.Tensor, list[str]]:
    """This rank's part of one parameter, on the host, and the sources of it that are not finite.

    Of its ``num_rows`` those that pad the vocabulary are left out.
    """
    parts = {}
    for name, shape in source_shapes(mapping, config, vocab_size=vocab_size).items():
        if mapping.cut is None:
            parts[name] = files.read(name)
            continue
        group = layout.weight_group(is_expert=is_expert(mapping.megatron))
        size = shape[mapping.cut] // group.size()
        if "V" in mapping.sources[name]:
            size = num_rows
        start = group.rank() * size
        parts[name] = files.read(name, mapping.cut, start, min(start + size, shape[mapping.cut]))
    not_finite = [name for name, part in parts.items() if not part.isfinite().all()]
    return pack(mapping, list(parts.values()), config), not_finite


def mapping_of(
    model: GPTModel, own_name: str, layout: Layout, config: ModelConfig, by_name: dict[str, Mapping]
) -> Mapping:
    """The table's row of this rank's parameter ``own_name``. Raises HuggingFaceError where it has none."""
    name = _global_name(model, own_name, layout, config)
    if name not in by_name:
        raise HuggingFaceError(f"the parameter {name} has no counterpart in a Hugging Face checkpoint")
    return by_name[name]


def _global_name(model: GPTModel, name: str, layout: Layout, config: ModelConfig) -> str:
    """A parameter's name in Megatron's TransformerEngine spelling, layer and expert counted over the whole model."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(1))].layer_number - 1
    within = global_expert_name(table_name(match.group(2), config), layout.first_expert(config.num_moe_experts))
    return f"decoder.layers.{layer}.{within}"


def all_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mapping in mappings(config):
        shapes |= source_shapes(mapping, config, vocab_size=vocab_size)
    return shapes


@contextmanager
def refused_together(doing: str) -> Iterator[None]:
    """What one rank refuses, every rank raises: nobody goes on to a collective alone.

    ``doing`` begins the message where the system refused: a disk that is full, a folder without permission.
    """
    message = ""
    try:
        yield
    except HuggingFaceError as error:
        message = str(error)
    except OSError as error:
        message = f"{doing} ({error}): check its path, its permissions and the space there"
    messages = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if found := next((each for each in messages if each), ""):
        raise HuggingFaceError(found)
