"""Triton twins of the passes over a vocabulary shard, for CUDA.

`megatron_tropd.vocab_parallel.statistics`, `divergences` and `gradient` are the readable definition; the kernels here
compute the same floats with one read of each logit and nothing but a few floats per token in memory.
`megatron_tropd.vocab_parallel.passes` chooses between the two (`backend`). Importing this package does not import
Triton; its modules `statistics`, `mixture` and `gradient` do.
"""
