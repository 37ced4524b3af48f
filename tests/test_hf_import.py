"""Folders converted layer by layer: the checkpoint that a whole model would give, and what a kill leaves of it."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytest.importorskip("transformers")
from tests import hf_models
from tests.test_huggingface import _load, _Tracker

NUM_PIECES = 6
"""Of four layers: the embedding, the layers, what comes after them."""


def _import(folder: str, out: Path, layout: Any) -> Any:
    from megatron_tropd.checkpoint import Description
    from megatron_tropd.config import architecture
    from megatron_tropd.hf_config import model_config, read_config
    from megatron_tropd.hf_import import import_huggingface

    config = replace(model_config(read_config(Path(folder))), make_vocab_size_divisible_by=8)
    description = Description(0, 0, hf_models.VOCAB_SIZE, "fingerprint", architecture(config))
    return import_huggingface(Path(folder), out, layout, config, description)


def _metadata(checkpoint: Path) -> dict[str, Any]:
    """Every tensor's size, type and parts, of which each has a place in a file."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    found = FileSystemReader(checkpoint).read_metadata()
    tensors = {}
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            assert MetadataIndex(name) in found.storage_data
            continue
        assert all(MetadataIndex(name, chunk.offsets) in found.storage_data for chunk in entry.chunks)
        parts = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
        tensors[name] = (tuple(entry.size), entry.properties.dtype, parts)
    return tensors


def _written(action: Any) -> list[str]:
    """The pieces that are written while ``action`` runs."""
    from megatron_tropd import hf_import

    names: list[str] = []
    write = hf_import.write_piece

    def recorded(state: Any, folder: Path, **options: Any) -> None:
        write(state, folder, **options)
        names.append(folder.name)

    hf_import.write_piece = recorded  # type: ignore[assignment]
    try:
        action()
    finally:
        hf_import.write_piece = write
    return names


# ------------------------------------------------------------------------------------------- same as a whole model


def _compare(folders: dict[str, str], out: str) -> tuple[int, int]:
    """Imports in several layouts, against a checkpoint of the loaded model, and exports; the most bytes at once."""
    from megatron_tropd import hf_import
    from megatron_tropd.checkpoint import load_weights
    from megatron_tropd.integrity import verify
    from megatron_tropd.models import build_model
    from megatron_tropd.writing import write_state
    from tests import tiny

    read, importing, exporting = hf_import._read, _Tracker(), _Tracker()

    def tracked(*arguments: Any) -> Any:
        state, not_finite = read(*arguments)
        for entry in state.values():
            if isinstance(getattr(entry, "data", None), torch.Tensor):
                importing.add(entry.data)
        return state, not_finite

    hf_import._read = tracked
    for tp, pp, ep in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        layout = tiny.start(tp=tp, pp=pp, ep=ep)
        for name, folder in folders.items():
            if ep > 1 and name != "qwen3_moe":
                continue
            path = Path(out) / f"{name}-{tp}-{pp}-{ep}"
            _import(folder, path, layout)
            verify(path)
            model, config = _load(Path(folder), layout)
            whole = path.with_name(path.name + "-whole")
            whole.mkdir(exist_ok=True)
            write_state({"model": model.sharded_state_dict()}, whole)
            assert _metadata(path) == _metadata(whole), path
            sizes = {"vocab_size": hf_models.VOCAB_SIZE, "max_sequence_length": 64, "dtype": torch.float32}
            loaded = build_model(config, layout, **sizes, seed=1)
            load_weights(path, loaded, config, vocab_size=hf_models.VOCAB_SIZE, tokenizer="fingerprint")
            found = dict(loaded.named_parameters())
            assert all(torch.equal(found[own], each) for own, each in model.named_parameters()), path
            _export(path, Path(folder), layout, config, exporting)
    return importing.peak, exporting.peak


def _export(checkpoint: Path, folder: Path, layout: Any, config: Any, tracker: _Tracker) -> None:
    """The checkpoint as a folder, read parameter by parameter, has the bits of the first."""
    from megatron_tropd.checkpoint import weights_reader
    from megatron_tropd.hf_export import export_huggingface
    from megatron_tropd.models import build_without_weights

    sizes = {"vocab_size": hf_models.VOCAB_SIZE}
    model = build_without_weights(config, layout, **sizes, dtype=torch.float32)
    load = weights_reader(checkpoint, model, config, **sizes, tokenizer="fingerprint")

    out = checkpoint.with_name(checkpoint.name + "-back")
    export_huggingface(
        model, layout, config, out, folder, **sizes, load=lambda name: tracker.add(load(name)), max_shard_bytes=20_000
    )
    ours, theirs = hf_models.tensors_of(out), hf_models.tensors_of(folder)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs), out


