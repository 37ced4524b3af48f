"""Weighted mixtures of prompt files: which prompt comes at which place, as a function of the place alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from megatron_tropd.data import PromptOrder
from megatron_tropd.draws import Stream, uniforms
from megatron_tropd.indexed_prompts import IndexedPrompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.prompt import Prompt

BLOCK = 1024
"""Places among which every source has its share, within one prompt."""


@dataclass(frozen=True)
class MixtureOrder:
    """Endless places over several sources; a resumed run needs only its position.

    Source k has ``weights[k] / sum`` of the places: in every block of 1024 within one, in the long run exactly. Its
    n-th place takes the n-th prompt of its own endless shuffled epochs (`PromptOrder`).
    """

    sizes: tuple[int, ...]
    """Prompts of each source."""
    weights: tuple[float, ...]
    """Positive, of any sum."""
    seed: int

    def indices(self, start: int, count: int) -> list[tuple[int, int]]:
        """(Source, prompt of that source) at the places [start, start + count)."""
        orders = [PromptOrder(size, self.seed, source) for source, size in enumerate(self.sizes)]
        if len(orders) == 1:
            return [(0, index) for index in orders[0].indices(start, count)]
        found = []
        for place in range(start, start + count):
            source, nth = _block(self, place // BLOCK)[place % BLOCK]
            found.append((source, orders[source].indices(nth, 1)[0]))
        return found

    def epochs(self, position: int) -> list[float]:
        """How often each source has been through after ``position`` places."""
        if len(self.sizes) == 1:
            return [position / self.sizes[0]]
        taken = self._taken(position // BLOCK).tolist()
        for source, _ in _block(self, position // BLOCK)[: position % BLOCK]:
            taken[source] += 1
        return [count / size for count, size in zip(taken, self.sizes, strict=True)]

    def _taken(self, num_blocks: int) -> torch.Tensor:
        """Places of each source in the first ``num_blocks`` blocks, int64 ``[sources]``."""
        return _boundaries(self.weights, self.seed, 0, num_blocks).diff(dim=1).sum(0)


def _boundaries(weights: tuple[float, ...], seed: int, first: int, last: int) -> torch.Tensor:
    """Where each source begins and ends in the unshuffled blocks [first, last): int64 ``[blocks, sources + 1]``.

    Systematic sampling: places 0, 1, ... of a block, moved by one draw of the block in [0, 1), against the cumulated
    shares. So a source's count is its share rounded up or down, and right on average.
    """
    blocks = torch.arange(first, last)
    offsets = uniforms(seed, Stream.MIXTURE, blocks, 0).double()
    shares = torch.tensor([0.0, *weights], dtype=torch.float64).cumsum(0)
    edges = (shares * (BLOCK / shares[-1]) - offsets[:, None]).ceil().clamp(0, BLOCK).long()
    edges[:, -1] = BLOCK
    return edges


@lru_cache(maxsize=8)
def _block(order: MixtureOrder, block: int) -> list[tuple[int, int]]:
    """(Source, how many places of it came before) of every place of a block."""
    counts = _boundaries(order.weights, order.seed, block, block + 1).diff(dim=1)[0]
    sources = torch.repeat_interleave(torch.arange(len(counts)), counts)
    keys = uniforms(order.seed, Stream.MIXTURE, block, torch.arange(1, BLOCK + 1))
    taken, places = order._taken(block).tolist(), []
    for source in sources[torch.argsort(keys, stable=True)].tolist():
        places.append((source, taken[source]))
        taken[source] += 1
    return places


class Mixture:
    """The prompts of one file or of several, and the order in which they come."""

    def __init__(
        self, sources: Mapping[str, Sequence[Prompt]], weights: Sequence[float], *, seed: int, prompts_per_step: int
    ):
        """``sources``: name to prompts, in the order of ``weights``."""
        self._prompts_per_step = prompts_per_step
        self._sources = list(sources.values())
        self.source_names = tuple(sources) if len(sources) > 1 else ()
        """() for a single file."""
        self._order = MixtureOrder(tuple(len(prompts) for prompts in self._sources), tuple(weights), seed)

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, source after source."""
        return [prompt for prompts in self._sources for prompt in prompts]

    def of_batch(self, batch: int) -> list[Prompt]:
        """The prompts of the batch with this number (the step's, unless steps were refused), over all ranks."""
        return self.at(batch * self._prompts_per_step, self._prompts_per_step)

    def at(self, start: int, count: int) -> list[Prompt]:
        """The prompts at the places [start, start + count) of the order, over all ranks."""
        return [self._sources[source][index] for source, index in self._order.indices(start, count)]

    def epochs(self, batch: int) -> dict[str, float]:
        """``epoch/source``, how often each source has been through after ``batch``; nothing for a single file."""
        return self.epochs_at((batch + 1) * self._prompts_per_step)

    def epochs_at(self, place: int) -> dict[str, float]:
        """The same after ``place`` prompts."""
        if not self.source_names:
            return {}
        epochs = self._order.epochs(place)
        return {f"epoch/{name}": epoch for name, epoch in zip(self.source_names, epochs, strict=True)}


def read_mixture(
    weights: Mapping[str, float],
    read: Callable[[str, str], tuple[Sequence[Prompt], int]],
    *,
    seed: int = 0,
    prompts_per_step: int = 1,
) -> tuple[Mixture, dict[str, int]]:
    """The prompts of several files (or of one), and how many of each were skipped.

    ``read`` takes a path and the name to note as the prompts' source ("" for a single file). Raises DataError as it
    does, and where an id stands in two files.
    """
    names = _names(list(weights))
    sources: dict[str, Sequence[Prompt]] = {}
    skipped: dict[str, int] = {}
    file_of_id: dict[str, str] = {}
    for path, name in names.items():
        sources[name], skipped[path] = read(path, name if len(weights) > 1 else "")
        for identifier in _ids(sources[name]) if len(weights) > 1 else ():
            if identifier in file_of_id:
                raise DataError(
                    f"{path}: id {identifier!r} is also in {file_of_id[identifier]}: ids must differ over all files"
                )
            file_of_id[identifier] = path
    return Mixture(sources, list(weights.values()), seed=seed, prompts_per_step=prompts_per_step), skipped


def _ids(prompts: Sequence[Prompt]) -> Iterable[str]:
    return prompts.ids if isinstance(prompts, IndexedPrompts) else (prompt.id for prompt in prompts)


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Path to the name of a source: the file's without its ending, with as many folders as it takes to differ."""
    longest = max(len(Path(path).parts) for path in paths)
    for depth in range(1, longest + 1):
        names = ["/".join((*Path(path).parts[-depth:-1], Path(path).stem)) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(paths, names, strict=True))
    raise DataError(f"data.train names a file twice: {', '.join(sorted(paths))}")
