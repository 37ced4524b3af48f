"""The config section about LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

TargetModule = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in place of the student's own weights: those stay as student.load has them,
    without gradients or optimizer state. They take a learning rate about ten times as high."""

    rank: int = 0
    """Rank of the adapters; 0: no adapters, the whole student is trained."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    target_modules: tuple[TargetModule, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Linear layers that get one, by Megatron's names: queries, keys and values; the attention's output; gate and up;
    down. Experts get none."""
    base_is_teacher: bool = False
    """The teacher is the student with its adapters off: no second copy of the weights, and no teacher section. In both
    teacher schedules; with teacher_context, self-distillation."""
    export: Literal["merged", "peft"] = "merged"
    """What training.export_hf writes: the whole student with the adapters added to its weights, or a PEFT folder
    (adapter_config.json and adapter_model.safetensors)."""

    def shape(self) -> dict[str, Any]:
        """What decides an adapter's function beside its weights, as plain data; empty where there is none."""
        if not self.rank:
            return {}
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": sorted(self.target_modules)}
