"""Batches of examples for fine-tuning: rows of different lengths, padded, rows of like length together.

Like loader.PretrainSource a pure function of (examples, seed, step's first sample number): world size, micro-batch,
worker threads and restarts change neither which examples a step has nor their order. Shapes: B rows, T tokens of the
longest row of the step.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gptdist.data.loader import (
    IGNORED,
    Batch,
    StepBatch,
    checked_ranges,
    micro_batches_per_step,
    numbers_of_step,
    rank_share,
)
from gptdist.data.order import SampleOrder
from gptdist.errors import UserError

# A multiple of 8 made a tenth of the positions of 45-token texts padding (batch 16), of 4 a fifteenth.
WIDTH_MULTIPLE = 4


@dataclass(frozen=True)
class Example:
    """One row before padding."""

    tokens: np.ndarray  # (n,) ids, n >= 1
    targets: np.ndarray | int  # (n,) ids or IGNORED for each token; or one label for the row
    doc_start: np.ndarray | None = None  # (n,) int32 for a row of several documents: see loader.Batch


class BucketedOrder:
    """Sample numbers -> examples: as SampleOrder, but within a window of `window` batches rows of like length meet.

    Windows are fixed: `window` x `batch` sample numbers from a multiple of that on, cut at the ends of epochs, so that
    every epoch shows each example once. In a window the examples that SampleOrder puts there are sorted by length and
    cut into batches, and the batches are visited in a keyed random order.
    """

    def __init__(self, lengths: np.ndarray, *, batch: int, window: int, seed: int, shuffle: bool = True):
        """lengths: (n,) tokens of each example. window: in batches; 0, like shuffle=False: SampleOrder's order."""
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self._size = window * batch if shuffle else 0
        self._n = len(lengths)
        self._order = SampleOrder(self._n, seed, shuffle)
        self._window = functools.lru_cache(maxsize=8)(self._sorted_window)

    def index(self, numbers: np.ndarray) -> np.ndarray:
        """Example of each sample number, int64 of any shape."""
        if self._size == 0:
            return self._order.index(numbers)
        flat = np.asarray(numbers, np.int64).ravel()
        found = []
        for number in flat.tolist():
            start, indices = self._window(*self._bounds(number))
            found.append(indices[number - start])
        return np.array(found, np.int64).reshape(np.shape(numbers))

    def _bounds(self, number: int) -> tuple[int, int]:
        """[start, stop) of the window that a sample number is in."""
        window, epoch = number // self._size * self._size, number // self._n * self._n
        return max(window, epoch), min(window + self._size, epoch + self._n)

    def _sorted_window(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """(start, examples of the numbers [start, stop))."""
        members = self._order.index(np.arange(start, stop))
        members = members[np.argsort(self._lengths[members], kind="stable")]
        # Batches begin at multiples of the batch size, so the first and the last of an epoch's may be short.
        edges = [start, *range((start // self._batch + 1) * self._batch, stop, self._batch), stop]
        sizes = np.diff(edges)
        visits = SampleOrder(len(sizes), self._seed + 1).index(np.arange(len(sizes)) + start * len(sizes))
        result, taken = np.empty(stop - start, np.int64), 0
        for piece in visits.tolist():
            first = edges[piece] - start
            result[first:first + sizes[piece]] = members[taken:taken + sizes[piece]]
            taken += sizes[piece]
        return start, result


class ExampleSource:
    """Rows of examples: the source of a fine-tuning task. `n_samples` examples are an epoch."""

    def __init__(self, rows: Sequence[Example], *, lengths: np.ndarray, batch: int, micro_batch: int, context: int,
                 rank: int = 0, world: int = 1, seed: int, shuffle: bool = True, window: int = 64,
                 pad_multiple: int = WIDTH_MULTIPLE, rows_per_example: int = 1, skipped: Sequence[Sequence[int]] = (),
                 mean_over: Literal["targets", "examples"] = "targets", unit: str = "examples"):
        """rows: example i is rows[i k] to rows[(i + 1) k - 1], k = rows_per_example, which stay in one micro-batch.

        lengths: (rows,) tokens of each, so that rows need not be in memory. batch, micro_batch: in examples.
        mean_over: what a step's `n_targets` counts, by which its loss is divided.
        Rows are padded to the longest of the step, rounded up to `pad_multiple`, at most `context`.
        Raises UserError where there are no examples, or more processes than a step has examples.
        """
        self.n_samples = len(rows) // rows_per_example
        if self.n_samples == 0:
            raise UserError(f"there are no {unit} to train on: give task.train_data a file that has some")
        if world > batch:
            raise UserError(f"world size {world} is larger than train.batch={batch}, so some ranks would have nothing "
                            f"to do; use fewer processes or a larger train.batch")
        self._rows, self._k = rows, rows_per_example
        self._lengths = lengths.reshape(-1, rows_per_example).max(1)  # (examples,)
        self._padding, self._mean_over = _Padding(context, pad_multiple), mean_over
        self._batch, self._share = batch, rank_share(batch, rank, world)
        self._n_micro, self._micro_batch = micro_batches_per_step(batch, world, micro_batch)
        self._skipped = checked_ranges(skipped)
        self._order = BucketedOrder(self._lengths, batch=batch, window=window, seed=seed, shuffle=shuffle)

    def advance(self, next_sample: int) -> int:
        """Return `next_sample` of the following step."""
        return int(numbers_of_step(next_sample, self._batch, self._skipped)[-1]) + 1

    def index(self, numbers: np.ndarray) -> np.ndarray:
        """Example of each sample number, int64 of any shape."""
        return self._order.index(numbers)

    def visited(self, next_sample: int, steps: int) -> np.ndarray:
        """Which examples the steps from `next_sample` on have, in ascending order: int64 (n,), each once."""
        found = np.zeros(self.n_samples, bool)
        for _ in range(steps):
            if found.all():
                break
            found[self.examples(next_sample)] = True
            next_sample = self.advance(next_sample)
        return np.flatnonzero(found)

    def examples(self, next_sample: int) -> np.ndarray:
        """Examples of the step that begins at `next_sample`, all ranks: int64 (batch,)."""
        return self._order.index(numbers_of_step(next_sample, self._batch, self._skipped))

    def padding_share(self) -> float:
        """Share of padding among the positions that the first epoch's steps compute."""
        lengths = self._lengths[self._order.index(np.arange(self.n_samples))]
        steps = np.split(lengths, range(self._batch, self.n_samples, self._batch))
        return 1 - lengths.sum() / sum(len(step) * self._padding.width(int(step.max())) for step in steps)

    def step(self, step: int, next_sample: int) -> StepBatch:
        """Read this rank's share of the step that begins at sample number `next_sample`. Thread-safe."""
        numbers = numbers_of_step(next_sample, self._batch, self._skipped)
        examples = self._order.index(numbers)
        width = self._padding.width(int(self._lengths[examples].max()))  # of all ranks' rows: collectives match
        start, stop = self._share
        chosen = [(number, self._rows[example * self._k + j])
                  for number, example in zip(numbers[start:stop].tolist(), examples[start:stop].tolist(), strict=True)
                  for j in range(self._k)]
        batches = _micro_batches(chosen, self._n_micro, self._micro_batch * self._k, width, self._rows[0])
        n_targets = stop - start
        if self._mean_over == "targets":
            n_targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        return StepBatch(step, batches, n_targets, sum(_hash(number, row) for number, row in chosen),
                         n_tokens=sum(len(row.tokens) for _, row in chosen))


def eval_batches(rows: Sequence[Example], *, lengths: np.ndarray, micro_batch: int, context: int, rank: int = 0,
                 world: int = 1, pad_multiple: int = WIDTH_MULTIPLE, rows_per_example: int = 1) -> Iterator[Batch]:
    """Yield this rank's batches over all examples, each once, the shortest first; sample ids are example numbers.

    Every rank yields the same number of batches of the same shapes; rows of padding have sample id -1.
    """
    padding, k = _Padding(context, pad_multiple), rows_per_example
    of_example = lengths.reshape(-1, k).max(1)
    order = np.argsort(of_example, kind="stable")
    micro_batch = max(1, min(micro_batch, -(-len(order) // world)))
    for first in range(0, len(order), micro_batch * world):
        block = order[first:first + micro_batch * world]
        start, stop = rank_share(len(block), rank, world)
        chosen = [(example, rows[example * k + j]) for example in block[start:stop].tolist() for j in range(k)]
        width = padding.width(int(of_example[block].max()))
        n_rows = -(-len(block) // world) * k
        yield from _micro_batches(chosen, 1, n_rows, width, rows[0])


@dataclass(frozen=True)
class _Padding:
    """Widths that rows are padded to: multiples, so that few shapes occur, but never more than the context."""

    context: int
    multiple: int

    def width(self, longest: int) -> int:
        assert longest <= self.context, f"a row of {longest} tokens, the context has {self.context}"
        return min(-(-longest // self.multiple) * self.multiple, self.context)


def pad_multiple(tensor: int) -> int:
    """Rows' widths are multiples of WIDTH_MULTIPLE and of the processes that divide their positions."""
    return math.lcm(WIDTH_MULTIPLE, tensor)


def _micro_batches(chosen: Sequence[tuple[int, Example]], n_micro: int, n_rows: int, width: int,
                   like: Example) -> list[Batch]:
    """`n_micro` batches of `n_rows` rows of `width` tokens; what the chosen rows do not fill is padding."""
    total = n_micro * n_rows
    tokens = np.zeros((total, width), np.int64)
    labels = np.full(total if isinstance(like.targets, int) else (total, width), IGNORED, np.int64)
    numbers, lengths = np.full(total, -1, np.int64), np.ones(total, np.int64)
    doc_start = None if like.doc_start is None else np.zeros((total, width), np.int32)
    for i, (number, row) in enumerate(chosen):
        n = len(row.tokens)
        tokens[i, :n], numbers[i], lengths[i] = row.tokens, number, n
        if isinstance(row.targets, int):
            labels[i] = row.targets
        else:
            labels[i, :n] = row.targets
        if doc_start is not None:
            doc_start[i, :n] = row.doc_start
            doc_start[i, n:] = n  # padding sees padding alone
    arrays = [tokens, labels, numbers, doc_start, lengths]
    parts = [[None] * n_micro if a is None else torch.from_numpy(a).split(n_rows) for a in arrays]
    return [Batch(*fields) for fields in zip(*parts, strict=True)]


def _hash(number: int, row: Example) -> int:
    targets = row.targets if isinstance(row.targets, np.ndarray) else np.array([row.targets])
    digest = zlib.crc32(number.to_bytes(8, "little"))
    return zlib.crc32(targets.astype(np.int64), zlib.crc32(row.tokens.astype(np.int64), digest))
