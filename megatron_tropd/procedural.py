"""Tasks of ``reasoning-gym`` (optional extra ``tasks``): endless verifiable prompts, a function of (seed, index).

Imports no torch. The held-out tasks are the first of the sequence with different questions; training tasks follow, and
none asks what a held-out one asks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from megatron_tropd.jsonl import DataError

Split = Literal["train", "validation"]
SOURCES: dict[str, Split] = {"reasoning-gym:train": "train", "reasoning-gym:validation": "validation"}
"""What stands in the config instead of a path."""

_SIZE = 2**20
"""Length of a task's sequence as reasoning-gym is told; items are made one at a time."""


@dataclass(frozen=True)
class ProceduralTask:
    """One task."""

    name: str
    """reasoning-gym's name of the kind of task."""
    index: int
    """Its place in that kind's sequence: with the seed and the options, all that it depends on."""
    question: str
    answer: str
    solution: str
    """Steps that end in ``#### answer``, "" where the task's kind has none."""


def make_tasks(
    kinds: Mapping[str, Mapping[str, Any]],
    split: Split,
    *,
    seed: int,
    level: int | None,
    num_train: int,
    num_validation: int,
) -> list[ProceduralTask]:
    """The tasks of one split, kinds in turn; ``kinds`` maps each name to its options.

    ``level`` is the difficulty of reasoning-gym's curriculum, 0 being the easiest (None: the defaults of each task);
    options come on top. Raises DataError where a kind or an option is unknown, or there are not enough different
    questions.
    """
    tasks = _sequence(kinds, seed, level)
    held_out: dict[str, ProceduralTask] = {}
    for attempts, task in enumerate(tasks):
        held_out.setdefault(task.question, task)
        if len(held_out) == num_validation:
            break
        _refuse_repetition(attempts, len(held_out), num_validation, "held-out")
    if split == "validation":
        return list(held_out.values())
    chosen: list[ProceduralTask] = []
    for attempts, task in enumerate(tasks):
        if task.question not in held_out:
            chosen.append(task)
        if len(chosen) == num_train:
            break
        _refuse_repetition(attempts, len(chosen), num_train, "training")
    return chosen


def _refuse_repetition(attempts: int, found: int, wanted: int, what: str) -> None:
    if attempts > 20 * wanted + 1000:
        raise DataError(
            f"tasks: only {found} of {wanted} {what} tasks found that differ from the held-out ones in {attempts} "
            "draws: raise the difficulty (tasks.level or the task's options) or lower tasks.num_validation"
        )


def _sequence(kinds: Mapping[str, Mapping[str, Any]], seed: int, level: int | None) -> Iterator[ProceduralTask]:
    datasets = {name: build_dataset(name, options, seed, level) for name, options in kinds.items()}
    for index in range(_SIZE):
        for name, dataset in datasets.items():
            entry = dataset[index]
            answer = str(entry["answer"])
            yield ProceduralTask(name, index, entry["question"], answer, _solution(name, entry, answer))


def build_dataset(name: str, options: Mapping[str, Any], seed: int, level: int | None) -> Any:
    """reasoning-gym's dataset of one kind. Raises DataError for an unknown kind or option."""
    try:
        from reasoning_gym.factory import CURRICULA, DATASETS
    except ImportError as error:
        raise DataError(
            f"tasks of reasoning-gym need a package: pip install megatron-tropd[tasks] ({error})"
        ) from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise DataError(f"tasks.kinds: reasoning-gym has no task {name!r}; did you mean {near!r}?")
    dataset_class, config_class = DATASETS[name]
    values = {"seed": seed, "size": _SIZE}
    try:
        if level is None:
            config = config_class(**values, **options)
        else:
            if name not in CURRICULA:
                raise DataError(f"tasks.level: {name} has no levels in reasoning-gym: give it options instead")
            curriculum = CURRICULA[name]()
            for attribute in curriculum.attributes.values():
                curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
            config = replace(curriculum.generate_configuration(values), **options)
        return dataset_class(config=config)
    except (TypeError, AssertionError) as error:
        raise DataError(f"tasks.kinds.{name}: reasoning-gym refuses {dict(options)}: {error}") from error


@lru_cache(maxsize=64)
def cached_dataset(name: str, options: tuple[tuple[str, Any], ...], seed: int, level: int | None) -> Any:
    """``build_dataset`` once for each combination."""
    return build_dataset(name, dict(options), seed, level)


# ------------------------------------------------------------------------------------------------ worked solutions


def _solution(name: str, entry: Mapping[str, Any], answer: str) -> str:
    if name in SCRATCHPADS:
        return f"{SCRATCHPADS[name](entry['metadata'])}\n#### {answer}"
    return str(entry["metadata"].get("answer_cot", ""))  # gsm_symbolic's own, which ends in #### too


def _running_total(metadata: Mapping[str, Any]) -> str:
    """4 - 1 + 7 as ``4-1=3``, ``3+7=10``."""
    first, *rest = re.findall(r"[-+]?\s*\d+", metadata["expression"])
    total, lines = int(first.replace(" ", "")), []
    for term in rest:
        sign, number = term[0], int(term[1:])
        following = total + number if sign == "+" else total - number
        lines.append(f"{total}{sign}{number}={following}")
        total = following
    return "\n".join(lines)


def _euclid(metadata: Mapping[str, Any]) -> str:
    """gcd(12, 18) as ``12%18=12``, ``18%12=6``, ``12%6=0``; further numbers follow one after the other."""
    a, *rest = metadata["numbers"]
    lines = []
    for b in rest:
        while b:
            lines.append(f"{a}%{b}={a % b}")
            a, b = b, a % b
    return "\n".join(lines)


SCRATCHPADS: dict[str, Callable[[Mapping[str, Any]], str]] = {"chain_sum": _running_total, "gcd": _euclid}
"""Kinds whose steps are written out here, from the task's metadata."""
