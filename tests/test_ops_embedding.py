"""tied_embedding: one gradient for a weight that is read twice, the same as autograd's sum of two."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gptdist.ops import linear_cross_entropy, tied_embedding


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    return torch.randint(0, 11, (4, 7)), torch.randint(0, 11, (28,)), weight  # most tokens are there more than once


def loss(x, head, targets):
    return linear_cross_entropy(x.flatten(0, 1).tanh(), head, targets).sum()


def test_gradient_is_the_sum_of_both():
    tokens, targets, weight = problem()
    x, head = tied_embedding(tokens, weight)
    assert torch.equal(x, F.embedding(tokens, weight))
    assert torch.equal(head, weight)
    (want,) = torch.autograd.grad(loss(F.embedding(tokens, weight), weight, targets), weight)
    total = loss(x, head, targets)
    for _ in range(2):  # a gradient that was added to is not met again
        (got,) = torch.autograd.grad(total, weight, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_one_of_both_alone():
    tokens, targets, weight = problem()
    x, _ = tied_embedding(tokens, weight)
    dx = torch.randn_like(x)
    (want,) = torch.autograd.grad(F.embedding(tokens, weight), weight, dx)
    torch.testing.assert_close(torch.autograd.grad(x, weight, dx)[0], want)
    _, head = tied_embedding(tokens, weight)
    hidden = torch.randn(28, 6, dtype=torch.float64)
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(hidden, head, targets).sum(), weight)[0], want)


def test_no_gradient_of_a_frozen_weight():
    tokens, _, weight = problem()
    x, head = tied_embedding(tokens, weight.detach())
    assert not x.requires_grad
    assert not head.requires_grad
    x, head = tied_embedding(tokens, weight)
    with pytest.raises(RuntimeError, match="modified inplace"):
        head.add_(1)


def test_backward_makes_no_second_gradient():
    tokens, targets, weight = problem(torch.float32)
    total = loss(*tied_embedding(tokens, weight), targets)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == weight.shape:
                made.append(out.untyped_storage().data_ptr())
            return out

    with Made():
        (gradient,) = torch.autograd.grad(total, weight)
    assert set(made) == {gradient.untyped_storage().data_ptr()}


def test_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    tokens, weight = torch.randint(0, 50, (3000,)), torch.randn(50, 300, requires_grad=True)
    dx, dhead, threads, results = torch.randn(3000, 300), torch.randn(50, 300), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += torch.autograd.grad(tied_embedding(tokens, weight), weight, (dx, dhead.clone()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
