"""Batches: the same samples at every world size, micro-batch, number of workers and after a restart."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.format import TokenDataset
from gptdist.data.loader import (
    IGNORED,
    Prefetcher,
    PretrainSource,
    document_starts_in_rows,
    eval_batches,
    micro_batches_per_step,
    rank_share,
)
from gptdist.data.writer import write_dataset
from gptdist.errors import UserError

T, EOT = 8, 50
META = {"tokenizer_hash": "abc", "vocab_size": 51, "eot": EOT}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """700 tokens in documents of 1 to 30, in several shards."""
    path = tmp_path_factory.mktemp("data") / "train"
    rng = np.random.default_rng(0)
    left = 700
    with write_dataset(path, **META, shard_tokens=90) as writer:
        while left:
            n = min(left, int(rng.integers(1, 31)))
            writer.add(np.append(rng.integers(0, EOT, n - 1), EOT))
            left -= n
    return TokenDataset.open(path)


def source(dataset, **kwargs):
    defaults = {"context": T, "sequences_per_step": 12, "micro_batch": 3, "seed": 5}
    return PretrainSource(dataset, **{**defaults, **kwargs})


def real_rows(batches):
    """Return {sample id: (tokens, targets)} of all rows that are not padding."""
    rows = {}
    for batch in batches:
        for tokens, targets, sample in zip(batch.tokens, batch.targets, batch.sample_ids.tolist(), strict=True):
            if sample >= 0:
                assert sample not in rows
                rows[sample] = (tokens.tolist(), targets.tolist())
            else:
                assert (tokens == 0).all()
                assert (targets == IGNORED).all()
    return rows


def test_windows_and_targets(dataset):
    unshuffled = source(dataset, shuffle=False)
    assert unshuffled.n_samples == (700 - 1) // T
    step = unshuffled.step(0, 0)
    everything = dataset.window(0, 700).tolist()
    for sample, (tokens, targets) in real_rows(step.micro_batches).items():
        assert tokens == everything[sample * T : sample * T + T]
        assert targets == everything[sample * T + 1 : sample * T + T + 1]
    assert step.n_targets == 12 * T
    assert step.micro_batches[0].tokens.dtype == torch.int64
    assert step.micro_batches[0].tokens.is_contiguous()
    assert step.micro_batches[0].doc_start is None


@given(sequences=st.integers(1, 200), world=st.integers(1, 40), micro=st.integers(1, 9))
def test_rank_shares_cover_and_fit(sequences, world, micro):
    shares = [rank_share(sequences, rank, world) for rank in range(world)]
    assert [start for start, _ in shares] + [sequences] == [0] + [stop for _, stop in shares]
    largest = max(stop - start for start, stop in shares)
    count, rows = micro_batches_per_step(sequences, world, micro)
    assert count == -(-largest // micro)
    assert rows <= micro
    assert largest <= count * rows < largest + max(count, 1), "no more padding than one row a micro-batch"


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 12),
    micro=st.integers(1, 13),
    start=st.integers(0, 300),
    skipped=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=3),
)
def test_a_step_is_the_same_at_every_world_size_and_micro_batch(dataset, world, micro, start, skipped):
    skipped = [sorted(pair) for pair in skipped]
    reference = source(dataset, skipped=skipped)
    expected = reference.step(3, start)
    ranks = [
        source(dataset, skipped=skipped, micro_batch=micro, rank=rank, world=world) for rank in range(world)
    ]
    steps = [rank.step(3, start) for rank in ranks]
    assert real_rows(b for s in steps for b in s.micro_batches) == real_rows(expected.micro_batches)
    assert sum(s.data_hash for s in steps) == expected.data_hash
    assert sum(s.n_targets for s in steps) == expected.n_targets
    assert len({len(s.micro_batches) for s in steps}) == 1
    assert len({b.tokens.shape for s in steps for b in s.micro_batches}) == 1
    assert {rank.advance(start) for rank in ranks} == {reference.advance(start)}


@given(
    start=st.integers(0, 100),
    sequences=st.integers(1, 20),
    skipped=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=4),
)
def test_skipped_ranges(dataset, start, sequences, skipped):
    skipped = [sorted(pair) for pair in skipped]
    pretrain = source(dataset, sequences_per_step=sequences, skipped=skipped)
    allowed = (n for n in range(start, 10**6) if not any(a <= n < b for a, b in skipped))
    expected = [next(allowed) for _ in range(sequences)]
    assert pretrain.sample_numbers(start).tolist() == expected
    assert pretrain.advance(start) == expected[-1] + 1


def test_every_window_once_per_epoch(dataset):
    pretrain = source(dataset, sequences_per_step=29)  # 87 windows: three steps an epoch
    everything = dataset.window(0, 700).tolist()
    expected = sorted(everything[i * T : i * T + T] for i in range(87))
    for epoch in range(2):
        steps = [pretrain.step(0, epoch * 87 + i * 29) for i in range(3)]
        rows = real_rows(batch for step in steps for batch in step.micro_batches)
        assert sorted(rows) == list(range(epoch * 87, (epoch + 1) * 87))
        assert sorted(tokens for tokens, _ in rows.values()) == expected


def hashes(dataset, n, **kwargs):
    with Prefetcher(source(dataset), **kwargs) as prefetcher:
        return [(batch.step, batch.data_hash) for batch, _ in zip(prefetcher, range(n), strict=False)]


def test_workers_and_restart_do_not_change_the_data(dataset):
    expected = hashes(dataset, 20)
    assert len(set(expected)) == 20
    for workers in (1, 2, 5):
        assert hashes(dataset, 20, workers=workers) == expected
    pretrain = source(dataset)
    next_sample = 0
    for _ in range(7):
        next_sample = pretrain.advance(next_sample)
    assert hashes(dataset, 13, workers=2, step=7, next_sample=next_sample) == expected[7:]


def test_hash_sees_tokens_and_sample_ids(dataset):
    pretrain = source(dataset)
    assert pretrain.step(0, 0).data_hash == pretrain.step(9, 0).data_hash
    n = pretrain.n_samples
    repeated = source(dataset, shuffle=False)
    assert repeated.step(0, 0).data_hash != repeated.step(0, n).data_hash  # same tokens, other sample ids


def test_document_mask(dataset):
    masked = source(dataset, document_mask=True, shuffle=False).step(0, 0)
    for batch in masked.micro_batches:
        assert batch.doc_start.dtype == torch.int32
        assert batch.doc_start.shape == batch.tokens.shape
        for tokens, starts in zip(batch.tokens.tolist(), batch.doc_start.tolist(), strict=True):
            start = 0
            for position in range(T):
                if position and tokens[position - 1] == EOT:
                    start = position
                assert starts[position] == start


def test_document_starts_in_rows():
    tokens = np.array([[1, 9, 2, 9, 9], [9, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert document_starts_in_rows(tokens, 9).tolist() == [[0, 0, 2, 2, 4], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_loss_mask_stream(tmp_path):
    with write_dataset(tmp_path / "train", **META, loss_mask=True) as writer:
        writer.add(np.arange(17) % 50, np.array([0, 0, 1] * 5 + [1, 1]))
    masked = TokenDataset.open(tmp_path / "train")
    step = source(masked, sequences_per_step=2, shuffle=False).step(0, 0)
    targets = torch.cat([batch.targets for batch in step.micro_batches])[:2].flatten().tolist()
    assert targets == [t if t % 3 == 2 or t >= 15 else IGNORED for t in range(1, 17)]
    assert step.n_targets == sum(t != IGNORED for t in targets)
    evaluated = torch.cat([batch.targets for batch in eval_batches(masked, context=T, micro_batch=2)])
    assert evaluated.flatten().tolist() == targets


@settings(max_examples=40, deadline=None)
@given(
    context=st.integers(1, 800), micro=st.integers(1, 9), world=st.integers(1, 9), limit=st.none() | st.integers(1, 900)
)
def test_evaluation_has_every_target_once(dataset, context, micro, world, limit):
    ranks = [
        list(eval_batches(dataset, context=context, micro_batch=micro, rank=rank, world=world, max_tokens=limit))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = real_rows(batch for batches in ranks for batch in batches)
    targets = [t for sample in sorted(rows) for t in rows[sample][1] if t != IGNORED]
    assert targets == dataset.window(1, min(699, limit or 699)).tolist()


def test_bad_input(dataset, tmp_path):
    with pytest.raises(UserError, match=r"700 tokens, expected at least model\.context \+ 1"):
        source(dataset, context=700)
    with pytest.raises(UserError, match="world size 13 is larger than the 12 sequences of a step"):
        source(dataset, world=13)
    with pytest.raises(UserError, match=r"train\.micro_batch is 0"):
        source(dataset, micro_batch=0)
    with pytest.raises(UserError, match=r"train\.tokens_per_step makes 0 sequences"):
        source(dataset, sequences_per_step=0)
    with pytest.raises(UserError, match=r"skipped range \[5, 3\)"):
        source(dataset, skipped=[[5, 3]])
    np.zeros(100, np.uint16).tofile(tmp_path / "raw.bin")
    with pytest.raises(UserError, match="document_mask needs the id"):
        source(TokenDataset.open(tmp_path / "raw.bin"), document_mask=True)
    with pytest.raises(UserError, match=r"val split has 700 tokens and eval\.tokens is 0: nothing to evaluate"):
        list(eval_batches(dataset, context=8, micro_batch=1, max_tokens=0))


class FakeSource:
    """Counts reads under way; step `fails_at` raises."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.fails_at, self.seconds = fails_at, seconds
        self.started = 0
        self._lock = threading.Lock()

    def step(self, step, next_sample):
        with self._lock:
            self.started += 1
        time.sleep(self.seconds)
        if step == self.fails_at:
            raise OSError("disk gone")
        return step, next_sample

    def advance(self, next_sample):
        return next_sample + 10


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_surface_at_their_step(workers):
    with Prefetcher(FakeSource(fails_at=3), workers=workers) as prefetcher:
        assert [next(prefetcher) for _ in range(3)] == [(0, 0), (1, 10), (2, 20)]
        with pytest.raises(OSError, match="disk gone"):
            next(prefetcher)


