"""The config section on generation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
