"""Refuses arguments that do not fit, on every rank, before anything is communicated.

Shape suffixes: ``T`` tokens, ``V`` vocabulary shard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.objectives import Objective
from megatron_tropd.vocab_parallel.output_head import OutputHead
from megatron_tropd.vocab_parallel.shards import group_size

_NUM_REGIONS = 3


def check_inputs(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | None,
    tokens_T: torch.Tensor,
    regions_T: torch.Tensor,
    objective: Objective,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    uniforms_T: torch.Tensor | None,
    advantages_T: torch.Tensor | None,
    engine_log_probs_T: torch.Tensor | None,
    full_statistics: bool,
) -> None:
    """Raise ValueError for the first thing that is wrong."""
    if not isinstance(objective, Objective):
        message = f"objective must come from megatron_tropd.objectives.preset(...), found {objective!r}"
        raise ValueError(message)
    size = group_size(group)
    _check_logits("student_logits_TV", student_logits_TV, tokens_T, vocab_size, size)
    if teacher_logits_TV is not None:
        _check_logits("teacher_logits_TV", teacher_logits_TV, tokens_T, vocab_size, size)
    elif objective.needs_teacher:
        name = objective.name
        raise ValueError(f"objective {name!r} needs teacher_logits_TV; only 'sft' and 'seq-kd' run without one")
    elif full_statistics:
        raise ValueError("full_statistics compares the two models: give teacher_logits_TV, or leave it off")
    _check_integers("tokens_T", tokens_T, tokens_T)
    _check_integers("regions_T", regions_T, tokens_T)
    floats = {"uniforms_T": uniforms_T, "advantages_T": advantages_T, "engine_log_probs_T": engine_log_probs_T}
    for name, values_T in floats.items():
        if values_T is not None and not (values_T.shape == tokens_T.shape and values_T.is_floating_point()):
            raise ValueError(f"{name} must be floating, shape {_shape(tokens_T)}; found {_describe(values_T)}")
    if objective.needs_engine_log_probs and engine_log_probs_T is None:
        raise ValueError("importance_cap and clip_ratio_low need engine_log_probs_T: give it, or leave them off")
    _check_values(tokens_T, regions_T, uniforms_T, vocab_size)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {_shape(tensor)}"


def _check_logits(name: str, logits_TV: torch.Tensor, tokens_T: torch.Tensor, vocab_size: int, size: int) -> None:
    if logits_TV.dim() != 2 or not logits_TV.is_floating_point():
        raise ValueError(f"{name} must be floating and 2-dimensional [T, V], found {_describe(logits_TV)}")
    if tokens_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"{name} is {_shape(logits_TV)}, so tokens_T must be [T], found {_shape(tokens_T)}")
    if not 1 <= vocab_size <= logits_TV.shape[1] * size:
        raise ValueError(
            f"vocab_size must be between 1 and the ids that {name} holds over {size} rank(s), "
            f"{logits_TV.shape[1]} x {size}; found {vocab_size}. With a sharded vocabulary, give its group"
        )


def _check_integers(name: str, values_T: torch.Tensor, tokens_T: torch.Tensor) -> None:
    integer = not (values_T.is_floating_point() or values_T.is_complex() or values_T.dtype == torch.bool)
    if values_T.shape != tokens_T.shape or not integer:
        raise ValueError(f"{name} must be integers of shape {_shape(tokens_T)}, found {_describe(values_T)}")


def _check_values(
    tokens_T: torch.Tensor, regions_T: torch.Tensor, uniforms_T: torch.Tensor | None, vocab_size: int
) -> None:
    takes_part_T = regions_T != 0
    wrong = [
        (regions_T < 0) | (regions_T >= _NUM_REGIONS),
        takes_part_T & ((tokens_T < 0) | (tokens_T >= vocab_size)),
    ]
    if uniforms_T is not None:
        wrong.append(takes_part_T & ~((uniforms_T >= 0) & (uniforms_T < 1)))
    # One transfer from the device for all checks.
    counts = torch.stack(wrong).sum(-1).tolist()
    if counts[0]:
        raise ValueError(f"regions_T must be 0 (none), 1 (guidance) or 2 (on-policy); {counts[0]} are not")
    if counts[1]:
        raise ValueError(f"tokens_T must be in [0, vocab_size = {vocab_size}) in a region; {counts[1]} are not")
    if len(counts) > 2 and counts[2]:
        raise ValueError(f"uniforms_T must be in [0, 1) in a region; {counts[2]} are not")


def check_heads(
    student: OutputHead,
    teacher: OutputHead | None,
    regions_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    chunk_size: int | None,
) -> None:
    """Raise ValueError for what `fused_head_loss` takes beyond `distillation_loss`."""
    for name, head in (("student", student), ("teacher", teacher)):
        if head is None:
            continue
        hidden, weight = head.hidden_NH, head.weight_VH
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
            raise ValueError(
                f"{name}: hidden_NH [N, H] and weight_VH [V, H] must share H and dtype, found {_describe(hidden)} "
                f"and {_describe(weight)}"
            )
    if weights_N is not None and not (weights_N.shape == regions_N.shape and weights_N.is_floating_point()):
        raise ValueError(f"weights_N must be floating, shape {_shape(regions_N)}; found {_describe(weights_N)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    if not regions_N.all():
        raise ValueError("every token given to fused_head_loss must be of a region: select them before the head")
