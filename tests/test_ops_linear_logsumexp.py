"""linear_logsumexp: the shards of a vocabulary together give linear_cross_entropy, loss and gradients."""

import importlib

import pytest
import torch

from gptdist.ops import linear_cross_entropy, linear_logsumexp

chunking = importlib.import_module("gptdist.ops.cross_entropy")
N, C, V, CLASSES = 23, 12, 40, 17  # cut into 4, the third shard is part padding and the last one padding alone


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator).to(dtype).requires_grad_() for n in (N, V))
    targets = torch.randint(0, CLASSES, (N,), generator=generator)
    targets[3] = -100
    return hidden, weight, targets, torch.rand(N, generator=generator)


def joined(hidden, weight, targets, shards):
    rows = V // shards
    parts = [linear_logsumexp(hidden, part, targets, first=i * rows, vocab_size=CLASSES)
             for i, part in enumerate(weight.split(rows))]
    lse, picked = (torch.stack(values) for values in zip(*parts, strict=True))
    return (torch.logsumexp(lse, 0) - picked.sum(0)).masked_fill(targets == -100, 0.0)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("few_rows", [False, True], ids=["one chunk", "many chunks"])
def test_shards_give_the_cross_entropy(shards, few_rows, monkeypatch):
    if few_rows:
        monkeypatch.setattr(chunking, "BUFFER_ELEMENTS", 50)
        monkeypatch.setattr(chunking, "LEAST_ROWS", 4)
    hidden, weight, targets, dloss = problem()
    losses = joined(hidden, weight, targets, shards)
    expected = linear_cross_entropy(hidden, weight, targets, vocab_size=CLASSES)
    torch.testing.assert_close(losses, expected, atol=2e-6, rtol=1e-6)
    got = torch.autograd.grad(losses, (hidden, weight), dloss)
    for a, b in zip(got, torch.autograd.grad(expected, (hidden, weight), dloss), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert (got[1][CLASSES:] == 0).all()


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets, _ = problem(torch.float64)
    part = weight[:20].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logsumexp(h, w, targets, first=5, vocab_size=CLASSES), (hidden, part))


def test_a_shard_of_padding_alone_adds_nothing():
    hidden, weight, targets, _ = problem()
    lse, picked = linear_logsumexp(hidden, weight, targets, first=CLASSES, vocab_size=CLASSES)
    assert (lse == -torch.inf).all()
    assert (picked == 0).all()


def test_bf16_products_and_fp32_sums():
    hidden, weight, targets, _ = problem()
    lse, picked = linear_logsumexp(hidden.bfloat16(), weight, targets, first=0, vocab_size=CLASSES)
    exact = linear_logsumexp(hidden, weight, targets, first=0, vocab_size=CLASSES)
    assert lse.dtype == picked.dtype == torch.float32
    torch.testing.assert_close((lse, picked), exact, atol=0.1, rtol=0.02)


@pytest.mark.parametrize(("change", "message"), [
    (dict(weight=torch.zeros(4, C + 1)), "expected \\(N, C\\) and \\(V, C\\)"),
    (dict(targets=torch.zeros(N)), "expected int64"),
    (dict(targets=torch.full((N,), CLASSES)), f"expected 0 <= target < {CLASSES}"),
    (dict(first=-1), "first=-1"),
])
def test_what_does_not_fit_is_named(change, message):
    hidden, weight, targets, _ = problem()
    arguments = dict(hidden=hidden, weight=weight, targets=targets, first=0, vocab_size=CLASSES) | change
    with pytest.raises(ValueError, match=message):
        linear_logsumexp(**arguments)
