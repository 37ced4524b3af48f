"""The sections of the configuration about tasks: which there are, and how answers are judged. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TasksConfig:
    """Procedural tasks of reasoning-gym, for data.train=reasoning-gym:train, data.validation=reasoning-gym:validation.

    A task is a function of (seed, its index); no training task asks what a held-out one asks.
    """

    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """reasoning-gym's name of every kind of task, with its options: {chain_sum: {max_terms: 8}, countdown: {}}. Kinds
    come in turn."""
    level: int | None = None
    """Difficulty in reasoning-gym's curricula, 0 the easiest; None: each task's defaults. Options come on top."""
    seed: int = 42
    """Which tasks there are."""
    num_train: int = 10_000
    """Training tasks."""
    num_validation: int = 256
    """Held-out tasks."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How held-out prompts are answered and judged, by `evaluate` and during training."""

    files: list[str] = field(default_factory=list)
    """JSONL benchmark files that `evaluate` and training measure beside data.validation; metrics are prefixed with the
    file's name without .jsonl."""
    num_samples: int = 1
    """Responses to every prompt; accuracy is their mean."""
    pass_at: list[int] = field(default_factory=list)
    """k of every pass@k to report (unbiased; at most num_samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy (then one sample is all there is)."""
    top_p: float = 1.0
    """Nucleus mass to sample from; 1 is off."""
    max_response_length: int | None = None
    """Token budget of a response; None: rollout.max_response_length."""
    program_seconds: float = 10.0
    """Verifier python: wall time of a program with its tests."""
    program_memory_mb: int = 512
    """Verifier python: memory of a program with its tests, MiB."""
    require_namespaces: bool = True
    """Verifier python: refuse to run programs where the kernel cannot shut them off from network and files."""
