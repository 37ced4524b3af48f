"""Off-policy guidance (METHOD 1): how much of a teacher's answer a rollout starts from.

A trajectory is prompt, teacher prefix, the student's continuation. The end token of a finished answer is one
of its tokens: a prefix that is a whole answer leaves the student nothing to write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from megatron_tropd.answers import AnswerStore
from megatron_tropd.config import Schedule
from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.prompt import Prompt
from megatron_tropd.types import RolloutRequest


def max_prefix_length(schedule: Schedule, step: int, total_steps: int, longest: int) -> int:
    """L_max at ``step`` of ``total_steps``, in tokens, halves rounded up.

    ``longest`` is METHOD's L_train. With t = step / total_steps and L = longest:

    ==============  ===============================  ==========================
    half-cosine     L (1 + cos(pi t)) / 2            METHOD 1, the default
    quarter-cosine  L cos(pi t / 2)
    linear          L (1 - t)
    exponential     (L + 1)^(1 - t) - 1              L + 1 decays by a constant factor to 1 [choice]
    constant        L
    none            0
    ==============  ===============================  ==========================

    Raises ValueError for another schedule, or a step outside [0, total_steps].
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step {step} is not in [0, {total_steps}], the steps of the prefix schedule")
    t = step / total_steps
    match schedule:
        case "half-cosine":
            length = 0.5 * longest * (1.0 + math.cos(math.pi * t))
        case "quarter-cosine":
            length = longest * math.cos(0.5 * math.pi * t)
        case "linear":
            length = longest * (total_steps - step) / total_steps
        case "exponential":
            length = (longest + 1.0) ** (1.0 - t) - 1.0
        case "constant":
            length = longest
        case "none":
            length = 0
        case _:
            raise ValueError(f"guidance.schedule {schedule!r} is unknown: one of {', '.join(get_args(Schedule))}")
    return math.floor(length + 0.5)


def prefix_length(
    answer_length: int,
    max_length: int,
    draw: Literal["truncate", "uniform"] = "truncate",
    uniform: float = 0.0,
    min_on_policy_tokens: int = 0,
) -> int:
    """Tokens of an answer that become the prefix: min(|answer|, limit), with a minimum left to the student.

    The limit is ``max_length`` (METHOD's L_max), or with ``draw="uniform"`` an integer drawn uniformly in [0,
    max_length] by ``uniform`` in [0, 1). At least ``min_on_policy_tokens`` of the answer are left off the
    prefix; an answer that is no longer than that gives none.
    """
    limit = max_length if draw == "truncate" else math.floor(uniform * (max_length + 1))
    return max(0, min(answer_length - min_on_policy_tokens, limit))


def build_requests(
    prompts: Sequence[Prompt],
    *,
    first_sample_id: int,
    samples_per_prompt: int,
    seed: int,
    store: AnswerStore | None = None,
    max_length: int = 0,
    draw: Literal["truncate", "uniform"] = "truncate",
    min_on_policy_tokens: int = 0,
    fraction: float = 1.0,
) -> list[RolloutRequest]:
    """The rollout requests of ``prompts`` over all ranks.

    They come as the samples of the first prompt, then those of the second, ..., with sample ids that count from
    ``first_sample_id``, a multiple of ``samples_per_prompt``. Sample j of a prompt continues its stored answer j mod n.
    ``max_length`` is this step's L_max; at 0, or without a store, no prefix is given. A sample gets a prefix
    where its own draw is below ``fraction``: the samples of a smaller fraction are among those of a larger
    one. Depends on the arguments alone. Raises ValueError for a prompt that the store does not answer.
    """
    sample_ids = torch.arange(first_sample_id, first_sample_id + len(prompts) * samples_per_prompt)
    shares = uniforms(seed, Stream.PREFIX_FRACTION, sample_ids, 0).tolist()
    lengths = uniforms(seed, Stream.PREFIX_LENGTH, sample_ids, 0).tolist()
    requests = []
    for index, sample_id in enumerate(sample_ids.tolist()):
        prompt, sample = prompts[index // samples_per_prompt], index % samples_per_prompt
        prefix: tuple[int, ...] = ()
        if store is not None and max_length > 0 and shares[index] < fraction:
            tokens = store.answer(prompt, sample).tokens
            length = prefix_length(len(tokens), max_length, draw, lengths[index], min_on_policy_tokens)
            prefix = tuple(tokens[:length])
        requests.append(RolloutRequest(sample_id, prompt, prefix))
    return requests


def expected_length(
    request: RolloutRequest,
    *,
    samples_per_prompt: int,
    max_response_length: int,
    store: AnswerStore | None = None,
    max_new_tokens: int | None = None,
) -> int:
    """Tokens of the trajectory that generating for ``request`` is expected to give, for spreading requests over ranks.

    The student is taken to stop where the teacher's answer to the prompt does. Without one, or where what is written
    has outgrown it, the response may fill its budget of ``max_response_length``, or ``max_new_tokens`` where that is
    less.
    """
    written = len(request.prefix) + len(request.earlier)
    left = max_response_length - written
    if store is not None:
        answer = len(store.answer(request.prompt, request.sample_id % samples_per_prompt).tokens)
        left = min(left, answer - written) if answer > written else left
    new = left if max_new_tokens is None else min(left, max_new_tokens)
    return len(request.prompt.tokens) + written + new
