"""The teacher's exact top-k over vocabulary shards, with the student's logits there.

The order is total: value descending, then id ascending. Low-precision logits tie at the k-th value often, and without
the second criterion the chosen ids would depend on how many ranks share the vocabulary.

Shape suffixes: ``T`` tokens, ``O`` rows whose top-k is needed, ``C`` rows of one chunk, ``V`` vocabulary shard,
``M`` candidates of a row, ``B`` blocks of ``W`` columns,
``K`` top-k, ``P`` ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tropd.kernels.backend import chosen_backend
from megatron_tropd.vocab_parallel.shards import Chunk, TeacherColumns, chunks, columns_of, gather, group_size

_LOW = 0xFFFFFFFF
_NO_KEY = torch.iinfo(torch.int64).min
# The merge unpacks every rank's candidates: a few rows at a time keeps that small beside what was gathered. On a GPU,
# whose host has to launch each piece, larger ones.
_MERGE_ROWS, _MERGE_ROWS_CUDA = 256, 4096


@dataclass(frozen=True)
class TopK:
    """The teacher's top-k in the total order; logits in fp32, the same bits on every rank."""

    ids_OK: torch.Tensor
    """int32 global ids."""
    teacher_logits_OK: torch.Tensor
    student_logits_OK: torch.Tensor


def global_top_k(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_O: torch.Tensor,
    held: range,
    top_k: int,
    group: dist.ProcessGroup | None,
) -> TopK:
    """The ``top_k`` largest teacher logits of each row over the ids of all ranks. One collective, 12 B a candidate.

    ``held`` are the ids of the student's shard and ``teacher`` is aligned to it for exactly ``rows_O``. ``top_k`` must
    not exceed the ids of all ranks together; one rank may hold fewer.
    """
    keys_OK = local_top_k(teacher, student_logits_TV, rows_O, held, top_k)
    columns_OK, owned_OK = columns_of(_ids(keys_OK), held)
    student_OK = student_logits_TV[rows_O[:, None], columns_OK].float().where(owned_OK, 0)
    if group_size(group) > 1:
        # One int32 tensor [O, 3 K]: keys (two words each), then the student's logits.
        candidates_PO = gather(torch.cat((keys_OK.view(torch.int32), student_OK.view(torch.int32)), -1), group)
        size = _MERGE_ROWS_CUDA if candidates_PO.is_cuda else _MERGE_ROWS
        pieces = [_merge(piece_PO, top_k) for piece_PO in candidates_PO.split(size, dim=1)]
        keys_OK, student_OK = (torch.cat(parts) for parts in zip(*pieces, strict=False))
    return TopK(_ids(keys_OK).int(), _values(keys_OK), student_OK)


