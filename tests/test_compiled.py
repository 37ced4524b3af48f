"""The kernels for `torch.compile`: every case of the Triton kernels' tests, and once really compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_kernels import FP32, check_gradient, check_mixture, check_pieces, check_statistics
from vocab_parallel_cases import VARIANTS, check_against_dense, make_case, measure_memory

from megatron_tropd.kernels import compiled
from megatron_tropd.kernels.backend import BACKEND_VARIABLE
from megatron_tropd.objectives import preset
from megatron_tropd.vocab_parallel import distillation_loss
from megatron_tropd.vocab_parallel.kernel_passes import KernelPasses

PASSES = KernelPasses(compiled)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same functions, run as they stand: compiling every width and type would take minutes."""
    monkeypatch.setenv(BACKEND_VARIABLE, "compile")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
def test_the_passes_match_the_definition_and_float64() -> None:
    assert max(check_statistics(PASSES).values()) < FP32
    errors = check_gradient(PASSES)
    assert errors["torch.float32"] < FP32 and errors["torch.bfloat16"] < 4e-3
    assert check_mixture(PASSES) < FP32 and check_pieces(PASSES) < FP32


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("consecutive", [False, True])
def test_the_whole_loss_matches_dense(dtype: torch.dtype, consecutive: bool) -> None:
    case = make_case(103, 112, 128, dtype=dtype)
    if consecutive:
        case.regions_T.clamp_(min=1)
        case.tokens_T.clamp_(min=0)
    for objective, inplace in itertools.product(VARIANTS, (False, True)):
        check_against_dense(case, objective, None, inplace_backward=inplace)


def test_compiled_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in one piece and scattered, both types, in place and not; memory stays within the bar."""
    monkeypatch.setenv(BACKEND_VARIABLE, "compile")
    for dtype, objective in itertools.product(
        (torch.float32, torch.bfloat16), (preset("tropd", top_k=7), preset("tropd-exact"))
    ):
        for num_tokens, inplace in ((24, True), (31, False)):
            case = make_case(1003, 1008, 1024, dtype=dtype, num_tokens=num_tokens)
            check_against_dense(case, objective, None, inplace_backward=inplace)
            case.regions_T.clamp_(min=1)
            case.tokens_T.clamp_(min=0)
            check_against_dense(case, objective, None, inplace_backward=inplace)
    assert peak_bytes_per_element(preset("tropd-exact")) < 0.25


def _compile_beside_megatron() -> tuple[int, float]:
    """(graphs compiled, gradient error) in a process that trains on the CPU."""
    from torch._dynamo.utils import counters

    from megatron_tropd import cpu

    assert cpu.install()
    _, error = check_against_dense(make_case(1003, 1008, 1024), preset("opd"), None)
    return counters["frames"]["ok"], error


def test_compiles_where_megatron_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the compiler is switched off for Megatron, and a mode rewrites requests for CUDA."""
    monkeypatch.setenv(BACKEND_VARIABLE, "compile")
    ((num_graphs, error),) = run_ranks(1, _compile_beside_megatron, fresh=True)
    assert num_graphs >= 2 and error < FP32


def peak_bytes_per_element(objective: Any) -> float:
    num_tokens, width = 1024, 8016
    student = torch.randn(num_tokens, width).bfloat16().requires_grad_()
    teacher = student.detach() + torch.randn(num_tokens, width).bfloat16() / 2
    tokens = torch.randint(0, 8003, (num_tokens,))
    with measure_memory() as use:
        loss, _ = distillation_loss(
            student, teacher, tokens, torch.full_like(tokens, 2), objective, vocab_size=8003, inplace_backward=True
        )
        loss.sum().backward()
    return use.peak / student.numel()
