"""What every engine asks of the requests it is given, and what it makes of their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_tropd.types import Rollout, RolloutRequest


def written(request: RolloutRequest) -> tuple[int, ...]:
    """What counts against the budget already: the prefix and what was generated earlier."""
    return request.prefix + request.earlier


def num_given_tokens(request: RolloutRequest) -> int:
    """Tokens the engine starts from: prompt, prefix, and what was generated earlier."""
    return len(request.prompt.tokens) + len(written(request))


def refuse_what_does_not_fit(
    requests: Sequence[RolloutRequest], *, max_response_length: int, max_sequence_length: int
) -> None:
    """Raise ValueError where a sequence could outgrow the model or a prefix its budget."""
    for request in requests:
        prompt = request.prompt
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id!r} has no tokens: there is nothing to continue")
        if len(written(request)) > max_response_length:
            raise ValueError(
                f"sample {request.sample_id}: a prefix of {len(written(request))} tokens exceeds "
                f"max_response_length = {max_response_length}, the budget of prefix + response: "
                "cut the one or raise the other"
            )
        if len(prompt.tokens) + max_response_length > max_sequence_length:
            raise ValueError(
                f"prompt {prompt.id!r} of {len(prompt.tokens)} tokens + max_response_length = "
                f"{max_response_length} exceeds the model's longest sequence, "
                f"{max_sequence_length}: shorten one of them"
            )


def begin(
    requests: Sequence[RolloutRequest], *, eos_id: int, max_response_length: int
) -> tuple[list[Rollout], list[int]]:
    """The rollouts of ``requests`` before anything is added, and the indices of those that have not ended."""
    rollouts = [Rollout(one, response=(), log_probs=(), finished=written(one)[-1:] == (eos_id,)) for one in requests]
    return rollouts, [
        index
        for index, rollout in enumerate(rollouts)
        if not rollout.finished and len(written(rollout.request)) < max_response_length
    ]


def checked_rollout(
    request: RolloutRequest,
    response: Sequence[int],
    log_probs: Sequence[float],
    entropies: Sequence[float],
    *,
    eos_id: int,
) -> Rollout:
    """The rollout of a response; raises ValueError where its log-probs are not numbers."""
    if not all(map(math.isfinite, log_probs)):
        raise ValueError(f"sample {request.sample_id}: the model's logits are not finite; its weights are broken")
    return Rollout(request, tuple(response), tuple(log_probs), tuple(response[-1:]) == (eos_id,), tuple(entropies))
