"""The largest logit of every block of columns, in Triton: what narrows a top-k down to a few blocks.

Shape suffixes: ``T`` tokens, ``C`` rows of T that take part, ``V`` columns, ``B`` blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.tiles import row_start, row_stride

_TILE_COLUMNS, _NUM_WARPS = 2048, 4


@triton.jit
def _block_peaks(logits, stride, rows, num_blocks, peaks, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    c = tl.program_id(0)
    row = row_start(logits, stride, tl.load(rows + c))
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(row + columns, mask=blocks[:, None] < num_blocks, other=0.0).to(tl.float32)
    tl.store(peaks + c.to(tl.int64) * num_blocks + blocks, tl.max(x, 1), mask=blocks < num_blocks)


def block_peaks(logits_TV: torch.Tensor, rows_C: torch.Tensor, num_blocks: int, width: int) -> torch.Tensor:
    """fp32 ``[C, B]``: of the first ``num_blocks`` blocks of ``width`` columns (a power of two). Nothing may be nan."""
    peaks_CB = torch.empty(rows_C.shape[0], num_blocks, dtype=torch.float32, device=logits_TV.device)
    blocks = max(1, _TILE_COLUMNS // width)
    if rows_C.numel():
        _block_peaks[rows_C.shape[0], triton.cdiv(num_blocks, blocks)](
            logits_TV, row_stride(logits_TV), rows_C, num_blocks, peaks_CB,
            BLOCKS=blocks, WIDTH=width, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return peaks_CB
