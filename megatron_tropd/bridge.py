"""Conversion by Megatron-Bridge, where that is installed: for families that ``hf_mapping`` does not carry.

Only its two whole-checkpoint calls are used, ``AutoBridge.import_ckpt`` and ``AutoBridge.export_ckpt``. It wants
TransformerEngine and a GPU, so this package's tests cover nothing here but the refusals. Its checkpoints are Megatron's
own beside its ``run_config.yaml``: other Megatron programs load them, ``student.load`` does not, since this package
builds no model of a family that it does not carry.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megatron_tropd.hf_config import HuggingFaceError


def import_checkpoint(hf: Path, out: Path) -> None:
    """Hugging Face folder ``hf`` to a Megatron-Bridge checkpoint ``out``, which appears when it is complete.

    Raises HuggingFaceError where Megatron-Bridge is not installed.
    """
    bridge = _auto_bridge()
    temporary = _fresh(out)
    bridge.import_ckpt(hf_model_id=str(hf), megatron_path=str(temporary))
    os.rename(temporary, out)


def export_checkpoint(megatron: Path, hf: Path, out: Path) -> None:
    """Megatron-Bridge checkpoint ``megatron`` to the Hugging Face folder ``out``; ``hf`` is of the same model.

    Raises HuggingFaceError where Megatron-Bridge is not installed.
    """
    bridge = _auto_bridge()
    temporary = _fresh(out)
    bridge.from_hf_pretrained(str(hf)).export_ckpt(megatron_path=str(megatron), hf_path=str(temporary))
    os.rename(temporary, out)


def _auto_bridge() -> Any:
    try:
        from megatron.bridge import AutoBridge
    except Exception as error:  # without TransformerEngine or CUDA its import fails in many ways, not ImportError alone
        raise HuggingFaceError(
            f"--backend bridge needs Megatron-Bridge, which cannot be imported here ({type(error).__name__}: {error}): "
            "use a container that has it (nvcr.io/nvidia/nemo), or leave --backend out for the families that this "
            "package carries"
        ) from error
    return AutoBridge


def _fresh(out: Path) -> Path:
    temporary = out.with_name(out.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary
