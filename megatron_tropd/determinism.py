"""Deterministic mode, in one place: the same run twice gives the same bits, on GPUs too, at some cost in speed."""

from __future__ import annotations

import os

import torch

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Read by cuBLAS, NCCL and Transformer Engine when they start: the value that is set, then the others that will do."""


def enable_determinism() -> None:
    """Make torch, cuBLAS, NCCL, Transformer Engine and (through ``is_deterministic``) Megatron deterministic.

    Call before CUDA and the process groups start. An operation that torch has no deterministic form of then raises.
    Raises ValueError where the environment already asks for something else.
    """
    for name, values in ENVIRONMENT.items():
        found = os.environ.setdefault(name, values[0])
        if found not in values:
            raise ValueError(
                f"training.deterministic needs {name} to be one of {', '.join(values)}, the environment has {found!r}"
                ": unset it, or set training.deterministic=false"
            )
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def is_deterministic() -> bool:
    """Whether deterministic mode is on; Megatron's ``deterministic_mode`` follows it."""
    return torch.are_deterministic_algorithms_enabled()
