"""Batches for pretraining: which windows each rank reads at each step, and reading them ahead of the trainer.

Everything is a pure function of (dataset, seed, step's first sample number): world size, micro-batch, worker threads
and restarts change neither which samples a step has nor their order. Shapes: B sequences, T tokens (context).
"""

import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gptdist.data.format import TokenDataset
from gptdist.data.order import SampleOrder
from gptdist.data.shares import check_world, micro_batches_per_step
from gptdist.errors import UserError

IGNORED = -100  # target of a position that does not count, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Padding rows have tokens 0, targets -100 and sample id -1."""

    tokens: Tensor  # int64 (B, T)
    targets: Tensor  # int64 (B, T), or (B,) where a row has one label; -100 = ignored
    sample_ids: Tensor  # int64 (B,): running sample number epoch * n_samples + i, unique over the run
    doc_start: Tensor | None = None  # int32 (B, T): first position of the row that position t may attend to
    lengths: Tensor | None = None  # int64 (B,): tokens of the row before its padding


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    step: int
    micro_batches: list[Batch]  # the same number, of the same shape, on every rank
    n_targets: int  # of this rank
    data_hash: int  # of this rank: sum over its sequences of crc32(sample id, tokens); add up over ranks
    n_tokens: int = 0  # of this rank, without padding; 0: every position is a token

    @property
    def n_positions(self) -> int:
        """What this rank computes, padding included."""
        return sum(batch.tokens.numel() for batch in self.micro_batches)


def rank_share(sequences: int, rank: int, world: int) -> tuple[int, int]:
    """Return the [start, stop) of `sequences` that `rank` of `world` takes: floor(r G / W), floor((r + 1) G / W)."""
    return rank * sequences // world, (rank + 1) * sequences // world


