"""What a run takes before it runs: parameters, memory and time of each rank, from formulas that a test holds to bytes
measured on the real trainer. docs/scaling.md explains them."""

from megatron_tropd.planner.activations import LayerSpec, activation_bytes
from megatron_tropd.planner.adapters import stage_adapter_parameters
from megatron_tropd.planner.generation import generation_engine, generation_layout, generation_memory
from megatron_tropd.planner.memory import RankMemory, element_bytes, micro_batch_rows, rank_memory, weight_bytes
from megatron_tropd.planner.parameters import model_parameters, stage_layers, stage_parameters
from megatron_tropd.planner.sides import job_memory, job_time
from megatron_tropd.planner.sizes import Sizes, rollout_layout, student_layout, teacher_layout

__all__ = [
    "LayerSpec",
    "RankMemory",
    "Sizes",
    "activation_bytes",
    "element_bytes",
    "generation_engine",
    "generation_layout",
    "generation_memory",
    "job_memory",
    "job_time",
    "micro_batch_rows",
    "model_parameters",
    "rank_memory",
    "rollout_layout",
    "stage_adapter_parameters",
    "stage_layers",
    "stage_parameters",
    "student_layout",
    "teacher_layout",
    "weight_bytes",
]
