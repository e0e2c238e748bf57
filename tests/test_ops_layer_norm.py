"""layer_norm and residual_layer_norm against the formula of the header in float64, and their mixed dtypes."""

import pytest
import torch

from gptdist.ops import layer_norm, residual_layer_norm

EPS = 1e-5


def formula(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / (variance + EPS).sqrt() * weight
    return y if bias is None else y + bias


def parameters(C, with_bias, dtype=torch.float32):
    weight = (1 + 0.1 * torch.randn(C)).to(dtype).requires_grad_()
    return weight, torch.randn(C).to(dtype).requires_grad_() if with_bias else None


def gradients(output, dy, *leaves):
    return torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], dy)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 33), (3, 64), (20,)])
def test_layer_norm_equals_the_formula(shape, with_bias):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape) * 3 + 1).requires_grad_(), torch.randn(shape)
    weight, bias = parameters(shape[-1], with_bias)
    exact = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
    y, expected = layer_norm(x, weight, bias, EPS), formula(*exact)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients(y, dy, x, weight, bias), gradients(expected, dy.double(), *exact), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_residual_layer_norm_equals_the_formula(with_bias):
    torch.manual_seed(1)
    x, r = torch.randn(4, 6, 24, requires_grad=True), torch.randn(4, 6, 24, requires_grad=True)
    dy, ds = torch.randn(4, 6, 24), torch.randn(4, 6, 24)
    weight, bias = parameters(24, with_bias)
    exact = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, r, weight, bias)]
    y, s = residual_layer_norm(x, r, weight, bias, EPS)
    s_exact = exact[0] + exact[1]
    y_exact = formula(s_exact, *exact[2:])
    torch.testing.assert_close(s, x + r)
    torch.testing.assert_close(y.double(), y_exact, atol=1e-5, rtol=1e-5)
    got = gradients((y * dy + s * ds).sum(), None, x, r, weight, bias)
    want = gradients((y_exact * dy.double() + s_exact * ds.double()).sum(), None, *exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_only_one_output_used():
    x, r = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    weight, bias = parameters(8, True)
    y, s = residual_layer_norm(x, r, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(s.sum(), x, retain_graph=True)[0], torch.ones(3, 8))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(layer_norm(x + r, weight, bias).sum(), x)[0]
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias):
    torch.manual_seed(2)
    x, r = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 3, 6).double().requires_grad_()
    weight, bias = parameters(6, with_bias, torch.float64)
    torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    torch.autograd.gradcheck(residual_layer_norm, (x, r, weight, bias))


def test_mixed_dtypes_as_under_autocast():
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    r = torch.randn(4, 16, requires_grad=True)
    weight, bias = parameters(16, True)
    y = layer_norm(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(x.float(), weight, bias), atol=2e-2, rtol=1e-2)
    y, s = residual_layer_norm(x, r, weight, bias)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    got = torch.autograd.grad(y.float().sum() + s.sum(), (x, r, weight, bias))
    assert [gradient.dtype for gradient in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_wrong_arguments_are_named():
    x = torch.randn(2, 768)
    with pytest.raises(ValueError, match="layer_norm: weight has 512 elements, expected C=768"):
        layer_norm(x, torch.ones(512))
    with pytest.raises(ValueError, match="residual_layer_norm: bias has 3 elements, expected C=768"):
        residual_layer_norm(x, x, torch.ones(768), torch.ones(3))
    with pytest.raises(ValueError, match="expected x's"):
        residual_layer_norm(x, x[:1], torch.ones(768))
