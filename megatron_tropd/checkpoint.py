"""Checkpoints through Megatron's ``dist_checkpointing``: whole or absent, resumable, loadable in another layout.

A run's ``checkpoints`` folder holds ``step_N`` folders and a file ``latest`` with the name of the newest complete one.
A checkpoint is written under a temporary name, renamed when every rank has finished, and only then does ``latest``
move. On-disk tensor names are Megatron's TransformerEngine names, whichever layer spec is in use.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.config import ModelConfig, architecture
from megatron_tropd.distributed import Layout
from megatron_tropd.optimization import load_optimizer_state
from megatron_tropd.step import Learner

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel

DESCRIPTION = "tropd.json"
LATEST = "latest"
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model or tokenizer."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint is of; stored beside it as JSON and compared before any tensor is read."""

    step: int
    """Optimizer steps done."""
    seed: int
    """The run's seed; with the step it fixes data order and every random draw."""
    vocab_size: int
    """True vocabulary size."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    architecture: dict[str, Any]
    """The fields of ModelConfig that decide shapes and function."""


def save_checkpoint(folder: Path, learner: Learner, description: Description, *, keep: int) -> Path:
    """Write ``folder/step_N`` (all ranks call this), move ``latest``, drop all but the newest ``keep`` (0: none).

    A crash at any moment leaves the previous ``latest`` valid.
    """
    final = folder / f"step_{description.step}"
    temporary = folder / f"step_{description.step}.incomplete"
    is_main = learner.layout.is_main
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _save_state(_training_state(learner, is_loading=False), temporary, is_main=is_main)
    dist.barrier()
    if is_main:
        _write_durably(temporary / DESCRIPTION, json.dumps(asdict(description), indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _write_durably(folder / LATEST, final.name)
        _prune(folder, keep, newest=final)
    dist.barrier()
    return final


def load_checkpoint(path: Path, learner: Learner, expected: Description) -> int:
    """Restore weights, optimizer and scheduler from one ``step_N`` folder; returns the steps done.

    Any tensor- and pipeline-parallel layout can load it. Raises CheckpointError for another model, tokenizer or seed.
    """
    found = read_description(path)
    _check_same(path, found, replace(expected, step=found.step))
    state = dist_checkpointing.load(_training_state(learner, is_loading=True), str(path))
    learner.stage.module.load_state_dict(state["model"])
    load_optimizer_state(learner.optimizer, state["optimizer"])
    learner.scheduler.load_state_dict(state["scheduler"])
    return found.step


def load_weights(path: Path, model: GPTModel, config: ModelConfig, *, vocab_size: int, tokenizer: str) -> None:
    """Fill ``model`` from a checkpoint (``step_N``, or a folder with ``latest``), whatever layout wrote it."""
    path = resolve(path)
    found = read_description(path)
    expected = Description(found.step, found.seed, vocab_size, tokenizer, architecture(config))
    _check_same(path, found, expected)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))
    model.load_state_dict(state["model"])


def save_weights(path: Path, model: GPTModel, layout: Layout, description: Description) -> None:
    """Write the checkpoint folder ``path`` with weights alone (all ranks call this); ``load_weights`` reads it."""
    temporary = path.with_name(path.name + ".incomplete")
    if layout.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _save_state({"model": model.sharded_state_dict()}, temporary, is_main=layout.is_main)
    dist.barrier()
    if layout.is_main:
        _write_durably(temporary / DESCRIPTION, json.dumps(asdict(description), indent=2))
        os.rename(temporary, path)
    dist.barrier()


def weights_dtype(path: Path) -> torch.dtype:
    """The type of the weights in the checkpoint folder ``path``."""
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    return tensors["embedding.word_embeddings.weight"].dtype


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None for a run that has none yet."""
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if not (path / DESCRIPTION).exists():
        raise CheckpointError(f"{pointer} names {path.name}, which is not a complete checkpoint; restore that folder")
    return path


def resolve(path: Path) -> Path:
    """A ``step_N`` folder from itself, from a run's ``checkpoints`` folder, or from a run folder."""
    for folder in (path, path / "checkpoints"):
        if (folder / DESCRIPTION).exists():
            return folder
        if newest := latest_checkpoint(folder):
            return newest
    raise CheckpointError(
        f"no checkpoint at {path}: expected a step_N folder with {DESCRIPTION}, a folder with a '{LATEST}' file, or, "
        "to take weights from, a Hugging Face folder with config.json"
    )


def read_description(path: Path) -> Description:
    """What the checkpoint at ``path`` is of."""
    file = path / DESCRIPTION
    try:
        description = Description(**json.loads(file.read_text(encoding="utf-8")))
        return replace(description, architecture=architecture(ModelConfig(**description.architecture)))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); use another checkpoint") from error


def _check_same(path: Path, found: Description, expected: Description) -> None:
    differences = [
        f"{name}: the checkpoint has {value!r}, this run {expected.architecture.get(name)!r}"
        for name, value in found.architecture.items()
        if value != expected.architecture.get(name)
    ]
    if found.vocab_size != expected.vocab_size:
        differences.append(f"vocab_size: the checkpoint has {found.vocab_size}, this run {expected.vocab_size}")
    if found.tokenizer != expected.tokenizer:
        differences.append("tokenizer: the checkpoint was trained with another tokenizer (fingerprints differ)")
    if found.seed != expected.seed:
        differences.append(f"training.seed: the checkpoint has {found.seed}, this run {expected.seed}")
    if differences:
        raise CheckpointError(f"the checkpoint {path} does not fit this run: " + "; ".join(differences))


def _training_state(learner: Learner, *, is_loading: bool) -> ShardedStateDict:
    model = learner.stage.module.sharded_state_dict()
    # The optimizer rewrites entries of the dict it is given on some paths, so it gets its own.
    optimizer = learner.optimizer.sharded_state_dict(
        learner.stage.module.sharded_state_dict(), is_loading=is_loading, metadata=_OPTIMIZER_FORMAT
    )
    return {"model": model, "optimizer": optimizer, "scheduler": learner.scheduler.state_dict()}


def _save_state(state: ShardedStateDict, folder: Path, *, is_main: bool) -> None:
    """Write ``state``; where a rank cannot, all ranks raise CheckpointError and nothing stays behind."""
    try:
        dist_checkpointing.save(state, str(folder))
    except CheckpointException as error:
        free = shutil.disk_usage(folder.parent).free
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        reasons = {str(failure) for failure, _ in error.failures.values()}  # Megatron tells them to rank 0 alone
        raise CheckpointError(
            f"{folder} could not be written ({'; '.join(sorted(reasons)) or 'rank 0 says why'}; {free / 1e9:,.1f} GB "
            "are free there): free some space, or save elsewhere, and try again"
        ) from error


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _prune(folder: Path, keep: int, *, newest: Path) -> None:
    """Remove what crashes left behind and all but ``keep`` checkpoints; never ``newest``, which ``latest`` names.

    A crash between publishing a checkpoint and moving ``latest`` leaves a step ahead of the one that is resumed.
    """
    for leftover in folder.glob("step_*.incomplete"):
        shutil.rmtree(leftover)
    steps = {int(n): path for path in folder.glob("step_*") if (n := path.name.removeprefix("step_")).isdigit()}
    older = [steps[step] for step in sorted(steps) if steps[step] != newest]
    for old in older[: len(older) - (keep - 1)] if 0 < keep <= len(older) else []:
        shutil.rmtree(old)
