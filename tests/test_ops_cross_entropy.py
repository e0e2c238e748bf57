"""cross_entropy and linear_cross_entropy against float64; chunks, padding, ignored targets, bounded memory."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gptdist.ops import backends, cross_entropy, linear_cross_entropy

module = importlib.import_module("gptdist.ops.cross_entropy")


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "BUFFER_ELEMENTS", 100)
        monkeypatch.setattr(module, "CPU_BUFFER_BYTES", 400)
        monkeypatch.setattr(module, "LEAST_ROWS", 4)


def problem(N=23, C=12, V=40, classes=37, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, classes, (N,), generator=generator)
    targets[3] = targets[N - 1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(N, generator=generator)


def exact_loss(hidden, weight, targets, classes):
    return F.cross_entropy(hidden @ weight[:classes].t(), targets, reduction="none")


@pytest.mark.usefixtures("chunks")
def test_cross_entropy_equals_pytorch_in_float64():
    logits = (3 * torch.randn(23, 40)).requires_grad_()
    targets, dloss = problem()[2:]
    loss = cross_entropy(logits, targets)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    assert loss.dtype == torch.float32
    assert loss[3] == 0
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    (dlogits,) = torch.autograd.grad(loss, logits, dloss)
    torch.testing.assert_close(
        dlogits.double(), torch.autograd.grad(expected, exact, dloss.double())[0], atol=1e-6, rtol=1e-5
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("classes", [37, 40])
def test_linear_cross_entropy_equals_pytorch_in_float64(classes):
    hidden, weight, targets, dloss = problem()
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=classes)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = exact_loss(*exact, targets, classes)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad(loss, (hidden, weight), dloss)
    for a, b in zip(got, torch.autograd.grad(expected, exact, dloss.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert got[1][classes:].abs().sum() == 0


@pytest.mark.usefixtures("chunks")
def test_bf16_hidden_with_fp32_weight():
    hidden, weight, targets, dloss = problem()
    half = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(half, weight, targets, vocab_size=37)
    assert loss.dtype == torch.float32
    expected = exact_loss(hidden, weight, targets, 37)
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.05)
    dhidden, dweight = torch.autograd.grad(loss, (half, weight), dloss)
    assert (dhidden.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    want = torch.autograd.grad(expected, (hidden, weight), dloss)
    torch.testing.assert_close(dhidden.float(), want[0], atol=0.1, rtol=0.05)
    torch.testing.assert_close(dweight, want[1], atol=0.1, rtol=0.05)


# Gradients that the forward computes, for losses that turn out to be weighted alike.


@pytest.fixture(params=["compiled", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "auto" if request.param == "compiled" else "reference")
    if request.param == "compiled" and backends.library_problem():
        pytest.skip(backends.library_problem())


@pytest.fixture
def no_backward_products(monkeypatch):
    """A backward that computes the logits again is an error."""

    def refuse(*arguments):
        raise AssertionError("the logits were computed again")

    monkeypatch.setattr(module, "_compute_gradients", refuse)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
WEIGHTS = {
    "alike": lambda dloss, ignored: torch.full_like(dloss, 0.3),
    "alike but for the ignored": lambda dloss, ignored: torch.where(ignored, dloss, 0.3),
    "none": lambda dloss, ignored: torch.zeros_like(dloss),
}


def gradients(hidden, weight, targets, dloss, **options):
    """Those of hidden and weight, and the loss; in float64 too."""
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=37, **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = exact_loss(*exact, targets, 37)
    want = torch.autograd.grad(expected, exact, dloss.double().masked_fill(targets == -100, 0.0))
    return loss, want


def close(got, want, dtype):
    """dtype: of the products. A gradient is a sum of some 20 of them."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("chunks", "backend", "no_backward_products")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_weighted_alike_need_no_logits_in_the_backward(dtype, weights):
    dtype = DTYPES[dtype]
    hidden, weight, targets, dloss = problem(dtype=dtype)
    dloss = WEIGHTS[weights](dloss, targets == -100).to(module.compute_dtype(dtype))
    loss, want = gradients(hidden, weight, targets, dloss)
    for keep in (True, False):  # twice: what is kept is not written to
        got = torch.autograd.grad(loss, (hidden, weight), dloss, retain_graph=keep)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            close(a, b, dtype)
        assert got[1][37:].abs().sum() == got[0][3].abs().sum() == 0


