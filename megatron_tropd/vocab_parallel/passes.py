"""The passes over the vocabulary, in PyTorch, Triton or `torch.compile`: the one place that chooses.

Each function has the signature and the meaning of its namesake in `statistics`, `divergences` and `gradient`, the
readable definition; `kernel_passes` holds the twins on either set of kernels. `kernels.backend` says which runs.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from megatron_tropd.kernels.backend import chosen_backend
from megatron_tropd.objectives import ExactDivergence
from megatron_tropd.vocab_parallel import divergences, gradient, statistics
from megatron_tropd.vocab_parallel.gradient import StudentTerms
from megatron_tropd.vocab_parallel.kernel_passes import KernelPasses
from megatron_tropd.vocab_parallel.shards import TeacherColumns


def shard_statistics(logits_TV: torch.Tensor, rows_N: torch.Tensor, ids_N: torch.Tensor, held: range) -> torch.Tensor:
    """See `statistics.shard_statistics`."""
    return _implementation(logits_TV, statistics).shard_statistics(logits_TV, rows_N, ids_N, held)


def pair_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    ids_N: torch.Tensor,
    held: range,
) -> torch.Tensor:
    """See `statistics.pair_statistics`."""
    implementation = _implementation(student_logits_TV, statistics)
    return implementation.pair_statistics(student_logits_TV, teacher, rows_N, ids_N, held)


def jsd_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """See `divergences.jsd_statistics`."""
    implementation = _implementation(student_logits_TV, divergences)
    return implementation.jsd_statistics(
        student_logits_TV, teacher, rows_N, student_log_sum_exp_N, teacher_log_sum_exp_N, beta
    )


def skew_statistics(
    student_logits_TV: torch.Tensor,
    teacher: TeacherColumns,
    rows_N: torch.Tensor,
    student_log_sum_exp_N: torch.Tensor,
    teacher_log_sum_exp_N: torch.Tensor,
    beta: float,
    kind: ExactDivergence,
) -> torch.Tensor:
    """See `divergences.skew_statistics`."""
    implementation = _implementation(student_logits_TV, divergences)
    return implementation.skew_statistics(
        student_logits_TV, teacher, rows_N, student_log_sum_exp_N, teacher_log_sum_exp_N, beta, kind
    )


def student_gradient(
    student_logits_TV: torch.Tensor,
    terms: StudentTerms,
    log_prob_grads: tuple[torch.Tensor, ...],
    divergence_grad_N: torch.Tensor | None,
    gradient_TV: torch.Tensor,
) -> None:
    """See `gradient.student_gradient`."""
    implementation = _implementation(student_logits_TV, gradient)
    implementation.student_gradient(student_logits_TV, terms, log_prob_grads, divergence_grad_N, gradient_TV)


def _implementation(logits_TV: torch.Tensor, definition: ModuleType) -> Any:
    """Where the pass's function is: the definition's own module, or its twins, imported when first needed."""
    backend = chosen_backend(logits_TV)
    return definition if backend == "torch" else _kernel_passes(backend)


@cache
def _kernel_passes(backend: str) -> KernelPasses:
    module = {"triton": "triton_kernels", "compile": "compiled"}[backend]
    return KernelPasses(import_module(f"megatron_tropd.kernels.{module}"))
