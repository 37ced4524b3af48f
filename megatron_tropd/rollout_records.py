"""Rollouts as a checkpoint keeps them: plain data, a JSON object each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from megatron_tropd.integrity import CheckpointError
from megatron_tropd.jsonl import DataError, read_objects
from megatron_tropd.types import Rollout, RolloutRequest


def record_of(rollout: Rollout) -> dict[str, Any]:
    """All but the prompt, which the data has; every token with its weights' version."""
    return {
        "sample_id": rollout.request.sample_id,
        "prefix": rollout.request.prefix,
        "response": rollout.response,
        "log_probs": rollout.log_probs,
        "entropies": rollout.entropies,
        "versions": runs(rollout.versions),
        "finished": rollout.finished,
    }


def read_record(record: dict[str, Any], request: Callable[[int, Sequence[int]], RolloutRequest]) -> Rollout:
    """What ``record_of`` made the record of; ``request`` gives that of a sample id and its prefix.

    Raises ValueError, TypeError or LookupError for anything else.
    """
    sample_id, response = integer(record["sample_id"]), tuple(map(integer, record["response"]))
    log_probs, entropies = tuple(map(float, record["log_probs"])), tuple(map(float, record["entropies"]))
    counted = [(integer(version), integer(count)) for version, count in record["versions"]]
    num_versions = sum(count for _, count in counted)
    if {len(log_probs), len(entropies) or len(response), num_versions or len(response)} != {len(response)}:
        raise ValueError(f"sample {sample_id}: not one value for each token")
    versions = tuple(chain.from_iterable([version] * count for version, count in counted))
    if not isinstance(finished := record["finished"], bool):
        raise ValueError(f"sample {sample_id}: finished is {finished!r}")
    prefix = tuple(map(integer, record["prefix"]))
    return Rollout(request(sample_id, prefix), response, log_probs, finished, entropies, versions)


def read_kept[Kept](path: Path, read: Callable[[dict[str, Any], list[dict[str, Any]]], Kept]) -> Kept | None:
    """What ``read`` makes of a checkpoint's file of records, from its first line and the others; None without the file.

    Raises CheckpointError where the lines are not what ``read`` can take.
    """
    if not path.exists():
        return None
    try:
        head, *records = (line for _, line in read_objects(path))
        return read(head, records)
    except (DataError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); continue from another checkpoint: write its name into `latest`"
        ) from error


def runs(versions: Sequence[int]) -> list[list[int]]:
    """[version, how many tokens] for each run of equal versions."""
    return [[version, len(list(run))] for version, run in groupby(versions)]


def integer(value: Any) -> int:
    """``value``, if it is a count or an id; ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count or id")
    return value
