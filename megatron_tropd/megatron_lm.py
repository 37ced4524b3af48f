"""Weights from the checkpoints of Megatron-LM itself (``torch_dist``): no tropd.json says what they are of.

What does are the arguments that Megatron-LM saves with them, and the name and shape of every tensor: both are compared
with the config. Before Megatron-Core 0.19 the arguments were in ``common.pt``, a pickle: such a legacy checkpoint is
read only where the config allows it.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.checkpoint import DESCRIPTION
from megatron_tropd.config import ModelConfig, architecture
from megatron_tropd.distributed import from_main
from megatron_tropd.integrity import LEGACY_PICKLE, CheckpointError, refuse_unsafe_metadata
from megatron_tropd.writing import on_main, sharded_tensors

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

_TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"[0-9]{1,18}")
_NAMES = {"layernorm_epsilon": "norm_epsilon", "num_moe_experts": "num_experts"}
"""Fields of ModelConfig that Megatron-LM's command line calls otherwise."""
_FIXED = {
    "position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False, "apply_layernorm_1p": False,
    "squared_relu": False, "window_size": None,
}  # fmt: skip
"""Arguments that change what a model of the same shapes computes, and the one value each that this package builds."""
_PLAIN = (int, float, str, type(None))


def find_iteration(folder: Path) -> Path | None:
    """``iteration_in``, as rank 0 sees it; all ranks call this."""
    found: list[Path | None] = []
    on_main(lambda: found.append(iteration_in(folder)), dist.get_rank() == 0)
    return from_main(found[0] if found else None)


def iteration_in(folder: Path) -> Path | None:
    """The checkpoint in ``folder``, or that its tracker file names; None where Megatron-LM has written neither."""
    if (folder / DESCRIPTION).exists():
        return None
    tracker = folder / _TRACKER
    if tracker.exists():
        name = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if name != "release" and not _ITERATION.fullmatch(name):
            raise CheckpointError(f"{tracker} holds {name[:40]!r}, not an iteration; give the iter_N folder itself")
        return folder / (name if name == "release" else f"iter_{int(name):07d}")
    is_one = (folder / "metadata.json").exists() or any(folder.glob("mp_rank_*"))
    return folder if is_one else None


def load_megatron_lm(path: Path, model: GPTModel, config: ModelConfig, *, vocab_size: int, allow_legacy: bool) -> None:
    """Fill ``model`` from the checkpoint that ``find_iteration`` has found, whatever layout wrote it.

    All ranks call this. Raises CheckpointError on every one of them for another model, for what cannot be read without
    running code, and for a legacy checkpoint unless ``allow_legacy``.
    """
    is_main, state = dist.get_rank() == 0, {"model": model.sharded_state_dict()}
    on_main(lambda: check_arguments(path, config, allow_legacy=allow_legacy), is_main)
    if differences := _differing_tensors(path, state, vocab_size=vocab_size):
        raise CheckpointError(f"{path} is not of the model in the config: {'; '.join(differences[:10])}")
    failure = ""
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, ValueError) as error:
        failure = f"rank {dist.get_rank()}: {' '.join(str(error).split())[:500]}"
    failures = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise CheckpointError(f"{path} could not be read ({next(filter(None, failures))}); use another checkpoint")
    model.load_state_dict(loaded["model"])
    if is_main:
        logger.warning(
            "%s is Megatron-LM's: it has no manifest, so damage is not seen, and its tokenizer is not compared", path
        )


