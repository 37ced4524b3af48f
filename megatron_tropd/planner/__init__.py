"""What a run takes before it runs: parameters, memory and time of each rank, from formulas that a test holds to bytes
measured on the real trainer. docs/scaling.md explains them."""

from megatron_tropd.planner.memory import Attention, RankMemory, activation_bytes, rank_memory, weight_bytes
from megatron_tropd.planner.parameters import model_parameters, stage_layers, stage_parameters

__all__ = [
    "Attention",
    "RankMemory",
    "activation_bytes",
    "model_parameters",
    "rank_memory",
    "stage_layers",
    "stage_parameters",
    "weight_bytes",
]
