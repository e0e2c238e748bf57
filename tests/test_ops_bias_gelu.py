"""bias_gelu: the reference and every instruction set of the C++ kernel against float64; determinism."""

import pytest
import torch
import torch.nn.functional as F

from gptdist.ops import backends, bias_gelu

needs_library = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")


def exact(x, bias, dy):
    leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (x, bias)]
    y = F.gelu(leaves[0] if bias is None else leaves[0] + leaves[1], approximate="tanh")
    return y, torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.double())


# Rows around the 64-row blocks of the bias gradient; channels around vector widths and the 1024-channel tile.
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (63, 16), (65, 33), (130, 1050), (7,)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(shape, with_bias, dtype, backend):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1], requires_grad=True) if with_bias else None
    dy = torch.randn(shape).to(dtype)
    y = bias_gelu(x, bias)
    expected, dexpected = exact(x, bias, dy)
    gradients = torch.autograd.grad(y, [leaf for leaf in (x, bias) if leaf is not None], dy)
    # PyTorch's tanh form, the reference, loses digits where 1 + tanh cancels.
    tolerance = 8e-3 if dtype == torch.bfloat16 else 6e-6 if backend == "reference" else 2e-6
    assert y.dtype == gradients[0].dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradients[0].double(), dexpected[0], atol=tolerance, rtol=tolerance)
    if with_bias:
        assert gradients[1].dtype == torch.float32
        # The sum is taken over unrounded products in every backend.
        torch.testing.assert_close(gradients[1].double(), dexpected[1], atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("backend")
def test_extreme_inputs():
    x = torch.tensor([-1e30, -100.0, -20.0, -6.0, -0.0, 1e-30, 6.0, 20.0, 100.0, 1e30, float("inf"), float("nan")])
    y = bias_gelu(x)
    expected = torch.tensor([0.0, 0.0, 0.0, -0.0, 0.0, 5e-31, 6.0, 20.0, 100.0, 1e30, float("inf"), float("nan")])
    torch.testing.assert_close(y, expected, atol=1e-7, rtol=1e-6, equal_nan=True)
    leaf = x[1:9].clone().requires_grad_()
    (dx,) = torch.autograd.grad(bias_gelu(leaf).sum(), leaf)
    torch.testing.assert_close(dx, torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]), atol=1e-5, rtol=0)


@needs_library
def test_bf16_rounds_to_nearest_even_and_keeps_nan():
    x = torch.cat([torch.randn(4096), torch.tensor([float("nan")])]).bfloat16()
    y = torch.ops.gptdist_c.bias_gelu_fwd(x, None)
    fp32 = torch.ops.gptdist_c.bias_gelu_fwd(x.float(), None)
    assert torch.equal(y[:-1], fp32[:-1].bfloat16())
    assert y[-1].isnan()


@needs_library
def test_bits_do_not_depend_on_the_number_of_threads():
    x, bias, dy = torch.randn(700, 530), torch.randn(530), torch.randn(700, 530)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = torch.ops.gptdist_c.bias_gelu_fwd(x, bias)
            results.append((y, *torch.ops.gptdist_c.bias_gelu_bwd(dy, x, bias)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_library_refuses_what_it_cannot_read():
    x = torch.randn(4, 8)
    for arguments in [(x.t(), None), (x.double(), None), (x, torch.randn(7)), (x, torch.randn(8).double())]:
        with pytest.raises(RuntimeError, match="bias_gelu"):
            torch.ops.gptdist_c.bias_gelu_fwd(*arguments)
    with pytest.raises(RuntimeError, match="must match"):
        torch.ops.gptdist_c.bias_gelu_bwd(x[:2], x, None)


@pytest.mark.usefixtures("backend")
def test_strided_inputs_and_gradients():
    base = torch.randn(16, 6, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    y = bias_gelu(base.t(), bias)
    expected = F.gelu(base.t() + bias, approximate="tanh")
    torch.testing.assert_close(y, expected)
    # sum() gives an expanded, zero-stride gradient
    for a, b in zip(
        torch.autograd.grad(y.sum(), (base, bias)), torch.autograd.grad(expected.sum(), (base, bias)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradcheck():
    x, bias = torch.randn(3, 2, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    torch.autograd.gradcheck(bias_gelu, (x, bias))
    torch.autograd.gradcheck(bias_gelu, (x,))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        bias_gelu(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="scalar"):
        bias_gelu(torch.tensor(1.0))
