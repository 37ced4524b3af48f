"""Micro-batches rearranged: sequences packed behind one another, and the part of one context-parallel rank.

What a position holds does not change, only where it stands; every field of a ``MicroBatch`` whose name ends with
``_BS`` or ``_N`` follows.

Shape suffixes: ``B`` sequences of a micro-batch, ``S`` positions, ``P`` all positions in one row, ``N`` positions that
carry loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from megatron_tropd.types import MicroBatch


def pack(batch: MicroBatch, lengths: Sequence[int], teacher_lengths: Sequence[int] | None) -> MicroBatch:
    """The first ``lengths[b]`` positions of each row b behind one another in one row; what is left out is padding.

    ``teacher_lengths``: the same of ``teacher_tokens_BS``, where there is one. A last row without positions is dropped.
    """
    num_positions = batch.tokens_BS.shape[1]
    packed = _rearranged(batch, _packed_positions(lengths, num_positions), (1, -1))
    num_rows = len(lengths) if lengths[-1] else len(lengths) - 1
    changes: dict[str, Any] = {
        "packed_lengths": tuple(lengths[:num_rows]),
        "sample_ids": batch.sample_ids[:num_rows],
    }
    if batch.teacher_tokens_BS is not None and batch.teacher_positions_N is not None:
        assert teacher_lengths is not None
        kept_P = _packed_positions(teacher_lengths, batch.teacher_tokens_BS.shape[1])
        changes |= {
            "teacher_tokens_BS": batch.teacher_tokens_BS.flatten()[kept_P].view(1, -1),
            "teacher_positions_N": _moved(batch.teacher_positions_N, kept_P, batch.teacher_tokens_BS.numel()),
            "teacher_packed_lengths": tuple(length for length in teacher_lengths if length),
        }
    return replace(packed, **changes)


def context_parallel_part(batch: MicroBatch, *, rank: int, size: int) -> MicroBatch:
    """The positions of one of ``size`` context-parallel ranks: of every sequence, cut into 2 x ``size`` chunks, the
    ``rank``-th from the front and the ``rank``-th from the back, so that causal attention costs every rank the same.

    Lengths must be multiples of 2 x ``size``. The first rank counts the loss terms for all. As Megatron cuts a batch
    (``get_batch_on_this_cp_rank``), and with ``packed_lengths``, which stay those of whole sequences, as
    TransformerEngine does.
    """
    if size == 1:
        return batch
    kept_P = _part_positions(batch.tokens_BS, batch.packed_lengths, rank, size)
    mine = _rearranged(batch, kept_P, (batch.tokens_BS.shape[0], -1))
    return replace(mine, num_loss_terms=batch.num_loss_terms if rank == 0 else 0)


def part_of_inputs(
    tokens_BS: torch.Tensor, positions_N: torch.Tensor, packed_lengths: Sequence[int] | None, *, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`context_parallel_part` of tokens, and of positions in the flattened ``[B * S]``, alone."""
    kept_P = _part_positions(tokens_BS, packed_lengths, rank, size)
    moved_N = _moved(positions_N, kept_P, tokens_BS.numel())
    return tokens_BS.flatten()[kept_P].view(tokens_BS.shape[0], -1), moved_N[moved_N >= 0]


def _part_positions(
    tokens_BS: torch.Tensor, packed_lengths: Sequence[int] | None, rank: int, size: int
) -> torch.Tensor:
    num_rows, num_positions = tokens_BS.shape
    kept, first = [], 0
    for length in packed_lengths or (num_positions,) * num_rows:
        chunks = torch.arange(first, first + length).chunk(2 * size)
        kept += [chunks[rank], chunks[-1 - rank]]
        first += length
    return torch.cat(kept)


def _packed_positions(lengths: Sequence[int], num_positions: int) -> torch.Tensor:
    """int64: the first positions of each row, in the flattened ``[B * S]``."""
    return torch.cat([torch.arange(length) + row * num_positions for row, length in enumerate(lengths)])


def _rearranged(batch: MicroBatch, kept_P: torch.Tensor, shape: tuple[int, int]) -> MicroBatch:
    """Only the positions ``kept_P`` (ascending, in the flattened ``[B * S]``), as rows of ``shape``."""
    moved_N = _moved(batch.loss_positions_N, kept_P, batch.tokens_BS.numel())
    mine_N = moved_N >= 0
    kept_P = kept_P.to(batch.tokens_BS.device)
    changes: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is None or field.name.startswith("teacher_"):
            continue
        if field.name.endswith("_BS"):
            changes[field.name] = value.flatten()[kept_P].view(shape)
        elif field.name.endswith("_N"):
            changes[field.name] = value[mine_N]
    changes["loss_positions_N"] = moved_N[mine_N]
    return replace(batch, **changes)


def _moved(positions_N: torch.Tensor, kept_P: torch.Tensor, size: int) -> torch.Tensor:
    """Where positions stand once only ``kept_P`` of ``size`` are left; -1 for those that are not."""
    new_P = torch.full((size,), -1, dtype=torch.long)
    new_P[kept_P] = torch.arange(len(kept_P))
    return new_P.to(positions_N.device)[positions_N]
