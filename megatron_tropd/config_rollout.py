"""The config section on generation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DynamicEngineConfig:
    """Megatron's dynamic batching; the names are Megatron's `InferenceConfig`'s."""

    block_size_tokens: int = 64
    """Tokens of a KV block. A multiple of 256 where attention is flash-attn 2's."""
    buffer_size_gb: float | None = None
    """Most GiB of the KV cache on a rank; what does not fit waits, or is computed again. None: room for
    rollout.max_batch_size sequences at their longest."""
    max_tokens: int = 16384
    """Most tokens of one forward pass: that many tokens of prompts are read at once."""
    enable_chunked_prefill: bool = True
    """Read a prompt in parts where it does not fit in max_tokens beside the sequences that decode."""
    enable_prefix_caching: bool = True
    """Samples of one prompt share the KV blocks of what they have in common."""
    cuda_graphs: bool = False
    """Replay decoding steps as CUDA graphs. On GPUs, for dense models without pipeline parallelism."""


@dataclass(frozen=True)
class RolloutConfig:
    """Generation by the student (and by the teacher for guidance answers)."""

    samples_per_prompt: int = 4
    """Rollouts of each prompt in a step."""
    max_response_length: int = 8192
    """Token budget of prefix + response."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. The trust region is defined at 1."""
    top_p: float = 1.0
    """Nucleus mass to sample from; 1 is off."""
    max_batch_size: int = 256
    """Most sequences the engine decodes at once on one data-parallel rank."""
    tensor_model_parallel_size: int | None = None
    """Generate with a copy of the student's weights, cut over this many ranks and without pipeline stages, that takes
    them over from the trainer whenever they have moved; None: with the trainer's own, in its layout. `evaluate` starts
    in this layout."""
    refit_check_interval: int = 50
    """With a copy: check, at its first refit and every this many, that hashes of every tensor agree with the trainer's;
    0: never."""
    engine: Literal["auto", "static", "dynamic"] = "auto"
    """Megatron's static batching, or its dynamic batching with a paged KV cache; auto: see docs/rollouts.md."""
    dynamic: DynamicEngineConfig = field(default_factory=DynamicEngineConfig)
    """Options of the dynamic engine."""
