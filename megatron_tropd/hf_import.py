"""A Hugging Face folder into a Megatron checkpoint, layer by layer: what is converted is on the disk, not in memory.

The model is built without weights. Each rank reads its part of one layer, all ranks write it as a piece of the
checkpoint, and at the end the pieces are made one. A conversion that was killed continues with the pieces it has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.checkpoint import DESCRIPTION, Description, make_anew
from megatron_tropd.checkpoint_pieces import is_whole, merge_pieces, write_piece
from megatron_tropd.config import ModelConfig
from megatron_tropd.distributed import Layout, from_main
from megatron_tropd.hf_config import HuggingFaceError
from megatron_tropd.hf_files import TensorFiles, listed
from megatron_tropd.hf_mapping import OUTPUT, mappings
from megatron_tropd.huggingface import Transfer, mapping_of, open_weights, read_parameter, refused_together
from megatron_tropd.integrity import CheckpointError, require_space, seal, write_durably
from megatron_tropd.models import build_without_weights
from megatron_tropd.writing import on_main

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.models.gpt import GPTModel

_PLAN = "import.json"
"""In a folder that is being written: from which files, into what, by which ranks."""
_WHOLE = "whole"


def import_huggingface(
    folder: Path, out: Path, layout: Layout, config: ModelConfig, description: Description, *, progress: bool = False
) -> Transfer:
    """Write the checkpoint ``out`` with the weights of the Hugging Face ``folder`` (all ranks call this).

    ``out`` appears when it is complete; until then its pieces are in ``<out>.incomplete``, which a failure removes.
    Where a kill left one, of the same files (names, sizes, times of change, headers) by the same layout, every piece
    with the size and SHA-256 that were written is kept. Raises HuggingFaceError as ``load_huggingface`` does, and
    CheckpointError where the checkpoint cannot be written, on every rank.
    """
    temporary = out.with_name(out.name + ".incomplete")
    with refused_together(f"{folder} could not be read"):
        files, shapes = open_weights(folder, config, vocab_size=description.vocab_size)
        dtype = files.dtype()
    transfer = Transfer(len(shapes), sum(files.num_bytes(name) for name in shapes))
    model = build_without_weights(config, layout, vocab_size=description.vocab_size, dtype=dtype)
    state = model.sharded_state_dict()
    groups = _groups(state, layout)
    pieces = {temporary / f"piece_{number:05d}": names for number, names in enumerate(groups)}
    plan = {"source": files.fingerprint(), "description": asdict(description), "layout": _sizes(layout)}
    done: list[Path] = []

    def begin() -> None:
        if out.exists():
            raise CheckpointError(f"the output folder {out} exists: remove it or give another")
        done.extend(_continue_or_begin(temporary, json.dumps(plan), list(pieces)))
        kept = sum(file.stat().st_size for piece in done for file in piece.iterdir())
        require_space(temporary, max(0, transfer.num_bytes - kept))

    try:
        on_main(begin, layout.is_main)
        for piece in _missing(pieces, done, told=progress and layout.is_main):
            with refused_together(f"{folder} could not be read"):
                entries = {name: state[name] for name in pieces[piece]}
                part, not_finite = _read(files, entries, model, layout, config, description.vocab_size)
                if not_finite:
                    raise HuggingFaceError(f"{folder} has NaN or infinite weights: {listed(sorted(not_finite))}")
            write_piece(part, piece, is_main=layout.is_main)
            del part  # before the next is read
        on_main(lambda: _publish(temporary, list(pieces), out, description), layout.is_main)
    except (CheckpointError, HuggingFaceError):
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return transfer


def _missing(pieces: Iterable[Path], done: list[Path], *, told: bool) -> Iterator[Path]:
    """The pieces that are not ``done`` as rank 0 sees it, with a bar for all of them."""
    done = from_main(done)
    missing = [piece for piece in pieces if piece not in done]
    if done and told:
        tqdm.write(f"{done[0].parent}: {len(done)} of {len(done) + len(missing)} pieces are there already")
    total = len(done) + len(missing)
    yield from tqdm(missing, "converting", total, initial=len(done), unit="piece", disable=not told)


def _groups(state: ShardedStateDict, layout: Layout) -> list[list[str]]:
    """This rank's entries of each piece: the embedding, each of its layers in turn, the rest; as many on every rank.

    The rest has the modules' own objects too, of all layers: Megatron wants those of one name together.
    """
    layers = {name: re.match(r"decoder\.layers\.(\d+)\.", name) for name in state}
    counts = [0] * layout.world_size
    dist.all_gather_object(counts, 1 + max((int(layer[1]) for layer in layers.values() if layer), default=-1))
    groups: list[list[str]] = [[] for _ in range(max(counts) + 2)]
    for name, layer in layers.items():
        if isinstance(state[name], ShardedObject):
            groups[-1].append(name)
        else:
            groups[int(layer[1]) + 1 if layer else 0 if name.startswith("embedding.") else -1].append(name)
    return groups


def _sizes(layout: Layout) -> dict[str, int]:
    return {
        "tensor": layout.tensor_parallel_size,
        "pipeline": layout.pipeline_size,
        "expert": layout.expert_parallel_size,
        "world": layout.world_size,
    }


def _continue_or_begin(folder: Path, plan: str, pieces: list[Path]) -> list[Path]:
    """The pieces that a conversion of the same plan left whole in ``folder``; else it is emptied."""
    if (folder / _PLAN).is_file() and (folder / _PLAN).read_text(encoding="utf-8") == plan:
        return [piece for piece in pieces if is_whole(piece)]
    make_anew(folder)
    write_durably(folder / _PLAN, plan)
    return []


def _read(
    files: TensorFiles, state: ShardedStateDict, model: GPTModel, layout: Layout, config: ModelConfig, vocab_size: int
) -> tuple[ShardedStateDict, list[str]]:
    """The entries of one piece with their weights, and the tensors of the folder among them that are not finite."""
    by_name = {mapping.megatron: mapping for mapping in mappings(config)}
    parameters = dict(model.named_parameters())
    not_finite: list[str] = []
    result: ShardedStateDict = {}
    for name, entry in state.items():
        if name not in parameters:
            result[name] = entry
            continue
        mapping = mapping_of(model, name, layout, config, by_name)
        if mapping.megatron == OUTPUT.megatron and mapping.sources != OUTPUT.sources:
            continue  # the embedding once more, which is another piece's
        parameter = parameters[name]
        shard, wrong = read_parameter(files, mapping, len(parameter), layout, config, vocab_size=vocab_size)
        not_finite.extend(wrong)
        weights = torch.zeros(parameter.shape, dtype=parameter.dtype)
        weights[: len(shard)].copy_(shard)
        result[name] = replace(entry, data=weights)
    return result, not_finite


def _publish(temporary: Path, pieces: list[Path], out: Path, description: Description) -> None:
    whole = temporary / _WHOLE
    moved = merge_pieces(pieces, whole)
    write_durably(whole / DESCRIPTION, json.dumps(asdict(description), indent=2))
    seal(whole, known=moved)
    os.rename(whole, out)
    shutil.rmtree(temporary)
