"""Attention of Megatron's dynamic batching, where the flash-attn kernels that it asks for are not installed.

Keys and values lie in pages (KV blocks of a fixed number of tokens) anywhere in one buffer; a request's row of the
block table names its pages in order. Megatron packs the queries of a step without padding between requests: first one
token for each decoding request, then the chunks of the requests whose prompts are being read.

Shape suffixes: ``T`` packed query tokens, ``R`` requests, ``N`` pages of a request, ``P`` pages of the buffer,
``L`` tokens of a page, ``Q`` query tokens and ``K`` key tokens of one request, ``H`` query heads, ``G`` key/value
heads, ``D`` width of a head.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tropd.distributed import ON_CPU
from megatron_tropd.kernels.backend import chosen_backend

# isort: split
from megatron.core.inference.contexts import BaseInferenceContext, DynamicInferenceContext
from megatron.core.transformer import attention
from megatron.core.transformer.attention import SelfAttention


def have_flash_attention(dtype: torch.dtype) -> bool:
    """Whether Megatron's own kernels for dynamic batching (flash-attn 2.7.3, 3 or 4) can run here, in ``dtype``."""
    if ON_CPU or dtype not in (torch.bfloat16, torch.float16):
        return False
    if attention.HAVE_FA3 or attention.HAVE_FA4:
        return True
    return attention.flash_attn_varlen_func is not None and bool(attention.is_fa_min_version("2.7.3"))


def block_multiple(dtype: torch.dtype) -> int:
    """What the tokens of a KV block must be a multiple of in ``dtype``: 256 for flash-attn 2's kernels."""
    return 256 if have_flash_attention(dtype) and not (attention.HAVE_FA3 or attention.HAVE_FA4) else 1


class PagedSelfAttention(SelfAttention):
    """Megatron's self-attention, whose dynamic batching needs no flash-attn; everything else is the parent's."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[T, 1, hidden]`` in and out, and the output's bias, under dynamic batching."""
        if inference_context is None or inference_context.is_static_batching():
            return super().forward(
                hidden_states,
                attention_mask,
                inference_context=inference_context,
                rotary_pos_emb=rotary_pos_emb,
                **options,
            )
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        query, key_pages_PLGD, value_pages_PLGD, (query_rope, _), _, block_table_RN = (
            self._adjust_key_value_for_inference(inference_context, query, key, value, (rotary_pos_emb, rotary_pos_emb))
        )
        query = inference_context.apply_rotary_emb_query(query, query_rope, self.config, None, self.pg_collection.cp)
        attended_THD = attend(query.squeeze(1), key_pages_PLGD, value_pages_PLGD, block_table_RN, inference_context)
        return self.linear_proj(attended_THD.flatten(1).unsqueeze(1))


def attend(
    query_THD: torch.Tensor,
    key_pages_PLGD: torch.Tensor,
    value_pages_PLGD: torch.Tensor,
    block_table_RN: torch.Tensor,
    context: DynamicInferenceContext,
) -> torch.Tensor:
    """Causal attention ``[T, H, D]`` of a step; what padding tokens get has no meaning."""
    if context.is_decode_only():
        _, kv_lengths_R, longest = context.cu_kv_lengths()
        return attend_one_token(
            query_THD, key_pages_PLGD, value_pages_PLGD, block_table_RN, kv_lengths_R, longest=longest
        )
    num_decoding = context.num_decode_requests
    active = slice(context.paused_request_count, context.total_request_count)
    num_queries = context.request_query_lengths[active].tolist()  # on the CPU: nothing waits for the device
    num_keys = context.get_active_sequence_lengths().tolist()
    attended_THD = torch.zeros_like(query_THD)
    if num_decoding:
        _, kv_lengths_R, _ = context.cu_kv_lengths()
        attended_THD[:num_decoding] = attend_one_token(
            query_THD[:num_decoding],
            key_pages_PLGD,
            value_pages_PLGD,
            block_table_RN[:num_decoding],
            kv_lengths_R[:num_decoding],
            longest=max(num_keys[:num_decoding]),
        )
    token = row = num_decoding
    # Samples of one prompt stand beside each other and have the same lengths: one call for all of them.
    for (queries, keys), same in groupby(zip(num_queries[row:], num_keys[row:], strict=True)):
        rows = len(list(same))
        tokens = slice(token, token + rows * queries)
        attended_THD[tokens] = attend_chunks(
            query_THD[tokens],
            key_pages_PLGD,
            value_pages_PLGD,
            block_table_RN[row : row + rows],
            num_keys=keys,
        )
        token, row = tokens.stop, row + rows
    return attended_THD