@pytest.mark.usefixtures("chunks", "backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_weighted_differently(dtype):
    dtype = DTYPES[dtype]
    hidden, weight, targets, dloss = problem(dtype=dtype)
    dloss = dloss.to(module.compute_dtype(dtype))
    loss, want = gradients(hidden, weight, targets, dloss)
    alike = torch.full_like(dloss, 2.0)
    for factor, keep in ((dloss, True), (alike, True), (dloss, False)):
        got = torch.autograd.grad(loss, (hidden, weight), factor, retain_graph=keep)
        if factor is dloss:
            for a, b in zip(got, want, strict=True):
                close(a, b, dtype)


@pytest.mark.usefixtures("chunks", "backend")
def test_one_gradient_alone_and_losses_used_twice(no_backward_products):
    hidden, weight, targets, dloss = problem()
    loss, want = gradients(hidden, weight.detach(), targets, dloss)  # rows of dhidden scale one by one
    close(torch.autograd.grad(loss, hidden, dloss)[0], want[0], torch.float32)
    dloss = torch.full_like(dloss, 0.7)
    loss, want = gradients(hidden.detach(), weight, targets, dloss)
    close(torch.autograd.grad(loss, weight, dloss)[0], want[1], torch.float32)
    loss, want = gradients(hidden, weight, targets, dloss)
    close(torch.autograd.grad(loss.sum() * 0.5 + (0.2 * loss).sum(), weight)[0], want[1], torch.float32)


@pytest.mark.usefixtures("chunks", "backend", "no_backward_products")
def test_all_rows_ignored_or_no_rows():
    hidden, weight, targets, _ = problem()
    for rows in (23, 0):
        h = hidden.detach()[:rows].requires_grad_()
        loss = linear_cross_entropy(h, weight, torch.full_like(targets[:rows], -100))
        assert loss.sum() == 0
        for gradient, leaf in zip(torch.autograd.grad(loss.sum(), (h, weight)), (h, weight), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


def test_nan_in_the_upstream_gradient_reaches_the_weight():
    hidden, weight, targets, dloss = problem()
    dloss[5] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), dloss)
    assert dweight.isnan().all()
    assert dhidden.isnan().any(1).nonzero().tolist() == [[5]]


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    hidden, weight, targets, _ = problem()
    expected = linear_cross_entropy(hidden, weight, targets).detach()
    monkeypatch.setattr(module, "_losses_and_gradients_", None)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)
    linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    with pytest.raises(TypeError):
        linear_cross_entropy(hidden, weight.detach(), targets)


@pytest.mark.usefixtures("chunks", "backend")
@pytest.mark.parametrize("alike", [True, False])
def test_shadow_is_read_in_place_of_the_weight(alike):
    hidden, weight, targets, dloss = problem(dtype=torch.bfloat16)
    master = (weight.detach().float() + 5).requires_grad_()  # a weight that was read would show
    dloss = torch.full_like(dloss, 0.3) if alike else dloss
    loss, want = gradients(hidden, weight, targets, dloss)
    got = linear_cross_entropy(hidden, master, targets, vocab_size=37, shadow=weight.detach())
    assert torch.equal(got, loss)
    dhidden, dweight = torch.autograd.grad(got, (hidden, master), dloss)
    assert (dhidden.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    close(dhidden, want[0], torch.bfloat16)
    close(dweight, want[1], torch.bfloat16)


def test_only_what_is_needed_is_differentiated():
    hidden, weight, targets, dloss = problem()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight), dloss)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden, dloss)[0], both[0])
    head = linear_cross_entropy(hidden.detach(), weight, targets)
    torch.testing.assert_close(torch.autograd.grad(head, weight, dloss)[0], both[1])


@pytest.mark.usefixtures("chunks")
def test_gradcheck():
    hidden, weight, targets, _ = problem(7, 3, 9, 8, torch.float64)
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, vocab_size=8), (hidden, weight))
    logits = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), logits)


def test_minus_infinity_logits_and_large_ones():
    logits = torch.tensor([[1000.0, -float("inf"), 999.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([2]))
    torch.testing.assert_close(loss, torch.tensor([1.3133]), atol=1e-4, rtol=0)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(module, "CPU_BUFFER_BYTES", 1 << 16)
    N, C, V = 4096, 8, 256  # whole logits: 4 MiB; the buffer: 64 KiB
    hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    largest = 0
    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with torch.no_grad(), Largest():
        targets = torch.zeros(N, dtype=torch.int64)
        loss, lse, *units = module._linear_fwd.run(hidden, weight, targets, None, V, -100, True, True)
        module._linear_bwd.run(loss, hidden, weight, targets, None, lse, *units, V, -100, True, True)
    assert largest <= max(1 << 14, N * C)


def test_wrong_arguments_are_named():
    hidden, weight, targets, _ = problem()
    with pytest.raises(ValueError, match=r"expected \(N, C\) and \(V, C\)"):
        linear_cross_entropy(hidden, weight[:, :5], targets)
    with pytest.raises(ValueError, match="vocab_size is 41, expected 1 to 40"):
        linear_cross_entropy(hidden, weight, targets, vocab_size=41)
    with pytest.raises(ValueError, match=r"shadow is torch.bfloat16 \(40, 12\), expected hidden's torch.float32"):
        linear_cross_entropy(hidden, weight, targets, shadow=weight.bfloat16())
    with pytest.raises(ValueError, match=r"expected int64 \(23,\)"):
        linear_cross_entropy(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="targets hold 36, expected 0 <= target < 30"):
        linear_cross_entropy(hidden, weight, torch.full((23,), 36), vocab_size=30)
    with pytest.raises(ValueError, match=r"expected \(N, V\)"):
        cross_entropy(hidden[0], targets)
