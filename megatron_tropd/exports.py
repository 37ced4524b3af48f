"""The student of a run as Hugging Face folders, ``<output_dir>/hf/step_N``: at the end, or beside every checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from megatron_tropd.config import Config, ConfigError
from megatron_tropd.distributed import Layout, from_main
from megatron_tropd.hf_config import HuggingFaceError, config_values, is_huggingface, read_config
from megatron_tropd.hf_export import export_huggingface
from megatron_tropd.hf_peft import export_peft
from megatron_tropd.writing import on_main

logger = logging.getLogger(__name__)


def exports(config: Config) -> bool:
    """Whether a training run with this config writes Hugging Face folders."""
    return config.training.export_hf or config.training.export_hf_on_save


def export_student(
    model: torch.nn.Module, layout: Layout, config: Config, step: int, *, vocab_size: int, anew: bool = False
) -> None:
    """Write ``model`` (or its chunks), the student after ``step`` steps; all ranks call this.

    A folder that is there is left alone; with ``anew`` it is of a run that crashed behind its last checkpoint, and is
    replaced. Raises HuggingFaceError on every rank where it cannot be written.
    """
    out = _folder(Path(config.output_dir), step)
    if anew:
        on_main(lambda: shutil.rmtree(out, ignore_errors=True), layout.is_main)
    if from_main(out.exists()):
        return
    reference = export_reference(config, vocab_size=vocab_size)
    if config.lora.rank and config.lora.export == "peft":
        load = config.student.load
        base = str(Path(load).absolute()) if load is not None and is_huggingface(Path(load)) else None
        transfer = export_peft(model, layout, config.student, config.lora, out, base=base)
    else:
        transfer = export_huggingface(model, layout, config.student, out, reference, vocab_size=vocab_size)
    if layout.is_main:
        logger.info("%s: %d tensors, %.1f MB", out, transfer.num_tensors, transfer.num_bytes / 1e6)


def drop_exports(run_folder: Path, checkpoints: Path, *, newest: int) -> None:
    """Remove the exports whose checkpoint is gone, and what crashes left half-written; never that of ``newest``."""
    kept = _folder(run_folder, newest)
    for folder in kept.parent.glob("step_*"):
        if folder != kept and not (checkpoints / folder.name).exists():
            shutil.rmtree(folder)


def _folder(run_folder: Path, step: int) -> Path:
    return run_folder / "hf" / f"step_{step}"


def export_reference(config: Config, *, vocab_size: int) -> Path:
    """The Hugging Face folder that an export takes its config.json and tokenizer files from.

    Raises ConfigError where no folder of the config can express the student.
    """
    candidates = {
        "student.load": config.student.load,
        "tokenizer.model": config.tokenizer.model if config.tokenizer.kind == "huggingface" else None,
        "teacher.load": config.teacher.load if config.teacher is not None else None,
    }
    found = {name: Path(folder) for name, folder in candidates.items() if folder and is_huggingface(Path(folder))}
    problems = []
    for name, folder in found.items():
        try:
            config_values(config.student, read_config(folder), vocab_size=vocab_size, dtype="float32")
            return folder
        except HuggingFaceError as error:
            problems.append(f"{name} {folder}: {error}")
    raise ConfigError(
        "training.export_hf needs a Hugging Face folder of the student's family, for its config.json and tokenizer: "
        "set student.load, tokenizer.model or teacher.load to one, or training.export_hf=false and convert a "
        f"checkpoint later (tools/convert_checkpoint.py). Found {'; '.join(problems) or 'none'}"
    )
