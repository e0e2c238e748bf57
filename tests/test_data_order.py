"""The order of samples is a permutation of each epoch and a pure function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.data.order import SampleOrder

sizes = st.one_of(st.integers(1, 600), st.sampled_from([1, 2, 3, 4, 127, 128, 129, 509, 512, 521, 1024]))
seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**40)


@given(n=sizes, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_every_epoch_is_a_permutation(n, seed, epoch, shuffle):
    index = SampleOrder(n, seed, shuffle).index(np.arange(epoch * n, (epoch + 1) * n))
    assert index.dtype == np.int64
    assert np.array_equal(np.sort(index), np.arange(n))
    assert shuffle or np.array_equal(index, np.arange(n))


@given(n=sizes, seed=seeds, start=st.integers(0, 10**12), parts=st.lists(st.integers(1, 20), max_size=8))
def test_how_samples_are_grouped_does_not_matter(n, seed, start, parts):
    samples = np.arange(start, start + sum(parts))
    order = SampleOrder(n, seed)
    pieces = [SampleOrder(n, seed).index(piece) for piece in np.split(samples, np.cumsum(parts)[:-1] if parts else [])]
    assert np.array_equal(order.index(samples), np.concatenate(pieces))


@given(n=st.integers(10**9, 10**15), seed=seeds, position=st.integers(0, 10**9 - 100))
def test_large_n(n, seed, position):
    index = SampleOrder(n, seed).index(np.arange(position, position + 100))
    assert len(set(index.tolist())) == 100
    assert index.min() >= 0
    assert index.max() < n


def test_epochs_and_seeds_differ():
    n = 1000
    samples = np.arange(n)
    orders = [SampleOrder(n, seed).index(samples + epoch * n) for seed in range(4) for epoch in range(4)]
    assert len({order.tobytes() for order in orders}) == 16


def test_the_shuffle_looks_random():
    """Mean displacement and neighbour distance of a random permutation of n are n / 3, within a few percent."""
    n = 10_007
    index = SampleOrder(n, 0).index(np.arange(n))
    assert np.abs(index - np.arange(n)).mean() == pytest.approx(n / 3, rel=0.03)
    assert np.abs(np.diff(index)).mean() == pytest.approx(n / 3, rel=0.03)


def test_first_indices_are_uniform():
    firsts = [int(SampleOrder(10, seed).index(np.array([0]))[0]) for seed in range(4000)]
    counts = np.bincount(firsts, minlength=10)
    assert counts.min() > 320  # expected 400, standard deviation 19
    assert counts.max() < 480


def test_shape_and_bad_size():
    assert SampleOrder(7, 0).index(np.zeros((2, 3), np.int64)).shape == (2, 3)
    assert SampleOrder(7, 0).index(np.zeros(0, np.int64)).shape == (0,)
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(0, 0)