def attend_one_token(
    query_RHD: torch.Tensor,
    key_pages_PLGD: torch.Tensor,
    value_pages_PLGD: torch.Tensor,
    block_table_RN: torch.Tensor,
    kv_lengths_R: torch.Tensor,
    *,
    longest: int,
) -> torch.Tensor:
    """``[R, H, D]``: the last token of each request attends to all its ``kv_lengths_R`` tokens, itself included.

    ``longest`` bounds the lengths. What a row of length 0 (padding) gets has no meaning.
    """
    if chosen_backend(query_RHD) == "triton":
        from megatron_tropd.kernels.paged_attention import attend_one_token as in_triton

        return in_triton(query_RHD, key_pages_PLGD, value_pages_PLGD, block_table_RN, kv_lengths_R)
    keys_RKGD = _gather(key_pages_PLGD, block_table_RN, longest)
    values_RKGD = _gather(value_pages_PLGD, block_table_RN, longest)
    positions_K = torch.arange(keys_RKGD.shape[1], device=query_RHD.device)
    mask_RK = positions_K < kv_lengths_R.clamp(min=1).unsqueeze(1)
    # The heads that share keys stand where a sequence of queries would: the keys are read once for all of them.
    grouped = query_RHD.unflatten(1, (keys_RKGD.shape[2], -1))
    attended = F.scaled_dot_product_attention(
        grouped, keys_RKGD.transpose(1, 2), values_RKGD.transpose(1, 2), attn_mask=mask_RK[:, None, None]
    )
    return attended.flatten(1, 2)


def attend_chunks(
    query_THD: torch.Tensor,
    key_pages_PLGD: torch.Tensor,
    value_pages_PLGD: torch.Tensor,
    block_table_RN: torch.Tensor,
    *,
    num_keys: int,
) -> torch.Tensor:
    """``[T, H, D]``: requests with the same number of queries, the last of their ``num_keys`` tokens."""
    query_RHQD = query_THD.unflatten(0, (block_table_RN.shape[0], -1)).transpose(1, 2)
    num_queries = query_RHQD.shape[2]
    heads_of_a_group = query_RHQD.shape[1] // key_pages_PLGD.shape[2]
    keys_RHKD, values_RHKD = (
        _gather(pages_PLGD, block_table_RN, num_keys)[:, :num_keys]
        .transpose(1, 2)
        .repeat_interleave(heads_of_a_group, dim=1)
        for pages_PLGD in (key_pages_PLGD, value_pages_PLGD)
    )
    mask_QK = None
    if num_queries < num_keys:
        positions_K = torch.arange(num_keys, device=query_THD.device)
        mask_QK = positions_K <= positions_K[-num_queries:].unsqueeze(1)
    attended_RHQD = F.scaled_dot_product_attention(
        query_RHQD, keys_RHKD, values_RHKD, attn_mask=mask_QK, is_causal=mask_QK is None
    )
    return attended_RHQD.transpose(1, 2).flatten(0, 1)


def _gather(pages_PLGD: torch.Tensor, block_table_RN: torch.Tensor, length: int) -> torch.Tensor:
    """``[R, K, G, D]``: the first pages of every request, enough for ``length`` tokens; -1 reads any page."""
    num_pages = -(-length // pages_PLGD.shape[1])
    return pages_PLGD[block_table_RN[:, :num_pages].clamp(min=0)].flatten(1, 2)
