"""Core attention of the local layer spec, on PyTorch's fused kernels.

Megatron's own ``DotProductAttention`` keeps the whole ``[B, heads, S, S]``, and takes neither packed sequences nor
context parallelism. This one never has that matrix where PyTorch has a fused kernel for the device and the type (flash
or memory-efficient attention).

Shape suffixes: ``S`` positions of the queries, ``K`` positions of keys and values, ``C`` this context-parallel rank's
share of them, ``B`` sequences (1 where they are packed), ``A`` query heads of this tensor-parallel rank, ``G`` its
key/value heads, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_tropd.distributed import ON_CPU

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


class CausalAttention(MegatronModule):
    """Causal self-attention with the signature of Megatron's ``DotProductAttention``; it has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        assert config.attention_dropout == 0.0 and config.window_size is None and config.softmax_type == "vanilla"
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """``[S, B, A * D]`` from queries ``[S, B, A, D]``, keys and values ``[K, B, G, D]``.

        The queries are the last S of the K positions: all of them in training, and those not yet in the cache when
        Megatron's engine generates. As in TransformerEngine's attention the mask follows from that alone, so
        ``attention_mask`` and ``attn_mask_type`` (which the engine turns to ``no_mask`` to decode) are not read.

        Packed sequences come without the dimension B, behind one another, and so does the result. With context
        parallelism each rank has of every sequence the positions that `packing.context_parallel_part` gives it.
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        context = self._attend(query, key, value, packed_seq_params).flatten(2)
        return context if packed_seq_params is None else context.squeeze(1)

    def _attend(
        self, query_SBAD: torch.Tensor, key_KBGD: torch.Tensor, value_KBGD: torch.Tensor, packed: PackedSeqParams | None
    ) -> torch.Tensor:
        size = self.config.context_parallel_size  # 1 while the engine generates
        lengths = [query_SBAD.shape[0]] if packed is None else (packed.cu_seqlens_q.diff() // size).tolist()
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(key_KBGD, value_KBGD)]
        attend = causal_attention
        if size > 1:
            pairs = gathered_sequences(key_KBGD, value_KBGD, lengths, self.context_group)
            attend = partial(two_chunks, rank=self.context_group.rank(), size=size)
        elif packed is not None:
            pairs = zip(key_KBGD.split(lengths), value_KBGD.split(lengths), strict=True)
        contexts = [
            attend(query, key, value, scale=self.softmax_scale)
            for query, (key, value) in zip(query_SBAD.split(lengths), pairs, strict=True)
        ]
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def causal_attention(
    query_SBAD: torch.Tensor, key_KBGD: torch.Tensor, value_KBGD: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """``[S, B, A, D]``: each of the last S of K positions attends to itself and all before it.

    ``scale`` multiplies queries by keys; None: 1 / sqrt(D). Softmax in fp32. Deterministic, backward included, where
    PyTorch is told to be.
    """
    query_BASD, key_BGKD, value_BGKD = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBAD, key_KBGD, value_KBGD))
    num_queries, num_keys = query_BASD.shape[2], key_BGKD.shape[2]
    grouped = query_BASD.shape[1] != key_BGKD.shape[1]
    if grouped and query_BASD.dtype is torch.float32 and not ON_CPU:
        # On GPUs the fused kernel for fp32 (memory-efficient attention) does not share heads by itself.
        repeats = query_BASD.shape[1] // key_BGKD.shape[1]
        key_BGKD, value_BGKD = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key_BGKD, value_BGKD))
        grouped = False
    context_BASD = scaled_dot_product_attention(
        query_BASD,
        key_BGKD,
        value_BGKD,
        attn_mask=causal_lower_right(num_queries, num_keys) if 1 < num_queries < num_keys else None,
        is_causal=num_queries == num_keys,
        scale=scale,
        enable_gqa=grouped,
    )
    return context_BASD.permute(2, 0, 1, 3)


def two_chunks(
    query_SBAD: torch.Tensor,
    key_KBGD: torch.Tensor,
    value_KBGD: torch.Tensor,
    *,
    rank: int,
    size: int,
    scale: float | None = None,
) -> torch.Tensor:
    """`causal_attention` of a context-parallel rank's positions to a whole sequence: chunk ``rank`` of 2 x
    ``size``, and the one as far from the end, as `packing.context_parallel_part` cuts."""
    contexts = []
    for chunk, number in zip(query_SBAD.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
        end = (number + 1) * chunk.shape[0]
        contexts.append(causal_attention(chunk, key_KBGD[:end], value_KBGD[:end], scale=scale))
    return torch.cat(contexts)


def gathered_sequences(
    key_CBGD: torch.Tensor, value_CBGD: torch.Tensor, lengths: Sequence[int], group: dist.ProcessGroup
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values ``[K, B, G, D]`` of each whole sequence, gathered over the context-parallel ``group``.

    ``lengths``: this rank's positions of each. The backward sums every rank's gradient where the positions came from.
    """
    both_CBGE = torch.cat([key_CBGD, value_CBGD], dim=-1)
    gathered = gather_from_sequence_parallel_region(both_CBGE, group=group)
    for of_ranks in gathered.unflatten(0, (group.size(), -1)).split(lengths, dim=1):
        # A rank has the chunk of its number from the front, then that from the back.
        front, back = of_ranks.chunk(2, dim=1)
        whole_KBGE = torch.cat([front, back.flip(0)]).flatten(0, 1)
        yield whole_KBGE[..., : key_CBGD.shape[-1]], whole_KBGE[..., key_CBGD.shape[-1] :]
