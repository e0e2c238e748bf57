"""Batches of examples: every example once an epoch, little padding, the same steps for every world size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.examples import BucketedOrder, Example, ExampleSource, eval_batches, pad_multiple
from gptdist.data.loader import IGNORED
from gptdist.errors import UserError

CONTEXT = 40


def make_rows(n, seed=0, label=False):
    random = np.random.RandomState(seed)
    rows = []
    for i in range(n):
        tokens = np.full(random.randint(1, CONTEXT + 1), i, np.int64)
        rows.append(Example(tokens, i % 3 if label else np.append(tokens[1:], IGNORED)))
    return rows


def lengths_of(rows):
    return np.array([len(row.tokens) for row in rows], np.int64)


def source(rows, **options):
    defaults = dict(lengths=lengths_of(rows), batch=7, micro_batch=2, context=CONTEXT, seed=5, window=4)
    return ExampleSource(rows, **defaults | options)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 90), batch=st.integers(1, 12), window=st.integers(0, 6), seed=st.integers(0, 9),
       shuffle=st.booleans())
def test_an_epoch_shows_every_example_once(n, batch, window, seed, shuffle):
    lengths = np.random.RandomState(seed).randint(1, CONTEXT, n)
    order = BucketedOrder(lengths, batch=batch, window=window, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        shown = order.index(np.arange(epoch * n, (epoch + 1) * n))
        assert sorted(shown.tolist()) == list(range(n))
        if not shuffle:
            assert shown.tolist() == list(range(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 12), world=st.integers(1, 12), micro_batch=st.integers(1, 5),
       label=st.booleans(), step=st.integers(0, 8))
def test_a_step_is_the_same_for_every_world_size_and_micro_batch(n, batch, world, micro_batch, label, step):
    world, rows = min(world, batch), make_rows(n, label=label)
    one = source(rows, batch=batch, micro_batch=batch)
    whole = one.step(step, step * batch)
    parts = [source(rows, batch=batch, micro_batch=micro_batch, rank=rank, world=world).step(step, step * batch)
             for rank in range(world)]
    shapes = [[batch.tokens.shape for batch in part.micro_batches] for part in parts]
    assert all(shape == shapes[0] for shape in shapes), "collectives would not match"
    joined = {field: torch.cat([getattr(micro, field) for part in parts for micro in part.micro_batches])
              for field in ("tokens", "targets", "sample_ids", "lengths")}
    real = joined["sample_ids"] >= 0
    for field, values in joined.items():
        assert torch.equal(values[real], getattr(whole.micro_batches[0], field)), field
    assert (joined["targets"][~real] == IGNORED).all()
    for field in ("n_targets", "data_hash", "n_tokens"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field)


def test_rows_are_padded_to_the_longest_of_the_step():
    rows = make_rows(30)
    step = source(rows, batch=5, micro_batch=5).step(0, 0)
    batch, = step.micro_batches
    width = batch.tokens.shape[1]
    assert width == min(-(-int(batch.lengths.max()) // 4) * 4, CONTEXT)
    for tokens, targets, n in zip(batch.tokens, batch.targets, batch.lengths, strict=True):
        row = rows[int(tokens[0])]
        assert torch.equal(tokens[:n], torch.from_numpy(row.tokens))
        assert torch.equal(targets[:n], torch.from_numpy(row.targets))
        assert not tokens[n:].any()
        assert (targets[n:] == IGNORED).all()
    assert step.n_tokens == int(batch.lengths.sum())
    assert step.n_positions == 5 * width


def test_bucketing_leaves_little_padding():
    rows = make_rows(640)
    options = dict(batch=8, micro_batch=8, pad_multiple=1)
    assert source(rows, window=40, **options).padding_share() < 0.05
    assert source(rows, window=0, **options).padding_share() > 0.35


def test_bucketed_epochs_differ_and_batches_are_not_visited_by_length():
    rows = make_rows(320)
    order = source(rows, batch=8, window=40)
    first, second = (order.index(np.arange(320) + start) for start in (0, 320))
    assert (first != second).mean() > 0.9
    widest = lengths_of(rows)[first].reshape(-1, 8).max(1)
    assert 8 < (np.diff(widest) > 0).sum() < 32


def test_rows_of_a_pair_stay_together():
    rows = make_rows(24)
    step = source(rows, batch=5, micro_batch=2, rows_per_example=2, mean_over="examples").step(0, 0)
    assert step.n_targets == 5
    for batch in step.micro_batches:
        for left, right in batch.tokens[:, 0].reshape(-1, 2).tolist():
            assert (left, right) == (0, 0) or (left % 2 == 0 and right == left + 1)
        assert torch.equal(*batch.sample_ids.reshape(-1, 2).unbind(1))


def test_skipped_samples_are_not_seen():
    rows = make_rows(21)
    plain, skipping = source(rows), source(rows, skipped=[[3, 8]])
    assert skipping.advance(0) == 12
    assert skipping.examples(0).tolist() == plain.index(np.array([0, 1, 2, 8, 9, 10, 11])).tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), world=st.integers(1, 5), micro_batch=st.integers(1, 9), k=st.integers(1, 2))
def test_evaluation_scores_every_example_once(n, world, micro_batch, k):
    rows = make_rows(n * k)
    ranks = [list(eval_batches(rows, lengths=lengths_of(rows), micro_batch=micro_batch, context=CONTEXT, rank=rank,
                               world=world, rows_per_example=k)) for rank in range(world)]
    shapes = [[batch.tokens.shape for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    seen = [int(i) for batches in ranks for batch in batches for i in batch.sample_ids if i >= 0]
    assert sorted(seen) == sorted(i for i in range(n) for _ in range(k))


def test_documents_of_a_packed_row_keep_their_starts():
    row = Example(np.arange(6), np.arange(6), np.array([0, 0, 2, 2, 2, 2], np.int32))
    batch, = source([row], batch=1).step(0, 0).micro_batches
    assert batch.doc_start.tolist() == [[0, 0, 2, 2, 2, 2, 6, 6]]


def test_widths_suit_tensor_parallelism():
    assert [pad_multiple(n) for n in (1, 2, 3, 8, 16)] == [4, 4, 12, 8, 16]


def test_impossible_sources_are_refused():
    with pytest.raises(UserError, match="there are no texts to train on"):
        source([], unit="texts")
    with pytest.raises(UserError, match=r"world size 8 is larger than train\.batch=7"):
        source(make_rows(9), world=8)
