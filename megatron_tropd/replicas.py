"""Whether replicas still hold the same weights, and which rank is at fault where they do not.

Experts that are spread over ranks are compared among those that hold the same.

Shape suffixes: ``P`` tensors of this rank's slice, ``D`` ranks that hold the same weights.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from megatron_tropd.distributed import Layout
from megatron_tropd.hf_mapping import expert_name, is_expert

HASH_CHUNK = 2**22
_ODD = tuple(constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaMismatchError(ValueError):
    """Weights changed where nothing should change them, or differ between replicas; the optimizer has not moved."""


def fingerprint(module: torch.nn.Module) -> torch.Tensor:
    """``[P]`` int64: a hash of the bits of every parameter, in their order, computed where the weights are.

    The sum of SplitMix64's mix of each element's bits and place: whole numbers, so no order of summation matters.
    """
    return torch.stack([_hash(parameter.detach()) for parameter in module.parameters()])


def _hash(tensor: torch.Tensor) -> torch.Tensor:
    elements = tensor.contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, elements.numel(), HASH_CHUNK):
        chunk = elements[start : start + HASH_CHUNK]
        total += hash_elements(chunk, torch.arange(start, start + chunk.numel(), device=tensor.device))
    return total


def hash_elements(elements: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """int64 scalar: the sum over ``elements`` (contiguous) of a mix of each one's bits and its place, of equal shape.

    Sums of parts are the sum of the whole, wherever the cuts are. Needs scratch of some 8 bytes a time an element: take
    ``HASH_CHUNK`` of them at once.
    """
    mixed = elements.view(_BITS[elements.element_size()]).long() + (places + 1) * _ODD[0]
    mixed = (mixed ^ (mixed >> 30)) * _ODD[1]
    mixed = (mixed ^ (mixed >> 27)) * _ODD[2]
    return (mixed ^ (mixed >> 31)).sum()


class ReplicaCheck:
    """Compares weights every ``interval`` steps (0: never), after the backward and before the optimizer moves.

    Later would be too late: a sharded optimizer overwrites every replica with the shards of all, and a difference is
    healed or spread. Nothing writes weights between two updates, so a rank whose hash is not the one it had after the
    last update is at fault; that names it even among two replicas, or without any. Otherwise those in the minority are.
    """

    def __init__(self, interval: int, layout: Layout):
        self._interval = interval
        self._layout = layout
        self._updated_P: torch.Tensor | None = None

    def before_update(self, step: int, module: torch.nn.Module) -> None:
        """Raise ReplicaMismatchError on every rank where a rank's weights are not what they should be."""
        if not self.is_due(step):
            return
        found = self._own_fault(module)
        flag = torch.tensor(float(bool(found)), device=self._layout.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            return
        gathered: list[tuple[str, str]] = [("", "")] * self._layout.world_size
        dist.all_gather_object(gathered, found or ("", ""))
        changed = {rank: name for rank, (name, _) in enumerate(gathered) if name}
        differing = changed or {rank: name for rank, (_, name) in enumerate(gathered) if name}
        what = "changed since the last optimizer step" if changed else "are not those of the other replicas"
        ranks = ", ".join(f"rank {rank} (first in {name})" for rank, name in differing.items())
        raise ReplicaMismatchError(
            f"step {step}: the weights of {ranks} {what}. The optimizer has not moved and the last checkpoint is intact"
            ": suspect that machine's memory or device, take it out, and start again with the same command"
        )

    def after_update(self, step: int, module: torch.nn.Module) -> None:
        """Remember the weights that the next check has to find."""
        self._updated_P = fingerprint(module) if self.is_due(step + 1) else None

    def forget(self) -> None:
        """Weights have been loaded: the next check compares replicas alone."""
        self._updated_P = None

    def is_due(self, step: int) -> bool:
        """Whether that step begins with a check."""
        return bool(self._interval) and step % self._interval == 0

    def _own_fault(self, module: torch.nn.Module) -> tuple[str, str] | None:
        """(first tensor that changed, first one that is not the majority's) on this rank; "" for none."""
        names = [name for name, _ in module.named_parameters()]
        now_P = fingerprint(module)
        changed = "" if self._updated_P is None else _first_difference(names, now_P, self._updated_P)
        found = []
        for expert in (False, True):
            mine = [index for index, name in enumerate(names) if is_expert(expert_name(name)) is expert]
            if mine:
                group = self._layout.replica_group(is_expert=expert)
                found.append(_differing([names[index] for index in mine], now_P[mine], group))
        differing = next(filter(None, found), "")
        return (changed, differing) if changed or differing else None


def _differing(names: list[str], now_P: torch.Tensor, group: dist.ProcessGroup) -> str:
    """The first tensor whose hash is not that of the majority of ``group``; "" for none. All of the group call it."""
    gathered = [torch.empty_like(now_P) for _ in range(group.size())]
    dist.all_gather(gathered, now_P, group=group)
    hashes_D = [tuple(hashes.tolist()) for hashes in gathered]
    ((most, count), *others) = Counter(hashes_D).most_common()
    tie = any(other_count == count for _, other_count in others)
    wanted = next(hashes for hashes in hashes_D if hashes != tuple(now_P.tolist())) if tie and others else most
    return _first_difference(names, now_P, now_P.new_tensor(wanted))


def _first_difference(names: list[str], found_P: torch.Tensor, wanted_P: torch.Tensor) -> str:
    differing = (found_P != wanted_P).nonzero()
    return names[int(differing[0])] if len(differing) else ""
