"""The CPU backend: Megatron's CUDA requests land on the CPU, and only where there is no CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks


def _ask_for_cuda() -> None:
    from megatron_tropd import cpu

    assert cpu.install() and cpu.install()
    cpu_device = torch.device("cpu")
    assert torch.zeros(2, device="cuda").device == cpu_device
    assert torch.empty(2, device=torch.device("cuda", 0)).device == cpu_device
    assert torch.ones(2, device=torch.cuda.current_device()).device == cpu_device
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor and tensor.to("cuda").device == cpu_device
    assert tensor.to(torch.float64).dtype is torch.float64
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype is torch.float64
    with torch.cuda.stream(torch.cuda.Stream()):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        end.record()
        end.synchronize()
        assert start.elapsed_time(end) >= 0
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is never active beside a GPU")
def test_cuda_requests_land_on_the_cpu() -> None:
    run_ranks(1, _ask_for_cuda)


def test_nothing_changes_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd import cpu

    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_installed", [])
    assert not cpu.install()
    assert torch.cuda.current_device is before
