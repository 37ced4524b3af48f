"""What changed between the config that a checkpoint was written under and the one it is resumed with.

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tropd.config import Config
from megatron_tropd.procedural import SOURCES
from megatron_tropd.redaction import redacted

_LAYOUT = ("make_vocab_size_divisible_by", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_BOOKKEEPING = (
    "train_iters", "micro_batch_size", "output_head", "head_chunk_size", "recompute", "deterministic", "eval_interval",
    "eval_samples", "save_interval", "micro_batch_tokens", "sequence_packing", "async_save", "keep_checkpoints",
    "keep_every", "fall_back", "allow_config_changes", "max_log_prob_gap", "export_hf", "export_hf_on_save",
    "log_rollouts", "log_tokens", "log_tokens_interval", "target_accuracy", "allow_legacy_checkpoints",
)  # fmt: skip
MAY_CHANGE = frozenset(
    {
        "output_dir",
        "parallel",
        "optimizer",
        "guard",
        "evaluation",
        "guidance.answers_per_shard",
        "monitoring",
        "lora.export",
        "data.validation",
        "rollout.max_batch_size",
        "rollout.tensor_model_parallel_size",
        "rollout.refit_check_interval",
        "rollout.engine",
        "rollout.dynamic",
        "tasks.num_validation",
        "student.load",
        "student.init_method_std",
        *(f"{model}.{name}" for model in ("student", "teacher") for name in _LAYOUT),
        *(f"training.{name}" for name in _BOOKKEEPING),
    }
)
"""Fields, and whole sections, that a resumed run may have otherwise. Everything else makes it another experiment."""

FILES = ("data.train", "guidance.answers")
"""Fields that name input files: what counts is the content, wherever it lies."""

_INNER_SECTIONS = ("rollout.dynamic",)
"""Sections within sections; other mappings there are values."""

_MAPPINGS = ("teachers",)
"""Fields beside the sections whose keys are the user's: compared as a whole."""


class DriftError(ValueError):
    """A resumed run whose config is another experiment's."""


def snapshot(config: Config) -> dict[str, Any]:
    """The whole config as plain data without secrets, and the SHA-256 of the input files, read now, under ``files``.

    A file that is not there is left out: its command does not read it (``sft`` no teacher answers).
    """
    values = asdict(config)
    named = {name: value for name, value in _flat(values).items() if name in FILES and value is not None}
    hashes = {
        name: _content_hash(value)
        for name, value in named.items()
        if not isinstance(value, str) or (value not in SOURCES and Path(value).exists())
    }
    return redacted(values) | {"files": hashes}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Two ``snapshot``s as lines of a diff: (what may change, what may not).

    Fields that only one of the two versions of this package has are left out.
    """
    old, new = _flat(_filled_in(before)), _flat(_filled_in(after))
    old_files, new_files = before.get("files", {}), after.get("files", {})
    allowed: list[str] = []
    refused: list[str] = []
    for name in (name for name in new if name in old and not name.startswith("files.")):
        content = (
            f" (SHA-256 {old_files[name][:12]}, now {new_files[name][:12]})"
            if _other_file(name, old_files, new_files)
            else ""
        )
        if old[name] == new[name] and not content:
            continue
        line = f"{name}: the checkpoint has {old[name]!r}, this run {new[name]!r}{content}"
        same_file = name in old_files and name in new_files and not content
        may_change = not {name, *_sections_of(name)}.isdisjoint(MAY_CHANGE)
        (allowed if may_change or same_file else refused).append(line)
    return allowed, refused


def check_drift(before: Mapping[str, Any], after: Mapping[str, Any], *, allow: bool) -> list[str]:
    """The diff to show; DriftError where something changed that may not, unless ``allow``."""
    try:
        allowed, refused = compare(before, after)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DriftError(
            f"the config stored in the checkpoint is damaged ({error!r}); use another checkpoint"
        ) from error
    if refused and not allow:
        lines = [*(f"! {line}" for line in refused), *(f"  {line}" for line in allowed)]
        raise DriftError(
            "this is not the run that the checkpoint is of (! marks what may not change):\n"
            + "\n".join(lines)
            + "\nput the old values back, start in another output_dir, or set training.allow_config_changes=true"
        )
    return [*refused, *allowed]


def _other_file(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    return name in old and name in new and old[name] != new[name]


def _filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults that depend on other fields written out: a run may spell them out later."""
    result = dict(values)
    for name in ("student", "teacher"):
        if isinstance(model := result.get(name), dict):
            heads = model["num_attention_heads"]
            derived = {"num_query_groups": heads, "kv_channels": model["hidden_size"] // heads}
            result[name] = model | {key: model[key] or value for key, value in derived.items()}
    if result.get("lora", {}).get("base_is_teacher"):
        result["teacher"] = None  # it is the student, whose weights may lie elsewhere
    return result


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value  # as it comes back from a checkpoint's JSON
        if isinstance(value, dict) and (f"{prefix}{name}" in _INNER_SECTIONS if prefix else name not in _MAPPINGS):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def _sections_of(name: str) -> list[str]:
    """The sections that a field is in, outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _content_hash(value: str | Mapping[str, float]) -> str:
    """SHA-256 of a file, or one over the shards of a folder, or over the files of a mixture and its weights."""
    parts: list[tuple[str, str]]
    if not isinstance(value, str):
        parts = [
            (str(float(weight)), name if name in SOURCES else _content_hash(name)) for name, weight in value.items()
        ]
    elif Path(value).is_dir():
        parts = [(file.name, _sha256(file)) for file in sorted(Path(value).glob("*.jsonl"))]
    elif Path(value).suffix == ".idx":
        parts = [(suffix, _sha256(Path(value).with_suffix(suffix))) for suffix in (".bin", ".idx")]
    else:
        return _sha256(Path(value))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