def test_reading_ahead_is_bounded_and_close_stops():
    fake = FakeSource()
    prefetcher = Prefetcher(fake, workers=2, depth=3)
    next(prefetcher)
    time.sleep(0.05)
    assert fake.started <= 4
    prefetcher.close()
    with pytest.raises(StopIteration):
        next(prefetcher)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_waiting_is_measured():
    with Prefetcher(FakeSource(seconds=0.02), workers=0) as prefetcher:
        next(prefetcher)
        assert 0.02 <= prefetcher.wait_s < 1


@pytest.mark.parametrize("read", [lambda ds: source(ds).step(0, 0), lambda ds: list(
    eval_batches(ds, context=T, micro_batch=4))])
def test_an_id_beyond_the_vocabulary_is_named_before_it_reaches_the_model(tmp_path, read):
    with write_dataset(tmp_path / "train", **META) as writer:
        writer.add(np.arange(T * 5) % EOT)
    shard = tmp_path / "train" / "shard-00000.tokens.bin"
    tokens = np.fromfile(shard, np.uint16)
    tokens[T] = 60  # the last target of the first window and a token of the second
    tokens.tofile(shard)
    with pytest.raises(UserError, match=r"token id 60 is beyond the vocabulary of 51.*gptdist verify"):
        read(TokenDataset.open(tmp_path / "train"))