def _merge(candidates_PO: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best keys of all ranks, largest first, and the student's logits that came with them."""
    # clone, not contiguous(): that leaves the odd stride of a single row as it is, which view(int64) refuses.
    words_PO = candidates_PO[..., : 2 * top_k].clone(memory_format=torch.contiguous_format)
    keys_OM = words_PO.view(torch.int64).movedim(0, 1).flatten(1)
    student_OM = candidates_PO[..., 2 * top_k :].contiguous().view(torch.float32).movedim(0, 1).flatten(1)
    keys_OK, order_OK = keys_OM.topk(top_k, dim=-1)
    return keys_OK, student_OM.gather(1, order_OK)


def local_top_k(
    teacher: TeacherColumns, logits_TV: torch.Tensor, rows_O: torch.Tensor, held: range, top_k: int
) -> torch.Tensor:
    """This shard's best ``top_k`` candidates of each row as int64 keys ``[O, K]``, largest first.

    A key orders like (value descending, id ascending) and holds both. Ranks with fewer ids fill up with the smallest
    key there is. ``logits_TV`` only gives the size of a chunk.
    """
    keys_OK = torch.full((rows_O.shape[0], top_k), _NO_KEY, dtype=torch.int64, device=rows_O.device)
    count = min(top_k, len(held))
    if not count:
        return keys_OK
    if chosen_backend(logits_TV) == "triton":
        # Temporaries are those of blocks, of 16 columns or more: a byte for each logit or less.
        for chunk in chunks(rows_O, logits_TV, bytes_per_element=1):
            keys_OK[chunk.span, :count] = _best_keys_in_place(teacher, chunk, rows_O[chunk.span], held.start, count)
        return keys_OK
    for chunk in chunks(rows_O, logits_TV, bytes_per_element=8):
        keys_OK[chunk.span, :count] = _best_keys(teacher.read(chunk), held.start, count)
    return keys_OK


def _best_keys_in_place(
    teacher: TeacherColumns, chunk: Chunk, rows_C: torch.Tensor, first_id: int, count: int
) -> torch.Tensor:
    """`_best_keys` without a copy of the teacher's logits: peaks of blocks by a kernel, then entries one by one.

    Received columns and those beside whole blocks are few: all of them are candidates.
    """
    from megatron_tropd.kernels.block_peaks import block_peaks  # imports Triton

    to, source, num_columns = teacher.own
    own_TV, first_own = teacher.logits_TV[:, source : source + num_columns], first_id + to
    width = _block_width(max(num_columns, 1), count)
    num_blocks = num_columns // width
    parts, done = [], 0
    if num_blocks > count:
        done = num_blocks * width
        peaks_CB = _keys(block_peaks(own_TV, rows_C, num_blocks, width), _positions(num_blocks, rows_C))
        chosen_CK1 = _ids(peaks_CB.topk(count, dim=-1, sorted=False).values)[..., None]
        columns_CM = (chosen_CK1 * width + _positions(width, rows_C)).flatten(1)
        parts.append(_keys(own_TV[rows_C[:, None], columns_CM].float(), columns_CM + first_own))
    if done < num_columns:
        columns = _positions(num_columns - done, rows_C) + done
        parts.append(_keys(own_TV[rows_C[:, None], columns].float(), columns + first_own))
    for start, sliver_NV in teacher.slivers:
        ids = _positions(sliver_NV.shape[1], rows_C) + (first_id + start)
        parts.append(_keys(sliver_NV[chunk.span].float(), ids))
    return torch.cat(parts, -1).topk(count, dim=-1).values


def _best_keys(logits_CV: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """The largest ``count`` keys of each row, ``[C, count]``, largest first.

    Keys for the whole row would cost several passes over 8-byte words. But the best ``count`` entries lie in the best
    ``count`` blocks of columns, in the order of (largest value, block): each of those holds an entry that precedes
    every entry of every other block, ties included. No size here depends on the values: the host never waits.
    """
    num_columns, width = logits_CV.shape[1], _block_width(logits_CV.shape[1], count)
    num_blocks, rest = divmod(num_columns, width)
    if num_blocks <= count:
        return _keys(logits_CV, _positions(num_columns, logits_CV) + first_id).topk(count, dim=-1).values
    blocks_CBW = logits_CV[:, : num_blocks * width].unflatten(1, (num_blocks, width))
    peaks_CB = _keys(blocks_CBW.amax(-1), _positions(num_blocks, logits_CV))
    chosen_CK1 = _ids(peaks_CB.topk(count, dim=-1, sorted=False).values)[..., None]
    values_CKW = blocks_CBW.gather(1, chosen_CK1.expand(-1, -1, width))
    columns_CKW = chosen_CK1 * width + _positions(width, logits_CV)
    keys_CM = _keys(values_CKW, columns_CKW + first_id).flatten(1)
    if rest:
        columns = _positions(rest, logits_CV) + (num_columns - rest)
        keys_CM = torch.cat((keys_CM, _keys(logits_CV[:, num_columns - rest :], columns + first_id)), -1)
    return keys_CM.topk(count, dim=-1).values


def _block_width(num_columns: int, count: int) -> int:
    """A power of two near the width that makes the blocks as many as the entries of ``count`` of them."""
    return 2 ** max(3, round(math.log2(num_columns / count) / 2))


def _positions(size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(size, device=like.device)


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64: the fp32 value as an order-preserving integer in the high word, the id's complement in the low word."""
    # -0.0 + 0.0 is 0.0: equal values must have equal bits.
    return (_sortable((values + 0.0).view(torch.int32)).long() << 32) | (_LOW - ids)


def _sortable(bits: torch.Tensor) -> torch.Tensor:
    """fp32 bits to an int32 of the same order, and back: negative floats have their magnitude bits flipped."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    return _LOW - (keys & _LOW)


def _values(keys: torch.Tensor) -> torch.Tensor:
    return _sortable((keys >> 32).int()).view(torch.float32)
