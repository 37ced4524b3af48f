"""LoRA (Hu et al. 2021, arXiv 2106.09685): ``y = W x + alpha / rank * B (A x)``, W frozen, A and B trained.

An adapter sits beside a linear layer of Megatron's and is cut as that layer's weight is:

| layer | A ``[R, I]`` | B ``[O, R]`` | what tensor-parallel ranks exchange for it |
|---|---|---|---|
| column parallel (qkv, fc1) | whole | cut over O | backward: the gradient of A x; sequence parallel: A x too |
| row parallel (proj, fc2) | cut over I | whole | backward: the gradient of B |

A row-parallel adapter adds to its layer's partial sums before they are reduced: the one reduction carries both, so
that generation exchanges nothing more than without adapters.

Shape suffixes: ``R`` rank, ``I`` input and ``O`` output features, this rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tropd.config_lora import LoraConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.models import chunks_of, keyed_generator, partition_dim

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

_TARGETS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_PARTS = ("lora_A", "lora_B")


class Adapter(torch.nn.Module):
    """A and B beside one linear layer, whose weight decides how they are cut."""

    def __init__(self, weight_OI: torch.Tensor, *, rank: int, alpha: float, sequence_parallel: bool):
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        like: dict[str, Any] = {"dtype": weight_OI.dtype, "device": weight_OI.device}
        self.lora_A = torch.nn.Parameter(torch.empty(rank, num_inputs, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(num_outputs, rank, **like))
        self.scale = alpha / rank
        self.is_on = True
        self.is_column = partition_dim(weight_OI) == 0
        set_tensor_model_parallel_attributes(self.lora_B, self.is_column, 0 if self.is_column else -1, 1)
        set_tensor_model_parallel_attributes(self.lora_A, not self.is_column, -1 if self.is_column else 1, 1)
        # Each rank sees other positions, so Megatron sums the gradients of what is whole, as it does a norm's.
        self.lora_A.sequence_parallel = sequence_parallel and self.is_column  # type: ignore[attr-defined]

    def delta(self) -> torch.Tensor:
        """``[O, I]`` fp32: what the adapter adds to this rank's part of the weight."""
        return self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class _AdaptedLinear(torch.nn.Module):
    """What both kinds of linear layer get; ``_forward_impl`` is where Megatron multiplies with the local weight."""

    adapter: Adapter

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """The layer without its adapter, whose tensors are `trained_state`."""
        state = super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]
        return {name: entry for name, entry in state.items() if ".adapter." not in name}


