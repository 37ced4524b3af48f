"""Checkpoints through Megatron's ``dist_checkpointing``: whole or absent, resumable, loadable in another layout.

A run's ``checkpoints`` folder holds ``step_N`` folders and a file ``latest`` with the name of the newest complete one.
A checkpoint is written under a temporary name, renamed when every rank has finished, and only then does ``latest``
move. On-disk tensor names are Megatron's TransformerEngine names, whichever layer spec is in use.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.checkpoint_pieces import TensorReader
from megatron_tropd.config import ModelConfig, architecture
from megatron_tropd.config_drift import DriftError, check_drift
from megatron_tropd.distributed import Layout, from_main
from megatron_tropd.integrity import CheckpointError, require_space, seal, verify, write_durably
from megatron_tropd.lora import is_adapter, load_trained_state, trained_state
from megatron_tropd.models import chunks_of
from megatron_tropd.optimization import OPTIMIZER_FORMAT, load_optimizer_state, padding_counted
from megatron_tropd.step import Learner
from megatron_tropd.writing import BackgroundWriter, on_main, sharded_tensors, write_state

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, is_main_replica
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

DESCRIPTION = "tropd.json"
LATEST = "latest"
_STEP = re.compile(r"step_([0-9]{1,18})")


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
    config: dict[str, Any] = field(default_factory=dict)
    """The run's whole config and the hashes of its input files (``config_drift.snapshot``); empty where no run wrote
    it."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Where the checkpoint holds LoRA adapters alone: ``LoraConfig.shape``, and the ``base`` they were trained on with
    its ``base_fingerprint`` (``weights.describe_base``). Empty: the whole model."""


def save_checkpoint(
    folder: Path,
    learner: Learner,
    description: Description,
    *,
    keep: int,
    keep_every: int = 0,
    files: Mapping[str, str] | None = None,
    background: BackgroundWriter | None = None,
) -> Path:
    """Write ``folder/step_N`` (all ranks call this), move ``latest``, drop all but the newest ``keep`` (0: none).

    Steps that ``keep_every`` divides stay. ``files`` (name to text, equal on every rank) lie beside the tensors, whole
    or absent with them. A full disk or a failed write on any rank is a CheckpointError on every one. A crash at any
    moment leaves the previous ``latest`` valid. With ``background`` it waits for that writer's earlier checkpoint, if
    any, and returns while this one is being written: the writer publishes it.
    """
    if background is not None:
        background.finish()
    final = folder / f"step_{description.step}"
    temporary = folder / f"step_{description.step}.incomplete"
    is_main = learner.layout.is_main
    on_main(lambda: make_anew(temporary), is_main)
    learner.gather.finish()
    state = _training_state(learner, is_loading=False)
    num_bytes = _global_bytes(state, learner.layout)
    on_main(lambda: require_space(temporary, num_bytes), is_main)

    def publish() -> None:
        on_main(lambda: _publish(temporary, final, description, files or {}, keep, keep_every), is_main)

    if background is not None:
        background.start(state, temporary, publish)
        return final
    write_state(state, temporary)
    publish()
    return final


def make_anew(folder: Path) -> None:
    """An empty ``folder``. Raises CheckpointError."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error.strerror}); see to its parent folder") from error


