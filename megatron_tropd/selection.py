"""Which on-policy tokens of a global batch are learned from: those where the student was least certain.

The engine has the whole distribution at hand when it samples, so every entropy is known before the training step: the
quantile needs no second pass over the models, and tokens that are left out never reach an output layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_tropd.types import Rollout


def top_entropy_tokens(
    rollouts: Sequence[Rollout], share: float, group: dist.ProcessGroup
) -> tuple[dict[int, np.ndarray], float]:
    """For each of this replica's samples, by id, a bool for each response token; and the lowest entropy kept, nats.

    ``share`` in (0, 1]: of all n response tokens of the data-parallel ranks in ``group``, the ceil(share * n) of
    highest entropy are kept. Between equal entropies the lower sample id goes first, then the earlier token, so the
    choice does not depend on how samples are spread. The threshold is 0 where nobody has a token.
    """
    mine = [(rollout.request.sample_id, np.array(rollout.entropies, dtype=np.float32)) for rollout in rollouts]
    everyone = [mine]
    if group.size() > 1:
        everyone = [[] for _ in range(group.size())]
        dist.all_gather_object(everyone, mine, group=group)
    samples = sorted((sample for found in everyone for sample in found), key=lambda sample: sample[0])
    entropies = np.concatenate([values for _, values in samples]) if samples else np.zeros(0, dtype=np.float32)
    count = math.ceil(share * len(entropies))
    order = np.argsort(-entropies, kind="stable")[:count]
    kept = np.zeros(len(entropies), dtype=bool)
    kept[order] = True
    ends = np.cumsum([len(values) for _, values in samples])
    by_sample = {sample_id: part for (sample_id, _), part in zip(samples, np.split(kept, ends[:-1]), strict=True)}
    threshold = float(entropies[order[-1]]) if count else 0.0
    return {sample_id: by_sample[sample_id] for sample_id, _ in mine}, threshold
