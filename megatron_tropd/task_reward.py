"""The task's verdict on a rollout as an advantage beside the teacher's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_tropd.types import Rollout
from megatron_tropd.verify import VerifierOptions, verify


def task_advantages(
    rollouts: Sequence[Rollout],
    decode: Callable[[Sequence[int]], str],
    *,
    eos_id: int,
    samples_per_prompt: int,
    coefficient: float,
    options: VerifierOptions | None = None,
    judges: bool = True,
    group: dist.ProcessGroup,
) -> tuple[dict[int, float], float]:
    """``coefficient`` times (the verifier's score, less the mean of its prompt's samples) by sample id; the mean score.

    The verifier judges prefix + response without the end token, on the one rank of each model replica that ``judges``:
    a time limit must not fall otherwise on another. The samples of a prompt may be on several replicas; the verdicts
    travel to all ranks of ``group``, which spans them, the rollouts do not. Not divided by a standard deviation, which
    would weigh prompts by how often they are solved.
    """
    judged = rollouts if judges else ()
    mine = {rollout.request.sample_id: _score(rollout, decode, eos_id, options) for rollout in judged}
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
        rollout.request.sample_id: coefficient
        * (verdicts[rollout.request.sample_id] - means[rollout.request.sample_id // samples_per_prompt])
        for rollout in rollouts
    }
    return advantages, sum(verdicts.values()) / max(len(verdicts), 1)


def _score(
    rollout: Rollout, decode: Callable[[Sequence[int]], str], eos_id: int, options: VerifierOptions | None
) -> float:
    tokens = [*rollout.request.prefix, *rollout.request.earlier, *rollout.response]
    if tokens[-1:] == [eos_id]:
        tokens.pop()
    prompt = rollout.request.prompt
    return verify(prompt.verifier, decode(tokens), prompt.answer, prompt.details, options).score