def numbers_of_step(next_sample: int, count: int, skipped: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the first `count` sample numbers from `next_sample` on that are in no skipped range: int64 (count,)."""
    pieces, needed, number = [], count, next_sample
    for start, stop in skipped:
        n = min(max(start - number, 0), needed)
        pieces.append(np.arange(number, number + n))
        needed -= n
        if needed == 0:
            break
        number = max(number, stop)
    return np.concatenate([*pieces, np.arange(number, number + needed)]).astype(np.int64)


class WindowSource:
    """Windows of `context` tokens, stride `context`: window i has tokens [i T, i T + T) and targets one further.

    A `loss_mask` stream, where a dataset has one, turns targets it marks 0 into -100. Which windows there are, in which
    order, is the subclasses': PretrainSource of one dataset, mixture.MixtureSource of several.
    """

    n_samples: int  # of an epoch

    def __init__(
        self,
        *,
        context: int,
        sequences_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
        eot: int | None = None,
        eot_of: TokenDataset,
        has_mask: bool,
        skipped: Sequence[Sequence[int]] = (),
    ):
        """skipped: [start, stop) ranges of sample numbers never to be used. eot: needed for `document_mask` when the
        dataset, eot_of, is a raw file. has_mask: some dataset has a loss mask. Raises UserError when the world is too
        large."""
        _check_sizes(context, sequences_per_step, micro_batch, world)
        self.context = context
        self.sequences_per_step = sequences_per_step
        self._has_mask = has_mask
        self._share = rank_share(sequences_per_step, rank, world)
        self._n_micro, self._micro_batch = micro_batches_per_step(sequences_per_step, world, micro_batch)
        self._eot = _document_end(eot_of, eot) if document_mask else None
        self._skipped = checked_ranges(skipped)

    def sample_numbers(self, next_sample: int) -> np.ndarray:
        """Return the sample numbers of the step that begins at `next_sample`, all ranks: int64 (sequences_per_step,).

        They are the first ones from `next_sample` on that are in no skipped range.
        """
        return numbers_of_step(next_sample, self.sequences_per_step, self._skipped)

    def advance(self, next_sample: int) -> int:
        """Return `next_sample` of the following step."""
        return int(self.sample_numbers(next_sample)[-1]) + 1

    def step(self, step: int, next_sample: int) -> StepBatch:
        """Read this rank's share of the step that begins at sample number `next_sample`. Thread-safe."""
        start, stop = self._share
        numbers = self.sample_numbers(next_sample)[start:stop]
        rows = _Rows(self._n_micro * self._micro_batch, self.context)
        data_hash, datasets = 0, []
        for row, (number, (dataset, index)) in enumerate(zip(numbers.tolist(), self._located(numbers), strict=True)):
            data_hash += _fill(rows, row, number, dataset, index * self.context)
            datasets.append(dataset)
        rows.check_ids(datasets)
        n_targets = len(numbers) * self.context
        if self._has_mask:
            n_targets = int((rows.targets != IGNORED).sum())
        return StepBatch(step, rows.batches(self._micro_batch, self._eot), n_targets, data_hash)

    def _located(self, numbers: np.ndarray) -> Iterable[tuple[TokenDataset, int]]:
        """(dataset, index of the window in it) of each sample number, int64 (n,)."""
        raise NotImplementedError


class PretrainSource(WindowSource):
    """The windows of one dataset, each once in an epoch."""

    def __init__(self, dataset: TokenDataset, *, context: int, seed: int, shuffle: bool = True, **options):
        """options: as `WindowSource` has them. Raises UserError when the dataset is shorter than a window."""
        super().__init__(context=context, has_mask=dataset.has_stream("loss_mask"), eot_of=dataset, **options)
        self.n_samples = windows_of(dataset, context)
        self._dataset = dataset
        self._order = SampleOrder(self.n_samples, seed, shuffle)

    def _located(self, numbers: np.ndarray) -> Iterable[tuple[TokenDataset, int]]:
        return ((self._dataset, index) for index in self._order.index(numbers).tolist())


def windows_of(dataset: TokenDataset, context: int) -> int:
    """How many windows a dataset has. Raises UserError where it is none."""
    if len(dataset) < context + 1:
        raise UserError(
            f"{dataset.path}: {len(dataset)} tokens, expected at least model.context + 1 = {context + 1}; "
            "use more text or a shorter model.context"
        )
    return (len(dataset) - 1) // context


def _fill(rows: "_Rows", row: int, number: int, dataset: TokenDataset, start: int) -> int:
    """Read the window at token `start` into a row; return its hash."""
    context = rows.tokens.shape[1]
    window = dataset.window(start, context + 1)  # (T + 1,)
    rows.tokens[row] = window[:-1]
    rows.targets[row] = window[1:]
    rows.sample_ids[row] = number
    if dataset.has_stream("loss_mask"):
        mask = dataset.window(start + 1, context, "loss_mask")
        rows.targets[row][mask == 0] = IGNORED
    return zlib.crc32(window, zlib.crc32(number.to_bytes(8, "little")))


class _Rows:
    """The rows of all micro-batches of a step in one block, which begin as padding."""

    def __init__(self, n_rows: int, context: int):
        self.tokens = np.zeros((n_rows, context), np.int64)
        self.targets = np.full((n_rows, context), IGNORED, np.int64)
        self.sample_ids = np.full(n_rows, -1, np.int64)

    def check_ids(self, datasets: Sequence[TokenDataset]) -> None:
        """Raise UserError for a token id beyond the vocabulary, before it is looked up. datasets: each row's."""
        largest = max(int(self.tokens.max(initial=0)), int(self.targets[:, -1:].max(initial=0)))
        if all(one.meta.vocab_size is None or largest < one.meta.vocab_size for one in set(datasets)):
            return
        for row, dataset in enumerate(datasets):
            largest = int(max(self.tokens[row].max(), self.targets[row].max()))
            if dataset.meta.vocab_size is None or largest < dataset.meta.vocab_size:
                continue
            raise UserError(
                f"{dataset.path}: token id {largest} is beyond the vocabulary of {dataset.meta.vocab_size}: a shard "
                f"was altered; check it with `gptdist verify {dataset.path}`, or prepare the dataset again"
            )

    def batches(self, micro_batch: int, eot: int | None) -> list[Batch]:
        """Cut into micro-batches (views); with `eot` also compute each document's start."""
        arrays = [self.tokens, self.targets, self.sample_ids]
        if eot is not None:
            arrays.append(document_starts_in_rows(self.tokens, eot))
        tensors = [torch.from_numpy(array).split(micro_batch) for array in arrays]
        return [Batch(*parts) for parts in zip(*tensors, strict=True)]


def document_starts_in_rows(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Return for each position where its document starts in the row, int32 (B, T); tokens int64 (B, T).

    A document starts at position 0 and after every `eot`; `eot` itself belongs to the document it ends.
    """
    starts = np.zeros(tokens.shape, np.int32)
    starts[:, 1:] = np.where(tokens[:, :-1] == eot, np.arange(1, tokens.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(starts, axis=1)


def eval_batches(
    dataset: TokenDataset,
    *,
    context: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    max_tokens: int | None = None,
    document_mask: bool = False,
    eot: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches over the dataset in file order; each target (all but the first token) exactly once.

    The last window may be partial and is padded with -100. max_tokens: stop after that many targets.
    Every rank yields the same number of batches; sample ids are window numbers.
    """
    n_targets = len(dataset) - 1 if max_tokens is None else min(len(dataset) - 1, max_tokens)
    if n_targets < 1:
        limit = "" if max_tokens is None else f" and eval.tokens is {max_tokens}"
        raise UserError(
            f"{dataset.path}: the val split has {len(dataset)} tokens{limit}: nothing to evaluate; expected at least 2 "
            "tokens, prepare with a larger --val-fraction, and eval.tokens of at least 1, or 0 for all"
        )
    n_windows = -(-n_targets // context)
    eot = _document_end(dataset, eot) if document_mask else None
    first, last = rank_share(n_windows, rank, world)
    n_micro, micro_batch = micro_batches_per_step(n_windows, world, micro_batch)
    for micro in range(n_micro):
        rows = _Rows(micro_batch, context)
        numbers = range(first + micro * micro_batch, min(first + (micro + 1) * micro_batch, last))
        for row, number in enumerate(numbers):
            start = number * context
            n = min(context, n_targets - start)
            window = dataset.window(start, n + 1)
            rows.tokens[row, :n] = window[:-1]
            rows.targets[row, :n] = window[1:]
            rows.sample_ids[row] = number
            if dataset.has_stream("loss_mask"):
                rows.targets[row, :n][dataset.window(start + 1, n, "loss_mask") == 0] = IGNORED
        rows.check_ids([dataset] * len(numbers))
        yield from rows.batches(micro_batch, eot)


class StepSource(Protocol):
    """What a Prefetcher reads from."""

    def step(self, step: int, next_sample: int) -> StepBatch: ...

    def advance(self, next_sample: int) -> int: ...


class Prefetcher:
    """Iterates over steps in order without end, reading up to `depth` of them ahead on `workers` threads.

    workers=0 reads in line. An error in a worker is raised by the `next` that would have returned its step.
    `wait_s` is the total time that the consumer waited for data.
    """

    def __init__(self, source: StepSource, *, step: int = 0, next_sample: int = 0, workers: int = 0, depth: int = 4):
        self.wait_s = 0.0
        self._source = source
        self._step = step
        self._next_sample = next_sample
        self._depth = max(depth, workers, 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers > 0 else None
        self._pending: deque[Future] = deque()
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        batch = self._source.step(*self._take()) if self._pool is None else self._next_from_pool()
        self.wait_s += time.perf_counter() - started
        return batch

    def _next_from_pool(self) -> StepBatch:
        while len(self._pending) < self._depth:
            self._pending.append(self._pool.submit(self._source.step, *self._take()))
        batch = self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._source.step, *self._take()))
        return batch

    def _take(self) -> tuple[int, int]:
        """Return (step, next_sample) of the next step to read and move on."""
        taken = self._step, self._next_sample
        self._step, self._next_sample = self._step + 1, self._source.advance(self._next_sample)
        return taken

    def close(self) -> None:
        """Stop reading; waits for reads under way. Iteration ends afterwards."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _check_sizes(context: int, sequences_per_step: int, micro_batch: int, world: int) -> None:
    for name, value in (("model.context", context), ("train.micro_batch", micro_batch)):
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if sequences_per_step < 1:
        raise UserError(
            f"train.tokens_per_step makes {sequences_per_step} sequences of model.context = {context} tokens, expected "
            "at least 1; use a larger train.tokens_per_step"
        )
    check_world(sequences_per_step, world)


def checked_ranges(ranges: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    for start, stop in ranges:
        if not 0 <= start <= stop:
            raise UserError(
                f"data.skip: skipped range [{start}, {stop}): expected 0 <= start <= stop, in sample numbers"
            )
    return sorted((int(start), int(stop)) for start, stop in ranges)


def _document_end(dataset: TokenDataset, eot: int | None) -> int:
    eot = dataset.meta.eot if eot is None else eot
    if eot is None:
        raise UserError(
            f"{dataset.path}: data.document_mask needs the id of <|endoftext|>, which a raw file does not say"
        )
    return eot
