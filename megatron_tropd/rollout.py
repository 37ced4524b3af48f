"""Generation by Megatron inference, continuing prompt + teacher prefix.

DESIGN 6. The engine reads the very parameters the optimizer moves, or a copy in another layout (``refit``). A
response depends on (seed, sample id, prompt, prefix) alone, not on the batch it was generated in nor on the
parallel layout, up to the rounding of matrix products: every token is the inverse CDF of the model's
distribution at one counter-based uniform.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch.distributed as dist

from megatron_tropd.config_rollout import RolloutConfig
from megatron_tropd.distributed import ON_CPU, Layout
from megatron_tropd.dynamic_engine import DynamicEngine
from megatron_tropd.engine_choice import Place, choose_engine
from megatron_tropd.paged_attention import block_multiple
from megatron_tropd.sampling import SamplingOptions
from megatron_tropd.static_engine import StaticEngine
from megatron_tropd.types import Rollout, RolloutRequest

# isort: split
from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)


class RolloutEngine(Protocol):
    """What the trainer, the teacher-answer generator and the evaluation ask to generate."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_length: int,
        max_new_tokens: int | None = None,
        enough: int | None = None,
    ) -> list[Rollout]:
        """Continue every request to its end token or to ``max_response_length`` tokens of prefix + earlier + response.

        The rollouts come in the order of the requests; ``response`` holds what this call has generated, not what was
        ``earlier``. A request that has its end token, or fills the budget, gets an empty response. Every rank of one
        model replica (tensor x pipeline parallel) calls it with the same requests and gets the same rollouts; replicas
        are independent, one may have none.

        ``max_new_tokens``, at least 1, is the most of one response. What it cuts off comes back unfinished, and goes on
        where a later call has those tokens as ``earlier``: draws are keyed on (seed, sample id, position), so that
        under the same weights the pieces are what one call gives, up to the rounding of matrix products.

        With ``enough`` it stops as soon as it is certain which that many requests end with the fewest new tokens (by
        an end token or a full ``max_response_length``). Those, and all that end with as many, come back whole; the
        others cut off anywhere. An engine may go on for longer than it has to.
        """
        ...


def build_engine(
    model: GPTModel,
    layout: Layout,
    config: RolloutConfig,
    *,
    vocab_size: int,
    eos_id: int,
    seed: int,
    with_entropies: bool = False,
) -> RolloutEngine:
    """The engine this machine runs ``config`` with (``engine_choice``). Raises ConfigError where it cannot.

    ``vocab_size`` is the number of ids student and teacher share; ``eos_id`` ends a response; ``seed`` keys
    the draws; ``with_entropies`` records the student's entropy at every sampled token.
    """
    place = Place(
        layout.pipeline_size,
        layout.context_parallel_size,
        layout.expert_parallel_size,
        has_experts=model.config.num_moe_experts is not None,
        has_fp8=model.config.fp8 is not None,
    )
    multiple = block_multiple(model.config.params_dtype)
    choice = choose_engine(config, place, on_gpu=not ON_CPU, block_multiple=multiple)
    logger.info("rollout engine: %s (%s)", choice.kind, choice.reason)
    options = SamplingOptions(
        vocab_size, eos_id, config.max_batch_size, config.temperature, config.top_p, seed, with_entropies
    )
    if choice.kind == "dynamic":
        return DynamicEngine(model, layout, options, replace(config.dynamic, cuda_graphs=choice.cuda_graphs))
    engine = StaticEngine(model, layout, options)
    return engine if layout.context_parallel_size == 1 else ContextParallelEngine(engine, layout)


class ContextParallelEngine:
    """Spreads the requests of a replica over its context-parallel ranks, each of which has the whole model."""

    def __init__(self, engine: RolloutEngine, layout: Layout):
        self._engine = engine
        self._layout = layout

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_length: int,
        max_new_tokens: int | None = None,
        enough: int | None = None,
    ) -> list[Rollout]:
        """See ``RolloutEngine``; the context-parallel ranks of a replica call it with the same requests too."""
        assert enough is None, "over-sampling decides over all requests of a replica: refused with the config"
        rank, size = self._layout.context_parallel_rank, self._layout.context_parallel_size
        mine = self._engine.generate(
            requests[rank::size], max_response_length=max_response_length, max_new_tokens=max_new_tokens
        )
        shares: list[list[Rollout]] = [[] for _ in range(size)]
        dist.all_gather_object(shares, mine, group=self._layout.groups.cp)
        return [shares[index % size][index // size] for index in range(len(requests))]
