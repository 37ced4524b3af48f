"""The teacher's vocabulary in the student's ids: rows of its weights change places, once, when it has been loaded.

So no step knows of it: whatever reads the teacher's logits at an id of the student's (the loss over vocabulary shards,
a teacher that judges ahead, the engine that lets it answer) finds the row that judges that id.

Shape suffixes: ``V`` vocabulary shard, ``M`` ids that move, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_tropd.special_tokens import TokenMap

# isort: split
from megatron.core.models.gpt import GPTModel


def relabel_vocabulary(teacher: GPTModel, mapped: TokenMap, tp_group: dist.ProcessGroup) -> None:
    """Let the frozen ``teacher`` (this rank's slice) read and judge the student's ids in place of its own.

    Row ``i`` of its output weight becomes the row of ``mapped.judged[i]``; the embedding's rows move alike, the two may
    be one tensor, and its input is translated such that ``i`` is read as ``mapped.feed(i)``.
    """
    judged = mapped.judged
    if not judged:
        return
    embedding = teacher.embedding.word_embeddings if teacher.pre_process else None
    heads = [teacher.output_layer.weight] if teacher.post_process else []
    weights = [weight for weight in (*heads, getattr(embedding, "weight", None)) if weight is not None]
    for weight_VH in {id(weight): weight for weight in weights}.values():
        move_rows(weight_VH.data, judged, tp_group)
    place = {theirs: ours for ours, theirs in judged.items()}
    read_as = {ours: place.get(mapped.feed(ours), mapped.feed(ours)) for ours in judged}
    moved = {ours: row for ours, row in read_as.items() if ours != row}
    if embedding is not None and moved:
        embedding.register_forward_pre_hook(lambda _module, inputs: (_translated(inputs[0], moved), *inputs[1:]))


def move_rows(weight_VH: torch.Tensor, sources: Mapping[int, int], group: dist.ProcessGroup) -> None:
    """Row i becomes what row ``sources[i]`` was, over the shards of the group, in place. Exact: one rank has each."""
    first = group.rank() * weight_VH.shape[0]

    def mine(row: int) -> bool:
        return first <= row < first + weight_VH.shape[0]

    rows_MH = torch.zeros(len(sources), weight_VH.shape[1], dtype=torch.float32, device=weight_VH.device)
    for index, source in enumerate(sources.values()):
        if mine(source):
            rows_MH[index] = weight_VH[source - first]
    dist.all_reduce(rows_MH, group=group)
    for index, row in enumerate(sources):
        if mine(row):
            weight_VH[row - first] = rows_MH[index].to(weight_VH.dtype)


def _translated(ids: torch.Tensor, moved: Mapping[int, int]) -> torch.Tensor:
    found = ids
    for ours, row in moved.items():
        found = found.masked_fill(ids == ours, row)
    return found
