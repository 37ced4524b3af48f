"""Who holds which vocabulary id, and how a pass walks over rows.

Rank r of the group holds the global ids [r * width, (r + 1) * width) of a model; only ids below ``vocab_size`` exist
for the loss. Student and teacher may be padded to different widths, so their boundaries need not line up.

Shape suffixes: ``T`` tokens given to the loss, ``N`` rows of T that a pass works on, ``C`` rows of one chunk,
``V`` columns of a shard, ``P`` ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

# A chunk's temporaries stay below this many bytes per element of the whole shard (the bar for the peak is 0.25).
_WORK_BYTES_PER_ELEMENT = 0.15
# A chunk is never cut below this many elements (small shards: fewer launches), nor grows above that many (cache; on a
# GPU there is none to stay in).
_MIN_CHUNK_ELEMENTS = 2**15
_MAX_CHUNK_ELEMENTS, _MAX_CHUNK_ELEMENTS_CUDA = 2**20, 2**28


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks that share the vocabulary; no group means that the shard is the whole vocabulary."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def shard_ids(rank: int, width: int, vocab_size: int) -> range:
    """Global ids that rank ``rank`` holds; empty where the whole shard is padding."""
    return range(min(rank * width, vocab_size), min((rank + 1) * width, vocab_size))


def gather(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``[...]`` of every rank, stacked in rank order to ``[P, ...]``. One collective, none for nothing."""
    if group_size(group) == 1 or local.numel() == 0:
        return local.expand(group_size(group), *local.shape)
    gathered = local.new_empty(group_size(group), *local.shape)
    dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=group)
    return gathered


@dataclass(frozen=True)
class Chunk:
    """Some of the N rows of a pass: where they are in N, and which rows of T they are."""

    span: slice
    """Positions in N."""
    rows: slice | torch.Tensor
    """Rows of T: a slice where they are consecutive (no gather needed), else their indices."""

    @property
    def num_rows(self) -> int:
        """How many."""
        return int(self.span.stop - self.span.start)


def chunks(rows_N: torch.Tensor, logits_TV: torch.Tensor, bytes_per_element: int) -> Iterator[Chunk]:
    """Cut ascending ``rows_N`` so that ``bytes_per_element`` of temporaries per element meet the memory bar."""
    num_tokens, width = logits_TV.shape
    size = max(int(num_tokens * _WORK_BYTES_PER_ELEMENT / bytes_per_element), _MIN_CHUNK_ELEMENTS // width)
    most = _MAX_CHUNK_ELEMENTS_CUDA if logits_TV.is_cuda else _MAX_CHUNK_ELEMENTS
    size = max(min(size, most // width), 1)
    num_rows = rows_N.shape[0]
    # On a GPU the host would have to wait for the rows: it gathers them instead.
    rows = None if rows_N.is_cuda else rows_N.tolist()
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        consecutive = rows is not None and rows[stop - 1] - rows[start] == stop - 1 - start
        where = slice(rows[start], rows[stop - 1] + 1) if consecutive and rows is not None else rows_N[start:stop]
        yield Chunk(slice(start, stop), where)


def read(logits_TV: torch.Tensor, chunk: Chunk, num_valid: int) -> torch.Tensor:
    """The chunk's logits as a fresh fp32 ``[C, num_valid]``, free to be overwritten."""
    # copy=True: a plain .float() aliases logits that are fp32 already, and the passes work in place.
    return logits_TV[chunk.rows, :num_valid].to(torch.float32, copy=True)


def columns_of(ids: torch.Tensor, held: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each global id in the shard that holds ``held``, and whether it is held; 0 where it is not."""
    owned = (ids >= held.start) & (ids < held.stop)
    return (ids - held.start).where(owned, 0), owned


@dataclass(frozen=True)
class TeacherColumns:
    """The teacher's logits at the ids of this rank's *student* shard, left where they are until a chunk is read."""

    logits_TV: torch.Tensor
    """This rank's own shard of the teacher."""
    own: tuple[int, int, int]
    """(first student column, first teacher column, count) of the ids that this rank holds of both models."""
    slivers: tuple[tuple[int, torch.Tensor], ...]
    """(first student column, ``[N, count]`` logits) received from each neighbour across a misaligned boundary."""
    num_valid: int
    """Columns of the student's shard that exist."""

    def select(self, rows_O: torch.Tensor) -> TeacherColumns:
        """The same for some of the N rows (positions in N): what a second pass over fewer rows reads."""
        return replace(self, slivers=tuple((to, sliver_NV[rows_O]) for to, sliver_NV in self.slivers))

    def read(self, chunk: Chunk) -> torch.Tensor:
        """A fresh fp32 ``[C, num_valid]`` in the student's layout; ``chunk`` must cut the N rows of `align_teacher`."""
        aligned_CV = self.logits_TV.new_empty(chunk.num_rows, self.num_valid, dtype=torch.float32)
        to, source, count = self.own
        aligned_CV[:, to : to + count] = self.logits_TV[chunk.rows, source : source + count]
        for to, sliver_NV in self.slivers:
            aligned_CV[:, to : to + sliver_NV.shape[1]] = sliver_NV[chunk.span]
        return aligned_CV


def align_teacher(
    teacher_logits_TV: torch.Tensor,
    student_width: int,
    rows_N: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> TeacherColumns:
    """The teacher at the student's ids, for the rows ``rows_N`` (the same on every rank).

    Whatever needs both models at one id (exact divergences, top-k) works in the student's layout, because the gradient
    lives there. Only ids whose two owners differ travel, point to point and once (one all-to-all of ``[N, sliver]`` in
    the teacher's dtype); with aligned boundaries nothing does.
    """
    size, rank = group_size(group), group_rank(group)
    student = [shard_ids(r, student_width, vocab_size) for r in range(size)]
    teacher = [shard_ids(r, teacher_logits_TV.shape[1], vocab_size) for r in range(size)]
    both = _overlap(student[rank], teacher[rank])
    slivers: tuple[tuple[int, torch.Tensor], ...] = ()
    if student != teacher and rows_N.numel():
        sent = [_overlap(student[r], teacher[rank]) if r != rank else range(0) for r in range(size)]
        wanted = [_overlap(student[rank], teacher[r]) if r != rank else range(0) for r in range(size)]
        pieces = _exchange(teacher_logits_TV, rows_N, teacher[rank].start, sent, wanted, group)
        slivers = tuple(
            (ids.start - student[rank].start, piece) for ids, piece in zip(wanted, pieces, strict=False) if ids
        )
    own = (both.start - student[rank].start, both.start - teacher[rank].start, len(both)) if both else (0, 0, 0)
    return TeacherColumns(teacher_logits_TV, own, slivers, len(student[rank]))


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _exchange(
    logits_TV: torch.Tensor,
    rows_N: torch.Tensor,
    first_id: int,
    sent: list[range],
    wanted: list[range],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """One all-to-all of column ranges: ``sent[r]`` of ours to rank r, ``wanted[r]`` from it, each ``[N, count]``."""
    num_rows = rows_N.shape[0]
    outgoing = [logits_TV[rows_N, ids.start - first_id : ids.stop - first_id].flatten() for ids in sent if ids]
    counts_in, counts_out = [num_rows * len(ids) for ids in wanted], [num_rows * len(ids) for ids in sent]
    received = logits_TV.new_empty(sum(counts_in))
    dist.all_to_all_single(received, torch.cat([logits_TV.new_empty(0), *outgoing]), counts_in, counts_out, group=group)
    return [piece.view(num_rows, len(ids)) for piece, ids in zip(received.split(counts_in), wanted, strict=False)]