def test_pieces_make_the_checkpoint_of_the_whole_model_and_it_goes_back_by_layer(tmp_path: Path) -> None:
    folders = {name: hf_models.save_model(tmp_path / name, name) for name in ("qwen2", "qwen3_moe")}
    peaks = run_ranks(2, _compare, {name: str(path) for name, path in folders.items()}, str(tmp_path))
    # Of the larger model: a rank holds a layer (of two stages the whole one), never two, and one parameter at a time.
    tensors = hf_models.tensors_of(folders["qwen3_moe"])
    a_layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.0."))
    for importing, exporting in peaks:
        assert a_layer / 2 < importing <= a_layer and 0 < exporting < a_layer / 2
    assert a_layer < sum(tensor.nbytes for tensor in tensors.values()) / 4


# ------------------------------------------------------------------------------------------------- after a kill


def _import_and_die(folder: str, out: str, at: str) -> None:
    """SIGKILL to the last rank, with the fourth piece on the disk but without its name, or half of the pieces moved."""
    import torch.distributed as dist

    from megatron_tropd import checkpoint_pieces, hf_import
    from tests import tiny

    layout = tiny.start(tp=2, pp=1)
    seal, rename, moved = checkpoint_pieces.seal, os.rename, []

    def die_instead_of_sealing(piece: Path) -> None:
        if piece.name == "piece_00003.part":
            os.kill(os.getpid(), signal.SIGKILL)
        seal(piece)

    def die_while_merging(source: Path, target: Path) -> None:
        rename(source, target)
        moved.append(target)
        if target.name.startswith("__3_"):
            os.kill(os.getpid(), signal.SIGKILL)

    if at == "writing":
        checkpoint_pieces.seal = die_instead_of_sealing  # type: ignore[assignment]
    else:
        os.rename = die_while_merging  # type: ignore[assignment]
    assert hf_import.import_huggingface and dist.is_initialized()
    _import(folder, Path(out), layout)


def _import_again(folder: str, out: str) -> dict[str, list[str]]:
    """The pieces that were written after each kind of interruption, of what is left in ``out`` by name."""
    import torch.distributed as dist

    from megatron_tropd.checkpoint import load_weights
    from megatron_tropd.models import build_model
    from tests import tiny

    def on_main(action: Any) -> None:
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    interfere: dict[str, Any] = {
        "writing": lambda left: None,
        "merging": lambda left: None,
        "damaged": lambda left: flip_a_bit(next((left / "piece_00001").glob("*.distcp"))),
        "cut": lambda left: (left / "piece_00002" / "manifest.json").write_bytes(b"{"),
        "other-source": lambda left: os.utime(sorted(Path(folder).glob("*.safetensors"))[1], (1, 1)),
    }
    layout = tiny.start(tp=2, pp=1)
    written = {}
    for name, interference in interfere.items():
        on_main(lambda name=name, interference=interference: interference(Path(out) / f"{name}.incomplete"))
        written[name] = _written(lambda name=name: _import(folder, Path(out) / name, layout))
    layout = tiny.start(tp=1, pp=2)
    written["other-layout"] = _written(lambda: _import(folder, Path(out) / "other-layout", layout))
    model, config = _load(Path(folder), layout)
    for name in written:
        sizes = {"vocab_size": hf_models.VOCAB_SIZE, "max_sequence_length": 64, "dtype": torch.float32}
        loaded = build_model(config, layout, **sizes, seed=1)
        load_weights(Path(out) / name, loaded, config, vocab_size=hf_models.VOCAB_SIZE, tokenizer="fingerprint")
        assert all(map(torch.equal, loaded.parameters(), model.parameters())), name
    return written


def test_an_import_that_was_killed_keeps_its_pieces(tmp_path: Path) -> None:
    folder, out = hf_models.save_model(tmp_path / "qwen3", "qwen3"), tmp_path / "out"
    out.mkdir()
    for at in ("writing", "merging"):
        with pytest.raises(AssertionError, match="the process ended without a word"):
            run_ranks(2, _import_and_die, str(folder), str(out / at), at)
        assert not (out / at).exists() and (out / f"{at}.incomplete").exists()
    for name in ("damaged", "cut", "other-source", "other-layout"):
        shutil.copytree(out / "writing.incomplete", out / f"{name}.incomplete")
    written, _ = run_ranks(2, _import_again, str(folder), str(out))
    everything = [f"piece_{number:05d}" for number in range(NUM_PIECES)]
    assert (
        written
        == {
            "writing": everything[3:],
            "merging": everything[:4],  # what was moved is not trusted
            "damaged": [everything[1], *everything[3:]],
            "cut": everything[2:],
            "other-source": everything,
            "other-layout": everything[: NUM_PIECES - 2],  # two stages of two layers
        }
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(written)
