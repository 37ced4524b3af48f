"""CUDA graphs of an engine's decoding steps: a step is hundreds of small kernels, whose launches take longer than they.

Megatron's own graphs live in the model that trains, which then trains under their conditions (their random states, no
whole-layer recomputation, Transformer Engine). These need nothing of the model but that its inputs stay in place, and
go with the KV cache that they read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class DecodeGraphs:
    """A graph for each size of step, captured when the size first comes up and replayed from then on."""

    def __init__(self) -> None:
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def __len__(self) -> int:
        """Graphs captured."""
        return len(self._captured)

    def run(self, size: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor ``forward`` makes, computed anew from what its inputs hold now; the next call writes over it.

        For one ``size`` every call must read and write the same addresses and launch the same kernels, and may not
        wait for the device. Running it twice must be as running it once.
        """
        if size not in self._captured:
            self._captured[size] = self._capture(forward)
        graph, output = self._captured[size]
        graph.replay()
        return output

    def _capture(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # What happens once (kernels compiled, libraries and communicators started) cannot be part of a graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Steps follow one another, so that all graphs may take the same memory.
        pool = next((first.pool() for first, _ in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            output = forward()
        return graph, output
