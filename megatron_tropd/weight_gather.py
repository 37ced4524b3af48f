"""When the distributed optimizer's updated weights become whole again.

Each data-parallel rank updates its shard. Megatron then gathers all of them at once, or with
``optimizer.overlap_param_gather`` bucket by bucket behind the next training forward, whose modules wait for their own.
Whatever else reads weights (generation, evaluation, checkpoints, exports, hashes) comes after `WeightGather.finish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel


class WeightGather:
    """Keeps whether weights are still in shards. Every rank calls each method at the same place."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, overlap: bool):
        """``chunks`` of this rank. Without ``overlap`` the optimizer's step gathers and nothing is ever pending."""
        self._chunks = chunks if overlap else ()
        self._pending = False
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=False)  # Megatron begins with its waits in place

    def updated(self) -> None:
        """The optimizer has moved."""
        self._pending = bool(self._chunks)

    @contextmanager
    def behind_forward(self) -> Iterator[None]:
        """Inside, a module that runs waits for its weights and starts the next bucket; all of the model has to run."""
        # Without anything pending nothing is gathered: that would write one rank's shard over what a replica has, and
        # hide it from the check of replicas.
        hooked = self._chunks if self._pending else ()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in hooked:
                chunk.disable_forward_pre_hook(param_sync=False)
        for chunk in hooked:
            groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
            assert all(group.param_gather_handle is None for group in groups), "a module has not run"
        self._pending = False

    def finish(self) -> None:
        """Gather what is pending, now."""
        for chunk in self._chunks if self._pending else ():
            chunk.start_param_sync(force_sync=True)
        self._pending = False

    def forget(self) -> None:
        """Whole weights have been loaded."""
        self._pending = False