class AdaptedColumnLinear(_AdaptedLinear, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear with an adapter."""

    def _forward_impl(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super()._forward_impl(input, *args, **kwargs)
        if not self.adapter.is_on:
            return output
        inner = F.linear(input, self.adapter.lora_A) * self.adapter.scale
        if self.sequence_parallel:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return output + F.linear(inner, self.adapter.lora_B)


class AdaptedRowLinear(_AdaptedLinear, RowParallelLinear):
    """Megatron's RowParallelLinear with an adapter."""

    def _forward_impl(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super()._forward_impl(input, *args, **kwargs)
        if not self.adapter.is_on:
            return output
        inner = F.linear(input, self.adapter.lora_A) * self.adapter.scale
        # Each rank multiplies B with its own part of A x; the backward sums the parts of B's gradient.
        whole_B = copy_to_tensor_model_parallel_region(self.adapter.lora_B, group=self.tp_group)
        return output + F.linear(inner, whole_B)


_ADAPTED = {ColumnParallelLinear: AdaptedColumnLinear, RowParallelLinear: AdaptedRowLinear}


def add_adapters(model: GPTModel, lora: LoraConfig, layout: Layout, *, seed: int) -> None:
    """Freeze ``model`` and give its target layers fresh adapters: A as PEFT draws it, B 0, the same in every layout.

    The model has Megatron's own linear layers (``build_model`` with ``megatron_linears``).
    """
    model.requires_grad_(False)
    attach(model, lora.shape(), sequence_parallel=layout.sequence_parallel)
    for name, linear in adapted_layers(model):
        # As torch's parametrizations do: the object, and so every reference to it and its weight, stays what it was.
        linear.__class__ = _ADAPTED[type(linear)]
        _draw(linear.adapter, name, layout, seed=seed)
    if model.pre_process and model.config.recompute_granularity is not None:
        model.embedding.register_forward_hook(_require_gradient)


def attach(model: GPTModel, shape: dict[str, Any], *, sequence_parallel: bool = False) -> None:
    """Adapters of a ``LoraConfig.shape`` beside the layers of ``model``, to be loaded and merged."""
    for _, linear in _linear_layers(model, shape["target_modules"]):
        linear.adapter = Adapter(
            linear.weight, rank=shape["rank"], alpha=shape["alpha"], sequence_parallel=sequence_parallel
        )


def _draw(adapter: Adapter, name: str, layout: Layout, *, seed: int) -> None:
    """Kaiming-uniform with a = sqrt(5): U(-b, b), b = 1 / sqrt(I) over all ranks."""
    part_RI = adapter.lora_A
    size, rank = (1, 0) if adapter.is_column else (layout.tensor_parallel_size, layout.tensor_parallel_rank)
    num_inputs = part_RI.shape[1] * size
    whole_RI = torch.rand(part_RI.shape[0], num_inputs, generator=keyed_generator(seed, f"{name}.lora_A"))
    part_RI.data.copy_(((2 * whole_RI - 1) / num_inputs**0.5).chunk(size, dim=1)[rank])


def _require_gradient(_module: torch.nn.Module, _inputs: Any, hidden: torch.Tensor) -> None:
    """Megatron's recomputation gives a layer gradients only where its input has one; a frozen embedding's has not."""
    if torch.is_grad_enabled():
        hidden.requires_grad_()


def _linear_layers(model: GPTModel, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(Global name, module) of this stage's layers of these names."""
    for layer in model.decoder.layers:
        for path in _TARGETS:
            if path.split(".")[-1] in names:
                yield f"decoder.layers.{layer.layer_number - 1}.{path}", layer.get_submodule(path)


def adapted_layers(model: GPTModel) -> list[tuple[str, Any]]:
    """(Global name, linear layer) of this stage's layers with an ``adapter``; none in a model without."""
    everything = tuple(path.split(".")[-1] for path in _TARGETS)
    if model.config.num_moe_experts is not None:
        everything = ("linear_qkv", "linear_proj")
    return [(name, linear) for name, linear in _linear_layers(model, everything) if hasattr(linear, "adapter")]


@contextmanager
def adapters_off(model: GPTModel) -> Iterator[None]:
    """The base model, for the time of the block."""
    found = [linear.adapter for _, linear in adapted_layers(model)]
    try:
        for adapter in found:
            adapter.is_on = False
        yield
    finally:
        for adapter in found:
            adapter.is_on = True


# ------------------------------------------------------------------------------------------------- what is saved


def trained_state(model: GPTModel) -> ShardedStateDict:
    """What a checkpoint keeps of a model: all of it, or with adapters those alone, by names that no layout changes."""
    layers = adapted_layers(model)
    if not layers:
        return model.sharded_state_dict()
    state: ShardedStateDict = {}
    for name, linear in layers:
        gated = model.config.gated_linear_unit and name.endswith("linear_fc1")
        for part in _PARTS:
            state[f"{name}.adapter.{part}"] = _sharded(linear, f"{name}.adapter.{part}", part, gated=gated)
    return state


def _sharded(linear: Any, key: str, part: str, *, gated: bool) -> Any:
    tensor = getattr(linear.adapter, part)
    dim = partition_dim(tensor)
    if dim is None:
        return make_sharded_tensor_for_checkpoint(tensor, key)
    sharded = make_tp_sharded_tensor_for_checkpoint(tensor, key, dim)
    return apply_swiglu_sharded_factory(sharded, ()) if gated and part == "lora_B" else sharded


def load_trained_state(model: GPTModel, state: dict[str, Any]) -> None:
    """Take what `trained_state` described and ``dist_checkpointing.load`` has filled."""
    layers = adapted_layers(model)
    if not layers:
        model.load_state_dict(state)
        return
    for name, linear in layers:
        for part in _PARTS:
            getattr(linear.adapter, part).data.copy_(state[f"{name}.adapter.{part}"])


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".adapter." in name


def merger(model: torch.nn.Module) -> Callable[[torch.nn.Parameter], torch.Tensor]:
    """A function from a parameter of the base to its values with the adapter, if any, added to them."""
    adapters = {linear.weight: linear.adapter for one in chunks_of(model) for _, linear in adapted_layers(one)}

    def merged(parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter not in adapters:
            return parameter.data
        return (parameter.data.float() + adapters[parameter].delta()).to(parameter.dtype)

    return merged


def merge_adapters(model: GPTModel) -> None:
    """Add adapters that were attached to the weights, and take them off."""
    merged = merger(model)
    for _, linear in adapted_layers(model):
        linear.weight.data.copy_(merged(linear.weight))
        del linear.adapter
