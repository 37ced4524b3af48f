"""Triton twin of `paged_attention.attend_one_token`: the decoding step of a paged KV cache, with no copy of its pages.

One program for each request and key/value head: it walks over the request's tokens, looks up where each lies, and keeps
an online softmax for the query heads that share these keys. It reads what the request has, not what the longest has, so
that nothing about a launch depends on the lengths: a CUDA graph replays it. Softmax and sums are fp32.

Shape suffixes: ``R`` requests, ``N`` pages of a request, ``P`` pages of the buffer, ``L`` tokens of a page, ``H`` query
heads, ``G`` key/value heads, ``D`` width of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 64
"""Tokens of one turn of the loop."""
_LEAST_ROWS = 16
"""Rows of a matrix product, at least."""


@triton.jit
def _attend_one_token(
    query, keys, values, table, lengths, out, scale,
    query_stride, out_stride, table_stride, page_stride, token_stride, head_stride, page_tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + request)
    heads = tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside_head = columns[None, :] < WIDTH
    # [heads, width]: the heads of this group, whose rows follow one another.
    at = (group * HEADS + heads)[:, None] * WIDTH + columns[None, :]
    is_head = (heads[:, None] < HEADS) & inside_head
    q = tl.load(query + request * query_stride + at, mask=is_head, other=0.0)
    peak = tl.full([BLOCK_HEADS], -1e30, tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    sums = tl.zeros([BLOCK_HEADS, BLOCK_WIDTH], tl.float32)
    for start in range(0, length, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        exists = tokens < length
        page = tl.load(table + request * table_stride + tokens // page_tokens, mask=exists, other=0).to(tl.int64)
        row = page * page_stride + (tokens % page_tokens) * token_stride + group * head_stride
        where = row[:, None] + columns[None, :]
        is_token = exists[:, None] & inside_head
        k = tl.load(keys + where, mask=is_token, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        v = tl.load(values + where, mask=is_token, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = new_peak
    attended = sums / tl.where(total > 0, total, 1.0)[:, None]  # no tokens: a row of padding
    tl.store(out + request * out_stride + at, attended.to(out.dtype.element_ty), mask=is_head)


def attend_one_token(
    query_RHD: torch.Tensor,
    key_pages_PLGD: torch.Tensor,
    value_pages_PLGD: torch.Tensor,
    block_table_RN: torch.Tensor,
    kv_lengths_R: torch.Tensor,
) -> torch.Tensor:
    """``[R, H, D]``, as the twin, but for rows of padding (a length of 0), which are 0."""
    num_requests, num_heads, width = query_RHD.shape
    _, page_tokens, groups, _ = key_pages_PLGD.shape
    query_RHD = query_RHD.contiguous()
    out_RHD = torch.empty_like(query_RHD)
    assert key_pages_PLGD.stride() == value_pages_PLGD.stride() and key_pages_PLGD.stride(3) == 1
    page_stride, token_stride, head_stride, _ = key_pages_PLGD.stride()
    heads = num_heads // groups
    _attend_one_token[num_requests, groups](
        query_RHD, key_pages_PLGD, value_pages_PLGD, block_table_RN, kv_lengths_R, out_RHD, width**-0.5,
        query_RHD.stride(0), out_RHD.stride(0), block_table_RN.stride(0), page_stride, token_stride, head_stride,
        page_tokens,
        HEADS=heads,
        WIDTH=width,
        BLOCK_HEADS=max(triton.next_power_of_2(heads), _LEAST_ROWS),
        BLOCK_WIDTH=max(triton.next_power_of_2(width), _LEAST_ROWS),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )  # fmt: skip
    return out_RHD
