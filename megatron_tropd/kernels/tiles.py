"""How a program walks over a row: the tile's shape, and the launch that fits it.

A tile is ``[STEPS, LANES, VECTOR]`` columns, the last two contiguous. Each lane is one thread that loads ``VECTOR``
columns with one 16-byte instruction, ``STEPS`` times before it computes, so that enough loads are under way. Reducing
over STEPS and VECTOR stays inside a thread; only the end of a row needs other threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOAD_BYTES = 16
_LOG2_E = tl.constexpr(1.4426950408889634)
NUM_WARPS = 4
LANES = 32 * NUM_WARPS


@triton.jit
def exponential(x):
    """exp(x) with a relative error of about 1e-7 (1 + |x|), in two instructions.

    Results below 1e-38 are 0 on a GPU: `tl.exp` spends three instructions more on those.
    """
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tile_columns(STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of the tile relative to its first, ``[STEPS, LANES, VECTOR]``."""
    steps = tl.arange(0, STEPS)[:, None, None] * (LANES * VECTOR)
    lanes = tl.arange(0, LANES)[None, :, None] * VECTOR
    return steps + lanes + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def row_start(logits, stride, row):
    """Pointer to the first column of a row; 64-bit, for T * V may exceed 2^31."""
    return logits + row.to(tl.int64) * stride


def tile_options(logits: torch.Tensor, steps: int) -> dict[str, int]:
    """The constants of `tile_columns` and the number of warps, for logits of this type."""
    vector = LOAD_BYTES // logits.element_size()
    return {"STEPS": steps, "LANES": LANES, "VECTOR": vector, "num_warps": NUM_WARPS}


def row_stride(logits_TV: torch.Tensor) -> int:
    """Elements from one row to the next; the columns of a row must be adjacent."""
    assert logits_TV.stride(1) == 1 or logits_TV.shape[1] == 1, f"columns are not adjacent: {logits_TV.stride()}"
    return logits_TV.stride(0)