def check_arguments(path: Path, config: ModelConfig, *, allow_legacy: bool) -> None:
    """CheckpointError unless the arguments that Megatron-LM saved in ``path`` are of the model that ``config`` says.

    They are read without running any code that the files may hold; a legacy checkpoint only with ``allow_legacy``.
    Starts no process group and needs none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there, though {_TRACKER} beside it names it; give another iter_N folder")
    if next(path.glob("mp_rank_*"), None) is not None:
        raise CheckpointError(
            f"{path} is in Megatron-LM's old format, pickles of one layout (mp_rank_*), and is never read: convert it "
            "with Megatron-LM where you trust it (--ckpt-convert-format torch_dist)"
        )
    refuse_unsafe_metadata(path)
    common = _read_legacy(path, allow=allow_legacy) if (path / LEGACY_PICKLE).exists() else _read_common(path)
    arguments = common.get("args") if isinstance(common, Mapping) else None
    if not isinstance(arguments, Namespace):
        raise CheckpointError(f"{path} does not say of which model it is (no arguments of Megatron-LM in it)")
    if differences := differing_arguments(vars(arguments), config):
        raise CheckpointError(f"{path} is not of the model in the config: {'; '.join(differences)}")


def _read_legacy(path: Path, *, allow: bool) -> Any:
    file = path / LEGACY_PICKLE
    if not allow:
        raise CheckpointError(
            f"{file} is a pickle, as Megatron-Core before 0.19 wrote it, and reading a pickle can run code that "
            "somebody has put in: load and save the checkpoint with Megatron-Core 0.19 or newer or, where you trust "
            "all who could write to it, set training.allow_legacy_checkpoints=true"
        )
    logger.warning(
        "training.allow_legacy_checkpoints: reading the pickle %s. PyTorch's weights_only reader takes known harmless "
        "classes from it alone; such readers have had holes, so do this only with files that you trust, and save them "
        "with Megatron-Core 0.19 or newer to do without",
        file,
    )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything at all
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} is damaged, or holds what PyTorch does not read without running code ({reason}): load and save "
            "the checkpoint with the Megatron that wrote it, where you trust it"
        ) from error


def _read_common(path: Path) -> Any:
    with _damage_named(path):
        return load_common_state_dict(path)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """A CheckpointError, whatever the bytes do to their reader: no manifest vouches for them."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # a damaged pickle raises anything at all
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:300]})") from error


def differing_arguments(arguments: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What the arguments say of the model that is not what ``config`` says; what they leave out is not compared."""
    wanted = {_NAMES.get(name, name): value for name, value in architecture(config).items()} | _FIXED
    found = {name: value if isinstance(value, _PLAIN) else repr(value) for name, value in arguments.items()}
    # Megatron-LM keeps numbers of what is switched off.
    if not found.get("group_query_attention", True):
        found["num_query_groups"] = found.get("num_attention_heads")
    if not found.get("use_rope_scaling", True):
        found["rope_scaling_factor"] = None
    if config.num_moe_experts is None:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("moe_")}
    return [
        f"{name}: the checkpoint has {found[name]!r}, this run {value!r}"
        for name, value in wanted.items()
        if name in found and found[name] != value
    ]


def _differing_tensors(path: Path, state: ShardedStateDict, *, vocab_size: int) -> list[str]:
    """Names and shapes that one has and the other has not, over all ranks; the same list on each."""
    mine = {tensor.key: (tuple(tensor.global_shape), tensor.allow_shape_mismatch) for tensor in sharded_tensors(state)}
    shares: list[dict[str, tuple[tuple[int, ...], bool]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    ours = {key: entry for share in shares for key, entry in share.items()}
    found: list[dict[str, tuple[int, ...]]] = []
    on_main(lambda: found.append(_shapes_in(path, parts={key.split(".")[0] for key in ours})), dist.get_rank() == 0)
    theirs = from_main(found[0] if found else {})
    differences = [f"{key} is not in the checkpoint" for key in sorted(ours.keys() - theirs.keys())]
    differences += [f"{key} is in the checkpoint alone" for key in sorted(theirs.keys() - ours.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        shape, is_padded = ours[key]  # only vocabularies are padded
        rows_fit = theirs[key][1:] == shape[1:] and theirs[key][0] >= vocab_size
        if not (rows_fit if is_padded else theirs[key] == shape):
            wanted = f"{vocab_size} or more rows" if is_padded else f"{list(shape)}"
            differences.append(f"{key}: the checkpoint has {list(theirs[key])}, this run wants {wanted}")
    return differences


def _shapes_in(path: Path, *, parts: set[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in the checkpoint; optimizer states are left out."""
    with _damage_named(path):
        entries = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(entry.global_shape) for key, entry in entries.items() if key.split(".")[0] in parts}
