"""Mixtures: which source each sample of a run is of, and which of that source's own samples it is.

A function of the configuration and the sample's number alone, as the order of one dataset is. A phase of a mixture is
cut into blocks of equal composition, each in its own keyed order; every source counts its samples through all phases,
so that each epoch of it has each of its windows once, however often the mixture changes.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptdist.data.format import TokenDataset
from gptdist.data.loader import WindowSource, windows_of
from gptdist.data.order import SampleOrder
from gptdist.errors import UserError

_BLOCKS = (100, 1000, 10_000, 60_000)  # the first whose composition is that of the weights within _ROUNDING
_ROUNDING = 1e-5
_LONGEST_BLOCK = 1 << 20  # of a mixture by epochs: its tables take 16 bytes a sample
DEALT = "by hash"  # the order of the sources in a block: part of what identifies the samples


@dataclass(frozen=True)
class Phase:
    """From sample number `start` on, a block has counts[i] samples of source i."""

    start: int
    counts: tuple[int, ...]

    @property
    def block(self) -> int:
        return sum(self.counts)


def counts_by_weight(weights: Sequence[float]) -> tuple[int, ...]:
    """The composition of a block: the weights' shares, rounded to whole samples that add up (largest remainder).

    Raises UserError for a source whose share is too small to ever come.
    """
    total = sum(weights)
    for block in _BLOCKS:
        shares = [weight / total * block for weight in weights]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: block - sum(counts)]:
            counts[i] += 1
        if max(abs(count - share) for count, share in zip(counts, shares, strict=True)) <= _ROUNDING * block:
            break
    for weight, count in zip(weights, counts, strict=True):
        if weight > 0 and count == 0:
            raise UserError(f"data.mixture has a weight of {weight:g} among {total:g}, below 1 / {_BLOCKS[-1]}: "
                            f"use a larger one, or leave the source out")
    return tuple(counts)


def counts_by_epochs(epochs: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """As `counts_by_weight` for passes over sources of these sizes: all samples of the run, if they make a block."""
    counts = tuple(round(n * size) for n, size in zip(epochs, sizes, strict=True))
    return counts if sum(counts) <= _LONGEST_BLOCK else counts_by_weight(counts)


class MixtureOrder:
    """Maps sample numbers to (source, sample number of that source)."""

    def __init__(self, phases: Sequence[Phase], seed: int):
        """phases: by start, the first 0; all of the same number of sources."""
        self.phases = list(phases)
        self._starts = [phase.start for phase in phases]
        self._seed = seed
        self._block = functools.lru_cache(maxsize=8)(self._make_block)
        self._before = [np.zeros(len(phases[0].counts), np.int64)]  # samples of each source before each phase
        for number, (phase, following) in enumerate(itertools.pairwise(phases)):
            self._before.append(self._before[-1] + self._counted(number, following.start - phase.start))

    def locate(self, number: int) -> tuple[int, int]:
        """(source, its own sample number) of the run's sample `number`."""
        phase = bisect.bisect_right(self._starts, number) - 1
        block, position = divmod(number - self._starts[phase], self.phases[phase].block)
        sources, ranks = self._block(phase, block)
        source = int(sources[position])
        own = self._before[phase][source] + block * self.phases[phase].counts[source] + ranks[position]
        return source, int(own)

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples of the run are of each source: int64 (sources,)."""
        phase = max(0, bisect.bisect_left(self._starts, n) - 1)
        return self._before[phase] + self._counted(phase, n - self._starts[phase])

    def _counted(self, phase: int, n: int) -> np.ndarray:
        """The same of the first n samples of a phase."""
        counts = np.array(self.phases[phase].counts)
        blocks, rest = divmod(n, self.phases[phase].block)
        sources, _ = self._block(phase, blocks)
        return blocks * counts + np.bincount(sources[:rest], minlength=len(counts))

    def _make_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of it come before in the block) of each sample of a block: int32 and int64 (block,)."""
        counts = np.array(self.phases[phase].counts)
        size = self.phases[phase].block
        slots = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        sources = slots[SampleOrder(size, self._seed + phase).index(block * size + np.arange(size))]
        ranks = np.empty(size, np.int64)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


class MixtureSource(WindowSource):
    """Windows of several datasets, in the order of a mixture; else as `PretrainSource`."""

    def __init__(self, datasets: Sequence[TokenDataset], phases: Sequence[Phase], *, context: int, seed: int,
                 shuffle: bool = True, **options):
        """phases: their counts are of `datasets`. options: as `WindowSource` has them."""
        super().__init__(context=context, has_mask=any(one.has_stream("loss_mask") for one in datasets),
                         eot_of=datasets[0], **options)
        self.datasets = list(datasets)
        self.sizes = [windows_of(dataset, context) for dataset in datasets]
        self.n_samples = sum(size for size, count in zip(self.sizes, phases[0].counts, strict=True) if count)
        self.order = MixtureOrder(phases, seed)
        self._orders = [SampleOrder(size, seed, shuffle) for size in self.sizes]

    def _located(self, numbers: np.ndarray) -> Iterator[tuple[TokenDataset, int]]:
        for number in numbers.tolist():
            source, own = self.order.locate(number)
            yield self.datasets[source], int(self._orders[source].index(np.array([own]))[0])


def phases_identity(phases: Sequence[Phase], names: Sequence[str], before: int, *, rule: str | None = DEALT) -> str:
    """sha256 of what decides the first `before` samples. names: the hash of each source.

    A single source alone has its own hash: its order is that of training on it without a mixture. rule: None: as it was
    before there was a rule, and the sources came in the order of the configuration.
    """
    begun = [phase for phase in phases if phase.start < max(before, 1)]
    used = [{name: count for name, count in zip(names, phase.counts, strict=True) if count} for phase in begun]
    if len(begun) == 1 and len(used[0]) == 1:
        return next(iter(used[0]))
    parts = [[phase.start, sorted(counts.items())] for phase, counts in zip(begun, used, strict=True)]
    return hashlib.sha256(json.dumps([rule, parts] if rule else parts).encode()).hexdigest()
