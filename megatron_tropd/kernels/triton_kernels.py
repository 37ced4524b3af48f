"""The four kernels in Triton."""

from megatron_tropd.kernels.gradient import write_gradient
from megatron_tropd.kernels.mixture import mixture_statistics
from megatron_tropd.kernels.statistics import pair_statistics, shard_statistics

__all__ = ["mixture_statistics", "pair_statistics", "shard_statistics", "write_gradient"]
