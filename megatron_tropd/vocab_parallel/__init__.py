"""Losses over vocabulary shards: the readable PyTorch definition of what the Triton kernels compute.

`loss` tells the story (`distillation_loss`); `shards` says who holds which id, `statistics` reduces the vocabulary
to a few floats per token and merges them over ranks, `top_k` finds the teacher's exact top-k, `divergences` holds what
the exact KLs and the JSD need besides, `gradient` is the whole backward. `passes` runs all of these in PyTorch or in
Triton (`triton_passes`, `megatron_tropd.kernels`).
"""

from megatron_tropd.vocab_parallel.loss import distillation_loss

__all__ = ["distillation_loss"]
