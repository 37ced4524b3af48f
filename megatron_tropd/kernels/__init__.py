"""Fast twins of the passes over a vocabulary shard: in Triton for CUDA, and in PyTorch under `torch.compile`.

`megatron_tropd.vocab_parallel.statistics`, `divergences` and `gradient` are the readable definition; the kernels here
compute the same floats with nothing but a few floats per token in memory, the Triton ones with one read of each logit.
`megatron_tropd.vocab_parallel.passes` chooses (`backend`). Importing this package does not import Triton: its modules
`statistics`, `mixture` and `gradient` (together: `triton_kernels`) do; `compiled` is the other set. `paged_attention`
is the twin of the decoding step in `megatron_tropd.paged_attention`.
"""
