"""Checkpoints larger than the memory: written piece by piece, and read tensor by tensor.

A killed writer keeps the pieces it has: each is a checkpoint of its own, written by Megatron's ``dist_checkpointing``
and sealed. Megatron keeps one kind of parameter of all layers (and experts) in one tensor, with axes in front that
count them; a piece has only some of them, so there the tensor of layer 3 of 32 is called ``NAME[3/32]``. Merging the
pieces moves their files into one folder and writes the metadata of the whole: no tensor is read or written again.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tropd.integrity import METADATA, CheckpointError, read_manifest, seal, verify
from megatron_tropd.writing import on_main, write_state

# isort: split
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)

_COMMON = "common_state/"
"""Megatron's entry for what is no tensor: nothing, in a piece."""
_PIECE = re.compile(r"(.+)\[([0-9/,]+)\]")


def write_piece(state: ShardedStateDict, folder: Path, *, is_main: bool) -> None:
    """Write ``state`` as the piece ``folder``, which appears when it is whole (all ranks call this).

    Raises CheckpointError on every rank where one cannot.
    """
    part = folder.with_name(folder.name + ".part")

    def prepare() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()

    def publish() -> None:
        seal(part)
        os.rename(part, folder)

    apply_factories(state)
    dict_list_map_inplace(_renamed, state)
    on_main(prepare, is_main)
    write_state(state, part)
    on_main(publish, is_main)


def is_whole(folder: Path) -> bool:
    """Whether a piece is there, with every byte that was written; what is left of another is removed."""
    try:
        verify(folder)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def merge_pieces(pieces: Sequence[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Make ``folder`` of the pieces' files, which are moved there; returns the manifest's entries for them.

    What is in a piece that was merged half-way is not whole any more. On one rank.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, Any] = {}
    whole = Metadata({})
    for number, piece in enumerate(pieces):
        whole = FileSystemReader(piece).read_metadata()
        for name, entry in whole.state_dict_metadata.items():
            _add(tensors, name, entry)
        moved = {}
        for name, size_and_hash in read_manifest(piece).items():
            if name.endswith(".distcp"):
                moved[name] = f"__{number}{name[1:]}"
                entries[moved[name]] = size_and_hash
                os.rename(piece / name, folder / moved[name])
        for index, place in whole.storage_data.items():
            key, offsets, _ = _original(index.fqn)
            offset = None if index.offset is None else torch.Size([*offsets, *index.offset[len(offsets) :]])
            places.setdefault(MetadataIndex(key, offset), replace(place, relative_path=moved[place.relative_path]))
    for name, entry in tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            assert sum(prod(chunk.sizes) for chunk in entry.chunks) == prod(entry.size), f"parts of {name} are missing"
    shutil.copyfile(pieces[0] / CONFIG_FNAME, folder / CONFIG_FNAME)
    with (folder / METADATA).open("wb") as file:
        pickle.dump(replace(whole, state_dict_metadata=tensors, storage_data=places), file)
    return entries


class TensorReader:
    """Reads single tensors of a verified checkpoint folder, whatever layout wrote it; every rank for itself.

    Megatron's ``load`` takes all layers of one kind together.
    """

    def __init__(self, folder: Path):
        """Reads the metadata alone."""
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, entry: ShardedTensor | ShardedTensorFactory) -> torch.Tensor:
        """The rank's part that ``entry``, of a model without weights, describes; padding that was not stored is 0."""
        filled = {"": replace(entry, data=torch.zeros(entry.data.shape, dtype=entry.data.dtype))}
        apply_factories(filled)
        targets = _Targets([each for each in nested_values(filled) if isinstance(each, ShardedTensor)])
        items = []
        for name, chunk in targets.chunks:
            stored = self._metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [chunk])
        self._reader.read_data(LoadPlan(items), targets).wait()
        dict_list_map_inplace(lambda each: each.data if isinstance(each, ShardedTensor) else each, filled)
        return entry.merge_fn(filled[""]) if isinstance(entry, ShardedTensorFactory) else filled[""]


class _Targets(DefaultLoadPlanner):
    """Hands out the tensors that are read into."""

    def __init__(self, tensors: Sequence[ShardedTensor]):
        super().__init__()
        self.chunks = []
        self._tensors = {}
        for each in tensors:
            data = each.data[(None,) * each.prepend_axis_num]
            chunk = ChunkStorageMetadata(torch.Size(each.global_offset), data.shape)
            self.chunks.append((each.key, chunk))
            self._tensors[MetadataIndex(each.key, chunk.offsets)] = data

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor for a part of the checkpoint."""
        return self._tensors[index]


def _renamed(entry: object) -> object:
    """A tensor among axes that count layers or experts, as the only one of its name."""
    if not isinstance(entry, ShardedTensor) or not entry.prepend_axis_num:
        return entry
    count, ones = entry.prepend_axis_num, (1,) * entry.prepend_axis_num
    assert entry.axis_fragmentations is not None
    places = zip(entry.global_offset[:count], entry.global_shape[:count], strict=True)
    return replace(
        entry,
        key=f"{entry.key}[{','.join(f'{offset}/{size}' for offset, size in places)}]",
        global_shape=(*ones, *entry.global_shape[count:]),
        global_offset=(*(0 for _ in ones), *entry.global_offset[count:]),
        axis_fragmentations=(*ones, *entry.axis_fragmentations[count:]),
    )


def _original(name: str) -> tuple[str, list[int], list[int]]:
    """Of a name in a piece: that in the whole, the place along each axis in front, and the axis's size."""
    found = _PIECE.fullmatch(name)
    if found is None:
        return name, [], []
    places = [place.split("/") for place in found[2].split(",")]
    return found[1], [int(offset) for offset, _ in places], [int(size) for _, size in places]


def _add(
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata],
    name: str,
    entry: TensorStorageMetadata | BytesStorageMetadata,
) -> None:
    """Count one entry of a piece's metadata among those of the whole."""
    key, offsets, sizes = _original(name)
    if isinstance(entry, BytesStorageMetadata):
        assert key not in tensors or key.startswith(_COMMON), key
        tensors[key] = entry
        return
    count = len(offsets)
    chunks = [
        ChunkStorageMetadata(torch.Size([*offsets, *chunk.offsets[count:]]), chunk.sizes) for chunk in entry.chunks
    ]
    known = tensors.setdefault(key, replace(entry, size=torch.Size([*sizes, *entry.size[count:]]), chunks=[]))
    assert isinstance(known, TensorStorageMetadata)
    known.chunks.extend(chunks)
