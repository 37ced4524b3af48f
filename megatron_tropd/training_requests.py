"""What the engine is asked for in training: prompts in their order, and the teacher prefixes of a step."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tropd.answers import AnswerStore
from megatron_tropd.config import Config, resolved_fraction, resolved_schedule
from megatron_tropd.guidance import build_requests, expected_length, max_prefix_length
from megatron_tropd.mixture import Mixture
from megatron_tropd.types import RolloutRequest


class Requests:
    """Sample i of a run is sample i mod ``rollout.samples_per_prompt`` of the prompt at place i div that."""

    def __init__(self, config: Config, mixture: Mixture, store: AnswerStore | None):
        """``store`` holds the teacher's answers; None where the guidance schedule gives no prefix."""
        self._config, self._mixture, self._store = config, mixture, store
        self._samples_per_prompt = config.rollout.samples_per_prompt

    def begin(self, first_sample_id: int, count: int, step: int) -> list[RolloutRequest]:
        """The samples ``[first_sample_id, first_sample_id + count)``, with the prefixes that the schedule of ``step``
        gives them."""
        size, guidance = self._samples_per_prompt, self._config.guidance
        place, offset = divmod(first_sample_id, size)
        requests = build_requests(
            self._mixture.at(place, -(-(offset + count) // size)),
            first_sample_id=place * size,
            samples_per_prompt=size,
            seed=self._config.training.seed,
            store=self._store,
            max_length=longest_prefix(self._config, step),
            draw=guidance.prefix_draw,
            min_on_policy_tokens=guidance.min_on_policy_tokens,
            fraction=resolved_fraction(self._config),
        )
        return requests[offset : offset + count]

    def again(self, sample_id: int, prefix: Sequence[int]) -> RolloutRequest:
        """The request that a sample with this ``prefix`` was begun with."""
        (prompt,) = self._mixture.at(sample_id // self._samples_per_prompt, 1)
        return RolloutRequest(sample_id, prompt, tuple(prefix))

    def expected_length(self, request: RolloutRequest, max_new_tokens: int | None = None) -> int:
        """See ``guidance.expected_length``."""
        return expected_length(
            request,
            samples_per_prompt=self._samples_per_prompt,
            max_response_length=self._config.rollout.max_response_length,
            store=self._store,
            max_new_tokens=max_new_tokens,
        )

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source of a mixture has been through after so many samples; see ``Mixture.epochs``."""
        return self._mixture.epochs_at(num_samples // self._samples_per_prompt)


def longest_prefix(config: Config, step: int) -> int:
    """L_max of METHOD 1 at ``step``, tokens."""
    longest = config.guidance.max_prefix_length
    if longest is None:
        longest = config.rollout.max_response_length
    return max_prefix_length(resolved_schedule(config), step, config.training.train_iters, longest)
