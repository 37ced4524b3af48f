"""The files of a Hugging Face folder: safetensors read by slice and written shard by shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping as Map
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.hf_config import HuggingFaceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CARRIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What an exported folder takes over unchanged from its reference, where the reference has it."""
_ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that old Llama checkpoints carry; the config decides them."""


class TensorFiles:
    """The tensors of a folder, found by name, read by slice; files stay open as memory maps."""

    def __init__(self, folder: Path):
        """Opens every file. Raises HuggingFaceError for one that is missing, damaged or not what the index says."""
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        names_in_index = _read_index(folder)
        for file in sorted(set(names_in_index.values())) if names_in_index else [SINGLE]:
            self._files[file] = _open(folder / file)
            for name in self._files[file].keys():  # noqa: SIM118  (not a dict)
                self._file_of[name] = file
        wrong = sorted(name for name, file in names_in_index.items() if self._file_of.get(name) != file)
        if wrong:
            raise HuggingFaceError(f"{folder / INDEX} lists tensors that are not in the file it names: {listed(wrong)}")

    def check(self, shapes: Map[str, tuple[int, ...]], *, tied: str | None) -> None:
        """Raise HuggingFaceError unless the folder has exactly these tensors, of these shapes, in a floating type.

        ``tied`` names the embedding of a model whose output layer shares it: such a folder may repeat it as
        ``lm_head.weight``, with the same values.
        """
        found = {name for name in self._file_of if not name.endswith(_IGNORED_SUFFIX)}
        if tied and "lm_head.weight" in found and tied in found:
            if not torch.equal(self.read("lm_head.weight"), self.read(tied)):
                raise HuggingFaceError(
                    f"{self._folder}: config.json says tie_word_embeddings, but lm_head.weight differs from {tied}: "
                    "set tie_word_embeddings to false or remove the tensor"
                )
            found.discard("lm_head.weight")
        problems = []
        if missing := sorted(set(shapes) - found):
            problems.append(f"missing tensors: {listed(missing)}")
        if unknown := sorted(found - set(shapes)):
            problems.append(f"unknown tensors: {listed(unknown)}")
        for name in sorted(found & set(shapes)):
            shape = tuple(self._slice(name).get_shape())
            if shape != shapes[name]:
                problems.append(f"{name} has shape {list(shape)}, config.json asks for {list(shapes[name])}")
            elif self._slice(name).get_dtype() not in _DTYPES:
                problems.append(f"{name} has type {self._slice(name).get_dtype()}, supported: {', '.join(_DTYPES)}")
        if problems:
            raise HuggingFaceError(f"{self._folder}: config and weights disagree: " + "; ".join(problems[:10]))

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """A tensor, or its part [start, stop) along dimension 0 or 1 (nothing where stop <= start)."""
        whole = self._slice(name)
        if dim is None:
            return whole[:]
        if stop <= start:
            shape = whole.get_shape()
            shape[dim] = 0
            return torch.empty(shape, dtype=_DTYPES[whole.get_dtype()])
        return whole[start:stop] if dim == 0 else whole[:, start:stop]

    def num_bytes(self, name: str) -> int:
        """Size of a tensor in its file."""
        return torch.Size(self._slice(name).get_shape()).numel() * _ITEMSIZE[self._slice(name).get_dtype()]

    def dtype(self) -> torch.dtype:
        """The one type of all tensors. Raises HuggingFaceError where they differ."""
        found = {name: self._slice(name).get_dtype() for name in self._file_of if not name.endswith(_IGNORED_SUFFIX)}
        if len(set(found.values())) != 1 or not set(found.values()) <= set(_DTYPES):
            raise HuggingFaceError(
                f"{self._folder}: tensors of types {sorted(set(found.values()))}; convert the model to one of "
                f"{', '.join(_DTYPES)} first"
            )
        return _DTYPES[next(iter(found.values()))]

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these files from others without reading their tensors: name, size, time of change, header."""
        return [
            {"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header": _header_digest(path)}
            for name in self._files
            for path in [self._folder / name]
            for stat in [path.stat()]
        ]

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def _header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's header: eight bytes of its length, then names, types, shapes and places."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def plan_shards(writers: list[list[str]], sizes: Map[str, int], max_bytes: int) -> dict[str, list[str]]:
    """File name to the tensors in it. A file holds tensors of one writing rank, at most ``max_bytes`` if it can."""
    groups: list[list[str]] = []
    for names in writers:
        room = 0
        for name in names:
            if sizes[name] > room:
                groups.append([])
                room = max_bytes
            groups[-1].append(name)
            room -= sizes[name]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": names for index, names in enumerate(groups, start=1)}


def require_room(folder: Path, num_bytes: int) -> None:
    """HuggingFaceError where the file system of ``folder`` has less than ``num_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise HuggingFaceError(
            f"the weights take {num_bytes / 1e6:,.1f} MB, {folder.parent} has {free / 1e6:,.1f} MB free: free some "
            "space or choose another disk; nothing was written"
        )


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, on the disk and whole when it has its name.

    Raises HuggingFaceError where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; save_file makes its files private
        save_file(tensors, part, metadata={"format": "pt"})
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise HuggingFaceError(f"{path.name} could not be written ({error}): free some space and try again") from error


def write_index(folder: Path, shards: dict[str, list[str]], sizes: Map[str, int]) -> None:
    """The index of several shards; a single file needs none."""
    if list(shards) == [SINGLE]:
        return
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def listed(names: list[str], most: int = 10) -> str:
    """Names for a message, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty for a folder with a single file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise HuggingFaceError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors weights are read")
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in weight_map.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HuggingFaceError(f"{path} is damaged: it has no weight_map of tensor to file name") from error
    if outside or not weight_map:
        raise HuggingFaceError(f"{path} names files outside of its folder or none: {outside[:3]}")
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise HuggingFaceError(f"{folder} lacks files that its index names: {listed(missing)}; download them again")
    return weight_map


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise HuggingFaceError("Hugging Face checkpoints need a package: pip install megatron-tropd[hf]") from error
    try:
        # Entered and never left: the map lives as long as the object.
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(f"{path} is truncated or damaged ({error}): download it again") from error