def _publish(
    temporary: Path, final: Path, description: Description, files: Mapping[str, str], keep: int, keep_every: int
) -> None:
    folder = final.parent
    for name, text in files.items():
        write_durably(temporary / name, text)
    write_durably(temporary / DESCRIPTION, json.dumps(asdict(description), indent=2))
    seal(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    write_durably(folder / LATEST, final.name)
    _prune(folder, keep, newest=final, keep_every=keep_every)


def _global_bytes(state: ShardedStateDict, layout: Layout) -> int:
    """Bytes of all tensors in the checkpoint, each counted where its main replica is."""
    found = [entry for entry in sharded_tensors(state) if is_main_replica(entry.replica_id)]
    mine = [entry.data for entry in found if entry.data is not None]
    total = torch.tensor(sum(tensor.nbytes for tensor in mine), dtype=torch.int64, device=layout.device)
    dist.all_reduce(total)
    return int(total)


def load_checkpoint(path: Path, learner: Learner, expected: Description, *, allow_config_changes: bool = False) -> int:
    """Restore weights, optimizer, scheduler and guard from one ``step_N`` folder; returns the steps done.

    Any tensor- and pipeline-parallel layout can load it. Raises CheckpointError for another model or tokenizer and,
    unless ``allow_config_changes``, for another seed or any other change of the config that may not be.
    """
    on_main(lambda: verify(path), learner.layout.is_main)
    found = read_description(path)
    knows_config = bool(found.config and expected.config)
    check_same(path, found, replace(expected, step=found.step, seed=found.seed if knows_config else expected.seed))
    if knows_config:
        _show_drift(path, found, expected, allow=allow_config_changes, is_main=learner.layout.is_main)
    state = dist_checkpointing.load(_training_state(learner, is_loading=True), str(path))
    for name, student in _named(learner.students).items():
        load_trained_state(student, state[name])
    load_optimizer_state(learner.optimizer, state["optimizer"])
    learner.scheduler.num_steps = 0  # loading counts on from where it is, which after a rollback is another step
    learner.scheduler.load_state_dict(state["scheduler"])
    learner.gather.forget()
    if learner.replicas is not None:
        learner.replicas.forget()
    learner.guard.load_state_dict(state.get("guard", {}))  # absent where an older version of this package saved
    return found.step


def _show_drift(path: Path, found: Description, expected: Description, *, allow: bool, is_main: bool) -> None:
    try:
        changes = check_drift(found.config, expected.config, allow=allow)
    except DriftError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if changes and is_main:
        logger.warning("the config has changed since %s:\n%s", path.name, "\n".join(f"  {line}" for line in changes))


def load_weights(path: Path, model: torch.nn.Module, config: ModelConfig, *, vocab_size: int, tokenizer: str) -> None:
    """Fill ``model``, or the chunks of a rank in a ``ModuleList``, from a checkpoint (``step_N``, or a folder with
    ``latest``), whatever layout wrote it."""
    path = _checked(path, config, vocab_size=vocab_size, tokenizer=tokenizer)
    chunks = _named(chunks_of(model))
    state = dist_checkpointing.load({name: chunk.sharded_state_dict() for name, chunk in chunks.items()}, str(path))
    for name, chunk in chunks.items():
        chunk.load_state_dict(state[name])


def weights_reader(
    path: Path, model: GPTModel, config: ModelConfig, *, vocab_size: int, tokenizer: str
) -> Callable[[str], torch.Tensor]:
    """``load_weights`` one by one: a function that reads the rank's parameter of a name, on the host.

    ``model`` needs no weights.
    """
    reader = TensorReader(_checked(path, config, vocab_size=vocab_size, tokenizer=tokenizer))
    entries = model.sharded_state_dict()
    return lambda name: reader.read(entries[name])


def _checked(path: Path, config: ModelConfig, *, vocab_size: int, tokenizer: str) -> Path:
    """The ``step_N`` folder at ``path``, whole and of this model and tokenizer; CheckpointError otherwise."""
    path = resolve(path)
    on_main(lambda: verify(path), dist.get_rank() == 0)
    found = read_description(path)
    expected = Description(found.step, found.seed, vocab_size, tokenizer, architecture(config))
    if found.adapter:
        raise CheckpointError(
            f"{path} holds LoRA adapters alone: load them with their base (weights.load_weights_of), or export them "
            "merged (tools/convert_checkpoint.py megatron-to-hf) and load that folder"
        )
    check_same(path, found, expected)
    return path


def weights_dtype(path: Path) -> torch.dtype:
    """The type of the weights, or of the adapters, in the checkpoint folder ``path``."""
    tensors = dist_checkpointing.load_tensors_metadata(str(path))
    wanted = "embedding.word_embeddings.weight"
    if wanted not in tensors:
        wanted = next(name for name in tensors if is_adapter(name) and not name.startswith("optimizer."))
    return tensors[wanted].dtype


def find_checkpoint(folder: Path, *, fall_back: bool, is_main: bool) -> Path | None:
    """Where a run continues, as rank 0 sees it: what ``latest`` names, or with ``fall_back`` the newest whole one."""
    found: list[Path | None] = []
    search = newest_whole_checkpoint if fall_back else latest_checkpoint
    on_main(lambda: found.append(search(folder)), is_main)
    return from_main(found[0] if found else None)


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """What ``latest`` names or, where that is damaged, the newest step whose every file is as the manifest says."""
    newest = None
    try:
        newest = latest_checkpoint(folder)
        if newest is None:
            return None
        verify(newest)
        return newest
    except CheckpointError as damage:
        for _, path in sorted(_steps(folder).items(), reverse=True):
            if path != newest and _is_whole(path):
                logger.warning("%s; falling back to %s", damage, path.name)
                return path
        raise


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None for a run that has none yet."""
    pointer = folder / LATEST
    if not _exists(pointer):
        return None
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{pointer} cannot be read ({error}); write the newest step_N into it") from error
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} holds {name[:40]!r}, not the name of a checkpoint; write step_N into it")
    path = folder / name
    if not _exists(path / DESCRIPTION):
        raise CheckpointError(f"{pointer} names {path.name}, which is not a complete checkpoint; restore that folder")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); see to the permissions of its folder"
        ) from error


def resolve(path: Path) -> Path:
    """A ``step_N`` folder from itself, from a run's ``checkpoints`` folder, or from a run folder."""
    for folder in (path, path / "checkpoints"):
        if _exists(folder / DESCRIPTION):
            return folder
        if newest := latest_checkpoint(folder):
            return newest
    raise CheckpointError(
        f"no checkpoint at {path}: expected a step_N folder with {DESCRIPTION}, a folder with a '{LATEST}' file, or, "
        "to take weights from, a Hugging Face folder with config.json or a checkpoint of Megatron-LM"
    )


def read_description(path: Path) -> Description:
    """What the checkpoint at ``path`` is of."""
    file = path / DESCRIPTION
    try:
        description = Description(**json.loads(file.read_text(encoding="utf-8")))
        return replace(description, architecture=architecture(ModelConfig(**description.architecture)))
    except (OSError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); use another checkpoint") from error


def check_same(path: Path, found: Description, expected: Description) -> None:
    """Raise CheckpointError unless the checkpoint at ``path`` is of what is ``expected`` (the step aside)."""
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
    differences += _adapter_differences(found.adapter, expected.adapter)
    if differences:
        raise CheckpointError(f"the checkpoint {path} does not fit this run: " + "; ".join(differences))


def _adapter_differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    if bool(found) != bool(expected):
        yield (
            f"it holds LoRA adapters of rank {found['rank']} alone, and this run trains whole weights: set lora.rank"
            if found
            else "it holds whole weights, and this run trains LoRA adapters: set lora.rank=0, or start in another "
            "output_dir with student.load set to it"
        )
        return
    for name in ("rank", "alpha", "target_modules") if found else ():
        if found[name] != expected[name]:
            yield f"lora.{name}: the checkpoint has {found[name]!r}, this run {expected[name]!r}"
    known = "base_fingerprint" in found and "base_fingerprint" in expected
    if known and found["base_fingerprint"] != expected["base_fingerprint"]:
        yield (
            f"its adapters were trained on other weights (of {found['base']}, fingerprint "
            f"{found['base_fingerprint'][:16]}) than those now in {expected['base']} "
            f"({expected['base_fingerprint'][:16]}): set student.load to the weights of then, in the same precision"
        )


def _training_state(learner: Learner, *, is_loading: bool) -> ShardedStateDict:
    students = _named(learner.students)
    # The optimizer rewrites entries of the dict it is given on some paths, so it gets its own.
    with padding_counted(learner.optimizer):
        optimizer = learner.optimizer.sharded_state_dict(
            {name: trained_state(student) for name, student in students.items()},
            is_loading=is_loading,
            metadata=OPTIMIZER_FORMAT,
        )
    return {
        **{name: trained_state(student) for name, student in students.items()},
        "optimizer": optimizer,
        "scheduler": learner.scheduler.state_dict(),
        "guard": learner.guard.state_dict(),
    }


def _named(chunks: Sequence[GPTModel]) -> dict[str, GPTModel]:
    """Where a rank's state has its model chunks. On disk tensors have names of their own, the same in every layout."""
    return {"model" if len(chunks) == 1 else f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _steps(folder: Path) -> dict[int, Path]:
    return {int(found[1]): path for path in folder.glob("step_*") if (found := _STEP.fullmatch(path.name))}


def _prune(folder: Path, keep: int, *, newest: Path, keep_every: int = 0) -> None:
    """Remove what crashes left behind and all but ``keep`` checkpoints; never ``newest``, which ``latest`` names.

    A crash between publishing a checkpoint and moving ``latest`` leaves a step ahead of the one that is resumed. Steps
    that ``keep_every`` divides are not counted and stay.
    """
    for leftover in folder.glob("step_*.incomplete"):
        shutil.rmtree(leftover)
    steps = _steps(folder)
    older = [steps[step] for step in sorted(steps) if steps[step] != newest and (not keep_every or step % keep_every)]
    for old in older[: len(older) - (keep - 1)] if 0 < keep <= len(older) else []:
        shutil.rmtree(old)
