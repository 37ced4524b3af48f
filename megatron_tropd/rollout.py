"""Generation by Megatron inference, continuing prompt + teacher prefix.

DESIGN 6. The engine reads the very parameters the optimizer moves, or a copy in another layout (``refit``). A
response depends on (seed, sample id, prompt, prefix) alone, not on the batch it was generated in nor on the
parallel layout, up to the rounding of matrix products: every token is the inverse CDF of the model's
distribution at one counter-based uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_tropd.config import RolloutConfig
from megatron_tropd.distributed import Layout
from megatron_tropd.static_engine import StaticEngine
from megatron_tropd.types import Rollout, RolloutRequest

# isort: split
from megatron.core.models.gpt import GPTModel


class RolloutEngine(Protocol):
    """What the trainer, the teacher-answer generator and the evaluation ask to generate."""

    def generate(self, requests: Sequence[RolloutRequest], *, max_response_length: int) -> list[Rollout]:
        """Continue every request to its end token or to ``max_response_length`` tokens of prefix + response.

        The rollouts come in the order of the requests. Every rank of one model replica (tensor x pipeline
        parallel) calls it with the same requests and gets the same rollouts; replicas are independent, one
        may have none.
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
    """The engine this machine runs ``config`` with: the one place that chooses.

    ``vocab_size`` is the number of ids student and teacher share; ``eos_id`` ends a response; ``seed`` keys
    the draws; ``with_entropies`` records the student's entropy at every sampled token.
    """
    return StaticEngine(
        model,
        layout,
        vocab_size=vocab_size,
        eos_id=eos_id,
        max_batch_size=config.max_batch_size,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        with_entropies=with_entropies,
    )
