"""Ranks whose micro-batches have to be in step get as many, by micro-batches of padding."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_tropd.batch import PADDING_SAMPLE
from megatron_tropd.distributed import Layout
from megatron_tropd.types import Batch, MicroBatch


def in_step(batch: Batch, layout: Layout) -> Batch:
    """``batch`` with as many micro-batches as ``layout`` asks for; those that are added have no token.

    Ranks that share experts exchange tokens in every layer, so all data-parallel ranks run the same number. Interleaved
    pipeline stages take turns in groups of as many micro-batches as there are stages.
    """
    count = len(batch.micro_batches)
    if layout.expert_parallel_size > 1:
        most = torch.tensor(count, device=layout.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=layout.groups.dp)
        count = int(most)
    if layout.virtual_pipeline_size > 1:
        count += -count % layout.pipeline_size
    added = (_padding_like(batch.micro_batches[-1]),) * (count - len(batch.micro_batches))
    return replace(batch, micro_batches=batch.micro_batches + added)


def _padding_like(one: MicroBatch) -> MicroBatch:
    """A micro-batch of a single row without a token, as long as the rows of ``one``."""
    rows = {
        name: value[:1].new_zeros((1, value.shape[1]))
        for name, value in vars(one).items()
        if name.endswith("_BS") and value is not None
    }
    places = {name: value[:0] for name, value in vars(one).items() if name.endswith("_N") and value is not None}
    return replace(
        one,
        **rows | {"padding_BS": torch.ones_like(rows["padding_BS"])},
        **places,
        sample_ids=(PADDING_SAMPLE,),
        num_tokens=0,
        num_loss_terms=0,
    )
