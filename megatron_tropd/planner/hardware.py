"""GPUs by their published figures, and what is assumed of how much of them a run gets.

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (a system's figures divided by its 8
GPUs); bf16 without sparsity; NVLink one way, half of the published two-way figure; network: one adapter for each GPU,
200 Gb/s in DGX A100, 400 Gb/s in the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of 8."""

    name: str
    flops: float
    """bf16 FLOP/s, dense."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s, one way, to the other GPUs of the node."""
    network: float
    """Bytes/s, one way, to other nodes."""
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9),
        Gpu("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("B200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    )
}


LOCAL_LAYER_OVERHEAD = 1.1e-3
"""``Assumptions.training_layer_overhead`` of the local layer spec. Measured on H200 with torch 2.11.0: a teacher of 28
layers took 1.13 to 1.21 ms a layer and micro-batch, a student of 28 layers 3.4 to 4.3 ms forward and backward together
(benchmarks/one_gpu.md)."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. But for ``eager_layer_overhead`` and ``training_layer_overhead`` none of it has been
    measured with this package on GPUs: replace it by what a run logs (``seconds_rollout``, ``seconds_teacher``,
    ``seconds_student``)."""

    matrix_efficiency: float = 0.6
    """Share of the peak FLOP/s that matrix products reach; communication and bubble are counted apart. With it, the
    published throughput of Llama 3 405B (arXiv 2407.21783, table 4) lies between the prediction with the bubble of
    1F1B and that without: theirs, with interleaved stages, was in between."""
    memory_efficiency: float = 0.8
    """Share of the memory bandwidth when weights and cache are read to decode."""
    network_efficiency: float = 0.8
    """Share of link bandwidths that a collective reaches."""
    collective_latency: float = 20e-6
    """Seconds of a small collective among the GPUs of a node."""
    decode_layer_overhead: float = 150e-6
    """Seconds that the kernels of one layer take for one decoded token beyond what they read and multiply, where CUDA
    graphs launch them."""
    eager_layer_overhead: float = 1600e-6
    """The same without CUDA graphs. Measured on H200, torch 2.11.0, local layer spec, static engine, the 28 layers
    of qwen3-0.6b, 256 tokens: 1.0 ms on one host, 1.4 to 1.8 ms on another (benchmarks/one_gpu.md)."""
    training_layer_overhead: float = 0.0
    """Seconds that a layer's forward takes at least in training, launching its kernels; the backward twice that. 0: the
    products take longer, as in large models with Transformer Engine's fused layers. Without Transformer Engine it was
    1.1 ms on H200 (``LOCAL_LAYER_OVERHEAD``)."""
    host_bandwidth: float = 20e9
    """Bytes/s between a GPU and its host's memory, eight GPUs at once."""
    host_memory_bandwidth: float = 40e9
    """Bytes/s of a host's memory for each of its eight GPUs: an optimizer's step where its state is there."""
    host_memory: float = 200e9
    """Bytes of a host's memory that each of its eight GPUs may have pinned: DGX A100, H100, H200 and B200 have 2 TB."""
    mean_length: float = 0.5
    """Mean length of prompts and of responses, as a share of their budgets; the longest response of a batch fills its
    budget."""
    memory_reserve: float = 4e9
    """Bytes kept free: CUDA context, NCCL, cuBLAS workspace, fragmentation."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_share = field.name == "mean_length" or field.name.endswith("_efficiency")
            may_be_none = field.name.endswith(("_overhead", "_latency", "_reserve"))
            if is_share and not 0 < value <= 1:
                raise ValueError(f"{field.name} is a share, above 0 and at most 1, not {value}")
            if value < 0 or (value == 0 and not may_be_none) or not math.isfinite(value):
                raise ValueError(f"{field.name} must be {'at least' if may_be_none else 'above'} 0, not {value}")
