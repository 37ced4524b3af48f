"""Which implementation of a pass runs: Triton on CUDA, PyTorch elsewhere, or the one that is asked for."""

from __future__ import annotations

import os
from typing import Literal

import torch

BACKEND_VARIABLE = "MEGATRON_TROPD_BACKEND"
"""Environment variable: ``auto`` (Triton on CUDA, PyTorch elsewhere), ``triton``, ``torch`` or ``compile`` (PyTorch
under `torch.compile`: faster on a CPU after a minute of compiling); absent: ``auto``."""
_BACKENDS = ("auto", "triton", "torch", "compile")


def chosen_backend(logits: torch.Tensor) -> Literal["triton", "torch", "compile"]:
    """What the passes over ``logits`` run in.

    Raises:
        ValueError: the variable holds another word, or ``triton`` is asked for where it cannot run: logits outside
            CUDA without Triton's interpreter (``TRITON_INTERPRET=1``, which is for tests: it is very slow).
    """
    backend = os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in _BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE} must be one of {', '.join(_BACKENDS)}; found {backend!r}")
    if backend == "triton" and not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{BACKEND_VARIABLE}=triton, but the logits are on {logits.device.type}: Triton needs CUDA "
            "(or, to test its kernels, TRITON_INTERPRET=1). Use auto, torch or compile"
        )
    if backend == "auto":
        return "triton" if logits.is_cuda else "torch"
    return backend  # type: ignore[return-value]
