"""Attention over pages, in torch and in Triton: against dense float64 for every request on its own."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tropd.kernels.backend import BACKEND_VARIABLE

REPOSITORY = Path(__file__).resolve().parent.parent
LENGTHS = (1, 5, 64, 0, 131, 64)
"""Tokens of each request; a row of padding among them."""
WIDTHS = ((4, 2, 8, 16), (7, 1, 3, 80), (6, 3, 1, 64), (2, 2, 16, 128))
"""(query heads, key/value heads, tokens of a page, width of a head)."""


@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of requests, scattered over a buffer whose other pages hold garbage."""

    query_RHD: torch.Tensor
    key_pages_PLGD: torch.Tensor
    value_pages_PLGD: torch.Tensor
    block_table_RN: torch.Tensor
    kv_lengths_R: torch.Tensor


def make_pages(heads: int, groups: int, page_tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Pages:
    generator = torch.Generator().manual_seed(heads * width)
    num_pages = [math.ceil(length / page_tokens) for length in LENGTHS]
    places = torch.randperm(2 * sum(num_pages), generator=generator)
    table_RN = torch.full((len(LENGTHS), max(num_pages) + 2), -1, dtype=torch.int32)
    for row, count in enumerate(num_pages):
        table_RN[row, :count], places = places[:count], places[count:]
    shape = 2, 2 * sum(num_pages), page_tokens, groups, width
    keys, values = torch.randn(shape, generator=generator).to(device, dtype)
    query_RHD = torch.randn(len(LENGTHS), heads, width, generator=generator).to(device, dtype)
    return Pages(query_RHD, keys, values, table_RN.to(device), torch.tensor(LENGTHS, dtype=torch.int32, device=device))


def exact(pages: Pages, row: int, num_queries: int = 1, query_QHD: torch.Tensor | None = None) -> torch.Tensor:
    """``[Q, H, D]`` in float64: the last ``num_queries`` tokens of one request, each over all up to itself."""
    length = LENGTHS[row]
    at = torch.arange(length, device=pages.query_RHD.device)
    page_tokens = pages.key_pages_PLGD.shape[1]
    places = pages.block_table_RN[row][at // page_tokens].long(), at % page_tokens
    query_QHD = pages.query_RHD[row : row + 1] if query_QHD is None else query_QHD
    heads = query_QHD.shape[1] // pages.key_pages_PLGD.shape[2]
    keys, values = (
        part[places].double().repeat_interleave(heads, 1) for part in (pages.key_pages_PLGD, pages.value_pages_PLGD)
    )
    scores_QHK = torch.einsum("qhd,khd->qhk", query_QHD.double(), keys) * keys.shape[2] ** -0.5
    later_QK = at > at[length - num_queries :, None]
    return torch.einsum("qhk,khd->qhd", scores_QHK.masked_fill(later_QK[:, None], -math.inf).softmax(-1), values)


def worst_error(found_RHD: torch.Tensor, pages: Pages) -> float:
    """Of all requests that have tokens."""
    rows = [row for row, length in enumerate(LENGTHS) if length]
    return max(float((found_RHD[row] - exact(pages, row)[0]).abs().max()) for row in rows)


_IN_TRITON = """
import torch
from megatron_tropd.kernels.paged_attention import attend_one_token
from tests.test_paged_attention import LENGTHS, WIDTHS, make_pages, worst_error
for sizes in WIDTHS:
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3)):  # its products of bf16 are not products
        pages = make_pages(*sizes, dtype)
        found = attend_one_token(**vars(pages))
        assert found.dtype == dtype and not found[LENGTHS.index(0)].any()
        assert worst_error(found, pages) < bound, (sizes, dtype, worst_error(found, pages))
"""


def test_the_kernel_is_exact() -> None:
    """In Triton's interpreter, which must be asked for before Triton is imported: a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _IN_TRITON], env=environment, cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_the_kernel_compiles() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_tropd.kernels.paged_attention import _attend_one_token

    constants = {"HEADS": 7, "WIDTH": 80, "BLOCK_HEADS": 16, "BLOCK_WIDTH": 128, "BLOCK_TOKENS": 64}
    data, indices = ("query", "keys", "values", "out"), ("table", "lengths")
    signature = {
        name: "constexpr" if name in constants else "*bf16" if name in data else "*i32" if name in indices
        else "fp32" if name == "scale" else "i32" for name in _attend_one_token.arg_names
    }  # fmt: skip
    source = ASTSource(_attend_one_token, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.parametrize("sizes", WIDTHS)
def test_one_token_in_torch_is_exact(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd.paged_attention import attend_one_token

    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    pages = make_pages(*sizes, torch.float32)
    for longest in (max(LENGTHS), max(LENGTHS) + 1):
        found = attend_one_token(**vars(pages), longest=longest)
        assert worst_error(found, pages) < 2e-6 and found.isfinite().all()


@pytest.mark.parametrize("sizes", WIDTHS)
def test_chunks_are_exact(sizes: tuple[int, ...]) -> None:
    """Whole prompts, and the rest of prompts; two requests of the same lengths in one call."""
    from megatron_tropd.paged_attention import attend_chunks

    pages = make_pages(*sizes, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for rows, num_queries in (((4,), 131), ((4,), 2), ((2, 5), 64), ((2, 5), 33), ((1,), 5)):
        query_THD = torch.randn(len(rows) * num_queries, *pages.query_RHD.shape[1:], generator=generator)
        found = attend_chunks(
            query_THD, pages.key_pages_PLGD, pages.value_pages_PLGD, pages.block_table_RN[list(rows)],
            num_keys=LENGTHS[rows[0]],
        )  # fmt: skip
        wanted = [
            exact(pages, row, num_queries, query_THD[place * num_queries : (place + 1) * num_queries])
            for place, row in enumerate(rows)
        ]
        torch.testing.assert_close(found, torch.cat(wanted).float(), atol=2e-6, rtol=0)
