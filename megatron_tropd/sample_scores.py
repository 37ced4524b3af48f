"""Which samples of a global batch to look at when its step is refused.

Shape suffixes: ``B`` sequences of a micro-batch, ``N`` positions that carry loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist

from megatron_tropd.batch import PADDING_SAMPLE
from megatron_tropd.types import MicroBatch, TokenRegion

Score = Literal["loss", "log_prob_gap"]


class SampleScores:
    """What each sample of this rank's micro-batches brings to the loss, and to the gap between engine and trainer.

    Filled on the last stage, where the loss is; nothing comes back from the device until a step is refused.
    """

    def __init__(self, *, context_rank: int) -> None:
        """``context_rank``: this context-parallel rank, which has a part of each sample's positions."""
        self._context_rank = context_rank
        self._found: list[tuple[tuple[int, ...], dict[Score, torch.Tensor]]] = []

    def add(self, batch: MicroBatch, loss_N: torch.Tensor, report: Mapping[str, torch.Tensor]) -> None:
        """One micro-batch: ``loss_N`` and the report's tensors hold a value for each position that carries loss."""
        fresh_N = batch.regions_BS.flatten()[batch.loss_positions_N] == TokenRegion.ON_POLICY
        if batch.stale_BS is not None:
            fresh_N &= ~batch.stale_BS.flatten()[batch.loss_positions_N]
        gap_N = (report["student_log_prob"] - batch.rollout_log_probs_BS.flatten()[batch.loss_positions_N]).abs()

        def by_sample(values_N: torch.Tensor) -> torch.Tensor:
            sums_B = torch.zeros(len(batch.sample_ids), dtype=torch.float64, device=values_N.device)
            return sums_B.index_add(0, batch.rows_N, values_N.detach().double())

        scores: dict[Score, torch.Tensor] = {
            "loss": by_sample(loss_N.abs()),
            "log_prob_gap": by_sample(gap_N.where(fresh_N, 0)),
        }
        self._found.append((batch.sample_ids, scores))

    def non_finite(self) -> list[int]:
        """Samples of all ranks, sorted, whose loss is not finite; every rank calls it."""
        return sorted(sample for sample, score in self._of_all_ranks("loss").items() if not math.isfinite(score))

    def worst(self, score: Score, count: int) -> list[int]:
        """The ``count`` samples of all ranks with the highest score, the worst first; every rank calls it.

        ``loss``: the sum of abs(loss) over the sample's tokens, as it is weighted in the step's loss; ``log_prob_gap``:
        the sum of abs(trainer - engine) log-prob over its on-policy tokens that the weights of now sampled. Nats.
        """
        scores = self._of_all_ranks(score)
        return sorted(scores, key=lambda sample: (-scores[sample], sample))[:count]

    def _of_all_ranks(self, score: Score) -> dict[int, float]:
        mine = {
            (sample, self._context_rank): value
            for samples, scores in self._found
            for sample, value in zip(samples, scores[score].tolist(), strict=True)
            if sample != PADDING_SAMPLE
        }
        shares: list[dict[tuple[int, int], float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, mine)  # tensor-parallel ranks have the same samples with the same bits
        sums: dict[int, float] = defaultdict(float)
        for (sample, _), value in sorted(dict(chain.from_iterable(share.items() for share in shares)).items()):
            sums[sample] += value
        return sums
