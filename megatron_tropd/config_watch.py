"""The sections of the configuration about watching a run: what stops a step, what is logged. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GuardConfig:
    """What stops a step before the optimizer moves, and what happens then."""

    max_loss_ratio: float | None = None
    """Refuse a step whose |loss| is more than this times its running median; None: any finite loss is taken."""
    max_grad_norm_ratio: float | None = None
    """The same for the gradient norm before clipping."""
    window: int = 64
    """Accepted steps that the running medians look back on; the ratios count once half of them are there."""
    on_refused: Literal["stop", "skip", "rollback"] = "stop"
    """After a loss or gradient that is not finite or too large: stop the run; leave the weights as they are and go on
    with the next step; or go back to the newest checkpoint and on from there with the prompts that come next."""
    max_refused_steps: int = 10
    """skip, rollback: refused steps of the whole run, restarts included, after which it stops anyway."""
    max_dumped_samples: int = 16
    """Samples of a refused step to write to refused/, over all ranks: those with the highest sum of abs(loss), or of
    the gap between engine and trainer; all that are not finite, where some are. 0: the whole batch."""
    replica_check_interval: int = 0
    """Steps between comparisons of the weights' hashes across data-parallel ranks, and with those after the last
    update; a difference stops the run and names the rank. 0: never."""


@dataclass(frozen=True)
class MonitoringConfig:
    """What a run tells about itself, beside metrics.jsonl and TensorBoard."""

    log_interval: int = 10
    """Steps between comparisons of the ranks (slowest rank and highest memory of every phase); 0: none."""
    verbose: bool = False
    """Show the warnings and messages of Megatron, torch and other libraries, on every rank."""
    profile: bool = False
    """Profile some steps with PyTorch's profiler: traces in <output_dir>/profile. `--profile` is short for it."""
    profile_step_start: int = 10
    """First step to profile, from 0; the first steps of a run are slower than the others."""
    profile_step_end: int = 12
    """First step that is not profiled any more."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks to profile."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases too (needs the `wandb` extra)."""
    wandb_entity: str | None = None
    """User or team of the project; None: the account's default."""
    mlflow_experiment: str | None = None
    """Log to this experiment of MLflow too (needs the `mlflow` extra)."""
    mlflow_tracking_uri: str | None = None
    """Where MLflow is; None: what MLFLOW_TRACKING_URI says."""
