"""Philox against published vectors and a scalar implementation written from the paper; the counter layout."""

import pytest
import torch

from gptdist.ops import dropout_key
from gptdist.ops import random as ops_random
from gptdist.ops.random import keep_mask, philox4x32, splitmix64

FULL = 0xFFFFFFFF
# Random123's kat_vectors: philox4x32, 7 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([FULL] * 4, [FULL] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
]


def scalar_philox(counter: list[int], key: list[int], rounds: int = 7) -> list[int]:
    """Philox4x32 on Python integers (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & FULL, (first >> 32) ^ c[3] ^ k[1], first & FULL]
        k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert scalar_philox(counter, key) == expected
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == expected


def test_philox_agrees_with_the_scalar_one():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 1 << 32, (6, 200), generator=generator)
    words = torch.stack(philox4x32(tuple(inputs[:4]), tuple(inputs[4:])))
    for i in range(200):
        values = inputs[:, i].tolist()
        assert words[:, i].tolist() == scalar_philox(values[:4], values[4:])


def test_splitmix64_known_answers():
    # The first outputs of the generator seeded with 1234567 (Vigna's splitmix64.c): the state steps by the constant.
    state, step = 1234567, 0x9E3779B97F4A7C15
    outputs = [splitmix64((state + i * step) % (1 << 64)) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_dropout_key_is_a_scalar_tensor_that_separates_seeds_and_steps():
    keys = [dropout_key(seed, step, "cpu") for seed in (-1, 0, 1, 1 << 63) for step in range(50)]
    assert all(key.shape == () and key.dtype == torch.int64 for key in keys)
    assert len({int(key) for key in keys}) == len(keys)
    assert int(dropout_key(7, 3)) == int(dropout_key(7, 3))


@pytest.mark.parametrize("block", [8, 1 << 16])
def test_keep_mask_follows_the_documented_counter_layout(monkeypatch, block):
    monkeypatch.setattr(ops_random, "BLOCK_CPU", block)
    key = dropout_key(11, 5)
    words = [int(key) & FULL, (int(key) >> 32) & FULL]
    samples, heads, rows = torch.tensor([3, (1 << 40) + 9]), torch.tensor([0, 517]), torch.tensor([2, 70000])
    p, site, columns = 0.3, 21, 11
    mask = keep_mask(key, p, samples, site, heads, rows, columns)
    for n in range(2):
        for r in range(2):
            for column in range(columns):
                counter = [column // 4, int(rows[r]), int(samples[n]) & FULL, site << 16 | int(heads[n])]
                word = scalar_philox(counter, words)[column % 4]
                assert bool(mask[n, r, column]) == (word >= int(p * 2**32))


def test_keep_mask_keeps_the_right_share():
    heads = torch.zeros(4, dtype=torch.int64)
    mask = keep_mask(dropout_key(0, 0), 0.1, torch.arange(4), 0, heads, torch.arange(256), 256)
    # 262144 draws: the standard deviation of the share is 0.0006.
    assert abs(mask.double().mean().item() - 0.9) < 0.003
