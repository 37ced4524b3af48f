"""Which of Megatron's engines generates, and whether with CUDA graphs. Imports no torch.

The engine asks with the model and the layout it has, the checks of a config and the planner with those that the config
describes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_tropd.config import Config, ConfigError
from megatron_tropd.config_context import context_parallel_size
from megatron_tropd.config_layout_checks import expert_sizes
from megatron_tropd.config_require import require
from megatron_tropd.config_rollout import RolloutConfig
from megatron_tropd.config_sides import num_generators


@dataclass(frozen=True)
class Place:
    """A model, and the layout in which it generates."""

    pipeline: int = 1
    context: int = 1
    expert: int = 1
    """Ranks that experts are spread over."""
    has_experts: bool = False
    has_fp8: bool = False

    @property
    def no_dynamic(self) -> str | None:
        """Why dynamic batching is not offered here; None: it is."""
        if self.context > 1:
            return f"parallel.context_parallel_size is {self.context}"
        if self.expert > 1:
            return f"parallel.expert_model_parallel_size is {self.expert}, and ranks that share experts wait for others"
        return None

    @property
    def no_graphs(self) -> str | None:
        """Why CUDA graphs are not offered here; None: they are."""
        if self.pipeline > 1:
            return f"there are {self.pipeline} pipeline stages"
        if self.has_experts:
            return "the model is not dense: experts' counts decide sizes on the host"
        if self.has_fp8:
            return "the model computes in fp8"
        return None


@dataclass(frozen=True)
class Choice:
    """An engine."""

    kind: Literal["static", "dynamic"]
    cuda_graphs: bool
    reason: str


def choose_engine(rollout: RolloutConfig, place: Place, *, on_gpu: bool, block_multiple: int = 1) -> Choice:
    """What ``rollout.engine`` means in this place; ``auto`` is dynamic batching where it has CUDA graphs.

    ``block_multiple``: what the attention here wants KV blocks to be multiples of, in tokens. Raises ConfigError where
    what is asked for cannot run.
    """
    dynamic = rollout.dynamic
    _require_offered(rollout, place)
    small_blocks = None
    if dynamic.block_size_tokens % block_multiple:
        small_blocks = (
            f"rollout.dynamic.block_size_tokens={dynamic.block_size_tokens} is no multiple of {block_multiple}, which "
            "the attention kernels here need"
        )
    if rollout.engine == "static":
        return Choice("static", False, "rollout.engine=static")
    if rollout.engine == "dynamic":
        if dynamic.cuda_graphs and not on_gpu:
            raise ConfigError("rollout.dynamic.cuda_graphs needs a GPU, and there is none: leave it out")
        if small_blocks is not None:
            raise ConfigError(f"{small_blocks}: set it to {block_multiple}")
        graphs = on_gpu and place.no_graphs is None and dynamic.cuda_graphs is not False
        return Choice("dynamic", graphs, "rollout.engine=dynamic" + ", CUDA graphs" * graphs)
    switched_off = "rollout.dynamic.cuda_graphs=false" if dynamic.cuda_graphs is False else None
    obstacle = place.no_dynamic or place.no_graphs or switched_off or small_blocks
    if not on_gpu:
        obstacle = "there is no GPU"
    if obstacle is not None:
        return Choice("static", False, f"auto: no dynamic batching with CUDA graphs, for {obstacle}")
    return Choice("dynamic", True, "auto: with CUDA graphs, the fastest where all were measured")


def _require_offered(rollout: RolloutConfig, place: Place) -> None:
    require(
        rollout.engine != "dynamic" or place.no_dynamic is None,
        f"rollout.engine=dynamic is not offered where {place.no_dynamic}: set rollout.engine=static",
    )
    require(
        not rollout.dynamic.cuda_graphs or place.no_graphs is None,
        f"rollout.dynamic.cuda_graphs=true is not offered where {place.no_graphs}: leave it out",
    )


def check_engine(config: Config, command: str, *, pipeline: int) -> None:
    """Raise ConfigError where the engine asked for is not offered; ``pipeline``: of the layout that starts."""
    places = [generation_place(config, command, pipeline=pipeline)]
    if num_generators(config, command):  # evaluations use the trainer's weights
        places.append(replace(places[0], pipeline=pipeline))
    for place in places:
        _require_offered(config.rollout, place)


def generation_place(config: Config, command: str, *, pipeline: int) -> Place:
    """Where and what ``command`` generates; ``pipeline`` as in ``check_engine``."""
    model = config.teacher if command == "generate" else config.student
    kind = {
        "has_experts": model is not None and model.num_moe_experts is not None,
        "has_fp8": model is not None and model.fp8 is not None,
    }
    if command != "generate" and config.rollout.tensor_model_parallel_size is not None:
        return Place(**kind)  # the copy has no other parallelism
    expert, _ = expert_sizes(config, command, 1)
    return Place(pipeline, context_parallel_size(config, command), expert, **kind)
