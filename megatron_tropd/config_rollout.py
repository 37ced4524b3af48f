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
    cuda_graphs: bool | None = None
    """Replay decoding steps as CUDA graphs. None: on GPUs, where they are offered: for dense models without pipeline
    stages and fp8."""


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
    partial_tokens: int | None = None
    """Partial rollouts, in training: most tokens that a sample is given in one step. One that has not ended by then is
    paused, kept in checkpoints, and continued by the next step's weights. None: every step generates to the end."""
    partial_learn_from: Literal["segments", "finished"] = "segments"
    """segments: a step learns from the tokens it has generated itself, of every sample in flight; strictly on-policy.
    finished: from whole responses, whose earlier tokens older weights sampled; terms on the sampled token take PPO's
    clipped ratio (objective_options.clip_ratio_low, _high) against those weights' log-probs."""
    over_sampling: float = 1.0
    """In training, sequences in flight for each that a step learns from. Above 1 a step generates until as many as it
    needs have ended, those with the fewest new tokens, and drops the others: long responses are learned from less.
    With partial_learn_from=finished none is dropped; unfinished ones are continued in the next step."""
    engine: Literal["auto", "static", "dynamic"] = "auto"
    """Megatron's static batching, or its dynamic batching with a paged KV cache; auto: the latter where it has CUDA
    graphs."""
    dynamic: DynamicEngineConfig = field(default_factory=DynamicEngineConfig)
    """Options of the dynamic engine."""

    def num_in_flight(self, global_batch_size: int) -> int:
        """Sequences that a step of `train` generates for over all ranks."""
        return round(self.over_sampling * global_batch_size)
