"""Losses over vocabulary shards: the readable PyTorch definition of what the Triton kernels compute.

`loss` tells the story (`distillation_loss`); `shards` says who holds which id, `statistics` reduces the vocabulary
to a few floats per token and merges them over ranks, `top_k` finds the teacher's exact top-k, `divergences` holds what
the exact KLs and the JSD need besides, `gradient` is the whole backward. `passes` runs all of these in PyTorch, or in
Triton or compiled (`kernel_passes`, `megatron_tropd.kernels`). `fused_head` is the same loss from the hidden states, a
chunk of tokens at a time, so that whole logits never exist (`output_head`: what it does with one output layer).
"""

from megatron_tropd.vocab_parallel.fused_head import fused_head_loss
from megatron_tropd.vocab_parallel.loss import distillation_loss
from megatron_tropd.vocab_parallel.output_head import OutputHead, recommended_chunk_size

__all__ = ["OutputHead", "distillation_loss", "fused_head_loss", "recommended_chunk_size"]
