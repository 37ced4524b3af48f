"""The task's verdict on a rollout as an advantage beside the teacher's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_tropd.types import Rollout
from megatron_tropd.verify import is_correct


def task_advantages(
    rollouts: Sequence[Rollout],
    decode: Callable[[Sequence[int]], str],
    *,
    eos_id: int,
    samples_per_prompt: int,
    coefficient: float,
    group: dist.ProcessGroup,
) -> tuple[dict[int, float], float]:
    """``coefficient`` times (right or not, less the mean of its prompt's samples) by sample id; and the share right.

    A sample is right where `verify.is_correct` says so of prefix + response without the end token. The samples of a
    prompt may be on several of the data-parallel ranks in ``group``: their verdicts travel, the rollouts do not. Not
    divided by a standard deviation, which would weigh prompts by how often they are solved. A prompt without a
    reference answer is never right, so its samples have advantage 0.
    """
    mine = {rollout.request.sample_id: float(_is_right(rollout, decode, eos_id)) for rollout in rollouts}
    everyone = [mine]
    if group.size() > 1:
        everyone = [{} for _ in range(group.size())]
        dist.all_gather_object(everyone, mine, group=group)
    verdicts = {sample_id: verdict for found in everyone for sample_id, verdict in found.items()}
    by_prompt = defaultdict(list)
    for sample_id in sorted(verdicts):
        by_prompt[sample_id // samples_per_prompt].append(verdicts[sample_id])
    means = {prompt: sum(found) / len(found) for prompt, found in by_prompt.items()}
    advantages = {
        sample_id: coefficient * (verdict - means[sample_id // samples_per_prompt])
        for sample_id, verdict in mine.items()
    }
    return advantages, sum(verdicts.values()) / max(len(verdicts), 1)


def _is_right(rollout: Rollout, decode: Callable[[Sequence[int]], str], eos_id: int) -> bool:
    tokens = [*rollout.request.prefix, *rollout.response]
    if tokens[-1:] == [eos_id]:
        tokens.pop()
    return is_correct(decode(tokens), rollout.request.prompt.answer)
