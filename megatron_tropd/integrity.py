"""What makes a checkpoint folder trustworthy: a manifest of sizes and hashes, and no pickle that could run code.

Imports no torch. A folder is sealed once, before it gets its final name, and verified before anything in it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.jsonl import DataError, parse_object

MANIFEST = "manifest.json"
METADATA = ".metadata"
LEGACY_PICKLE = "common.pt"
"""Where Megatron-Core before 0.19 kept what is not a tensor."""
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_SAFE_GLOBALS = {
    "builtins": {"set", "frozenset", "slice", "int", "float", "bool", "str", "bytes", "dict", "list", "tuple"},
    "collections": {"OrderedDict"},
    # Empty classes there, which stand for those of older versions.
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *_DTYPES},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip
"""What the ``.metadata`` of a checkpoint is made of: plain data, no function that does anything."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe to read, or of another model or tokenizer."""


def seal(folder: Path, *, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Bring every file of ``folder`` to the disk and write ``manifest.json``: size in bytes and SHA-256 of each.

    Files that are ``known``, from the manifest of the folder they come from, are not read again.
    """
    files = dict(known or {})
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST, *files)):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=2))
    _sync(folder)


def verify(folder: Path) -> None:
    """CheckpointError that names the file, where one is missing, cut off, altered, or a pickle that could run code."""
    for name, entry in read_manifest(folder).items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{path} is damaged: {size} bytes, the manifest says {entry['size']}{_ADVICE}")
            if _sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's{_ADVICE}")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}){_ADVICE}") from error
    refuse_unsafe_pickle(folder)


def digest(folder: Path) -> str:
    """Of all files of a sealed checkpoint, by their hashes in its manifest."""
    return _sha256(folder / MANIFEST)


_ADVICE = "; restore it, or set training.fall_back=true to continue from the newest checkpoint that is whole"


def refuse_unsafe_pickle(folder: Path) -> None:
    """Refuse pickles that have no place in a checkpoint of this package: ``common.pt``, a foreign ``.metadata``."""
    if (folder / LEGACY_PICKLE).exists():
        raise CheckpointError(
            f"{folder / LEGACY_PICKLE} is a pickle that could run code when it is read, and no run of this package "
            "writes one: use another checkpoint"
        )
    refuse_unsafe_metadata(folder)


def refuse_unsafe_metadata(folder: Path) -> None:
    """Refuse a ``.metadata`` that is more than a checkpoint's.

    It is read with an unpickler that knows the checkpoint's own types alone; nothing else is even imported.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); use another checkpoint") from error
    except Exception as error:  # a damaged pickle raises anything at all
        raise CheckpointError(f"{path} is damaged or unsafe ({error}); use another checkpoint") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # No dots: with them a name could reach through a module to anything that module imports.
        if name not in _SAFE_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
        return super().find_class(module, name)


def require_space(folder: Path, num_bytes: int) -> None:
    """CheckpointError where the file system of ``folder`` has less than ``num_bytes`` and a twentieth free."""
    free, needed = shutil.disk_usage(folder).free, num_bytes + num_bytes // 20
    if free < needed:
        raise CheckpointError(
            f"a checkpoint needs {needed / 2**20:.1f} MiB, {folder} has {free / 2**20:.1f} MiB free: make room or "
            "lower training.keep_checkpoints; nothing was written, the newest checkpoint is intact"
        )


def write_durably(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a crash leaves the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name to size and SHA-256. Raises CheckpointError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        files = parse_object(path.read_bytes(), str(path)).get("files")
    except (OSError, DataError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}){_ADVICE}") from error
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise CheckpointError(f"{path} is damaged: not a list of file names with size and sha256{_ADVICE}")
    return files


def _is_entry(name: str, entry: Any) -> bool:
    # A name is a file of this folder, never a path out of it.
    is_name = name not in ("", ".", "..") and "/" not in name and "\0" not in name and name.isprintable()
    return is_name and isinstance(entry, dict) and isinstance(entry.get("size"), int) and "sha256" in entry


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
