"""Megatron's DistributedDataParallel, optimizer and learning-rate schedule, built from the config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from megatron_tropd.config import OptimizerConfig
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.pair import StudentTeacherStage

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def wrap_data_parallel(
    stages: Sequence[StudentTeacherStage], config: OptimizerConfig, layout: Layout, *, overlap: bool
) -> tuple[DistributedDataParallel, ...]:
    """Megatron DDP over the trainable parameters of each of a rank's model chunks. The first one's student config,
    which the schedule reads, learns where gradients go.

    Gradients accumulate and reduce in fp32. ``overlap`` hides the reduction behind the backward pass.
    """
    chunks = tuple(
        DistributedDataParallel(
            config=stage.module.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.use_distributed_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=config.overlap_param_gather,
            ),
            module=stage,
            disable_bucketing=index > 0,  # a later chunk's whole reduction hides behind the earlier ones' backward
            pg_collection=layout.groups,
        )
        for index, stage in enumerate(stages)
    )
    no_sync = [chunk.no_sync for chunk in chunks]
    schedule_config = stages[0].module.config
    schedule_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    schedule_config.finalize_model_grads_func = finalize_model_grads
    return chunks


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, layout: Layout, *, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW through Megatron; with bf16 weights it keeps fp32 main weights."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.use_distributed_optimizer,
            optimizer_cpu_offload=config.optimizer_cpu_offload,
            optimizer_offload_fraction=config.optimizer_offload_fraction,
            # What Megatron calls precision-aware is how its distributed optimizer leaves fp32 weights to another.
            use_precision_aware_optimizer=config.optimizer_cpu_offload,
            pin_cpu_grads=not ON_CPU,
            overlap_param_gather=config.overlap_param_gather,
        ),
        list(chunks),
        use_gloo_process_groups=False,
        pg_collection=layout.groups,
    )
    chunks[0].module.module.config.grad_scale_func = optimizer.scale_loss
    for inner in _inner_optimizers(optimizer):
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            _start_hybrid(inner.optimizer)
        elif isinstance(inner.optimizer, torch.optim.Adam):
            _start_adam(inner.optimizer)
    return optimizer


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _start_adam(adam: torch.optim.Adam) -> None:
    """The state Adam would make at its first step: Megatron needs it to describe a checkpoint, even to load one."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _start_hybrid(hybrid: HybridDeviceOptimizer) -> None:
    """The same of an optimizer that has its parameters in several others, on host and device. Megatron itself starts
    the kinds that are not torch's, by a step with random gradients."""
    if all(isinstance(part, torch.optim.Adam) for part in hybrid.sub_optimizers):
        for part in hybrid.sub_optimizers:
            _start_adam(part)
        hybrid._sync_sub_optimizers_state_to_hdo()


OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""How Megatron writes the state of a distributed optimizer: every layout reads what another wrote."""


@contextmanager
def padding_counted(optimizer: MegatronOptimizer) -> Iterator[None]:
    """For the time in which a distributed optimizer describes its state to a checkpoint.

    Megatron 0.19.2 lays the buckets of a buffer one behind the other without the padding at their ends, and then looks
    for each parameter where it is with it: with several buckets (a tied embedding has one of its own where there are
    pipeline stages) state of other parameters would be written.
    """
    buffers = [
        buffer
        for inner in _inner_optimizers(optimizer)
        if isinstance(inner, DistributedOptimizer)
        for buffer in inner.buffers
    ]
    sized = [each for buffer in buffers for each in (buffer, *buffer.buckets)]
    without_padding = [each.numel_unpadded for each in sized]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for each, numel in zip(sized, without_padding, strict=True):
            each.numel_unpadded = numel


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Megatron's ``load_state_dict``, with three things made right.

    Hyperparameters stay the config's, so a resumed run may change them: Megatron 0.19.2 finds a parameter group by its
    saved learning rates, and fails where they differ. Where experts are spread they have an optimizer of their own, so
    another layout has saved other groups than this one has. And torch's Adam (used where neither TE nor Apex is
    installed) keeps its step count as one tensor per parameter: Megatron looks it up among the saved tensors, where it
    is not (it comes from the groups), and hands one tensor to all parameters, which then count together.
    """
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    inner_optimizers = _inner_optimizers(optimizer)
    if all(isinstance(inner, DistributedOptimizer) for inner in inner_optimizers):
        _load_shards(inner_optimizers, state)
    else:
        for group in _saved_groups(state):
            group.update(max_lr=configured[0]["max_lr"], min_lr=configured[0]["min_lr"])
        optimizer.load_state_dict(state)
    for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
        group.update(hyperparameters)
    for inner in inner_optimizers:
        for parameter_state in inner.optimizer.state.values():
            if isinstance(parameter_state.get("step"), torch.Tensor):
                parameter_state["step"] = parameter_state["step"].clone()


def _load_shards(inner_optimizers: Sequence[DistributedOptimizer], state: dict[Any, Any]) -> None:
    """Moments and main weights, which have the same names in every layout, into groups of this layout's own; of the
    saved groups the step count alone."""
    steps = [group["step"] for group in _saved_groups(state) if group.get("step") is not None]
    for index, inner in enumerate(inner_optimizers):
        saved, own = state if len(inner_optimizers) == 1 else state[index], inner.state_dict()
        for group in own["optimizer"]["param_groups"] if steps else ():
            group["step"] = steps[0]
        set_states = inner._set_main_param_and_optimizer_states
        inner._set_main_param_and_optimizer_states = partial(_set_states_but_step, set_states)
        inner.load_state_dict(
            own
            | {
                "param_state": saved["param_state"],
                "param_state_sharding_type": OPTIMIZER_FORMAT["distrib_optim_sharding_type"],
            }
        )
        del inner._set_main_param_and_optimizer_states


def _saved_groups(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameter groups of a saved optimizer, wherever Megatron's wrappers have put them."""
    yield from state.get("param_groups", [])
    for value in state.values():
        if isinstance(value, dict):
            yield from _saved_groups(value)


def _set_states_but_step(
    set_states: Callable[..., None], model_parameter: torch.nn.Parameter, tensors: dict[str, Any]
) -> None:
    set_states(model_parameter, {"step": None, **tensors})


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, *, train_iters: int
) -> OptimizerParamScheduler:
    """Learning rate over ``train_iters`` steps; one scheduler step per optimizer step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if config.lr_warmup_iters else config.lr,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=max(train_iters, config.lr_warmup_iters + 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
