"""ops.linear and its CPU kernel, on every instruction set that this processor has, against float64.

Sums of n products in fp32, in whatever order, are within n 2^-24 sum |x w| of the exact ones; y is rounded once.
"""

import pytest
import torch
import torch.nn.functional as F

from gptdist import ops
from gptdist.ops import backends
from tests.test_model import small_model

from .test_cpu_attention import kernels, levels
from .test_cpu_kernels import BF16, FP32, close, randn

compiled = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")

# in, out: around vectors of inputs and tiles of 16 outputs, of one task and of several
SIZES = [(1, 1), (5, 3), (31, 17), (32, 16), (33, 15), (64, 100), (96, 531), (770, 130), (768, 768)]


@pytest.fixture(autouse=True)
def compiled_ops(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)


def case(rows, size, dtype, bias=True):
    inputs, outputs = size
    return (randn(rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype, seed=1),
            randn(outputs, dtype=dtype, seed=2) if bias else None)


@compiled
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equals_float64(rows, dtype):
    for number, size in enumerate(SIZES):
        x, weight, bias = case(rows, size, dtype, bias=(rows + number) % 2 == 0)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        bound = (size[0] + 2) * 2.0**-24 * F.linear(x.double().abs(), weight.double().abs(),
                                                    None if bias is None else bias.double().abs())
        for _ in levels():
            close(kernels().few_rows_linear(x, weight, bias), exact, dtype, bound)


@compiled
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_depend_neither_on_threads_nor_on_what_stands_beside(dtype):
    x, weight, bias = case(8, (770, 2000), dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernels().few_rows_linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    for rows in range(1, 8):
        assert torch.equal(kernels().few_rows_linear(x[:rows], weight, bias), results[0][:rows])
    assert torch.equal(kernels().few_rows_linear(x, weight[7:50], bias[7:50]), results[0][:, 7:50])


@compiled
def test_infinities_and_nan_reach_their_outputs_alone():
    x, weight, _ = case(2, (40, 20), BF16)
    weight[3, 39], weight[4, 0] = torch.inf, torch.nan
    y = kernels().few_rows_linear(x, weight, None)
    assert y[:, 3].isinf().all()
    assert y[:, 4].isnan().all()
    assert y[:, [*range(3), *range(5, 20)]].isfinite().all()


class Calls:
    """Counts what reaches the kernel."""

    def __init__(self, monkeypatch):
        self.count = 0
        run = ops.linear.__globals__["_few_rows_linear"].run

        def counting(*args):
            self.count += 1
            return run(*args)

        monkeypatch.setattr(ops.linear.__globals__["_few_rows_linear"], "run", counting)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def test_few_rows_without_gradients_take_the_op(calls):
    x, weight, bias = case(8, (64, 33), BF16)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x.view(4, 2, 64), weight, bias), F.linear(x, weight, bias).view(4, 2, 33))
        assert calls.count == 1
    with torch.inference_mode():
        torch.testing.assert_close(ops.linear(x[0], weight), F.linear(x[0], weight))
        assert calls.count == 2


def test_everything_else_is_torchs(calls):
    x, weight, bias = case(8, (64, 33), FP32)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))  # gradients are on
    with torch.no_grad():
        many = randn(9, 64)
        assert torch.equal(ops.linear(many, weight, bias), F.linear(many, weight, bias))
        with torch.autocast("cpu", BF16):
            assert ops.linear(x, weight, bias).dtype == BF16
        graph = torch.compile(ops.linear, fullgraph=True, backend="eager")
        assert torch.equal(graph(x, weight, bias), F.linear(x, weight, bias))
        assert torch.vmap(ops.linear, in_dims=(0, None))(x.view(4, 2, 64), weight).shape == (4, 2, 33)
        assert ops.linear(x.to("meta"), weight.to("meta")).shape == (8, 33)
    assert calls.count == 0


def test_gradients_are_torchs():
    tensors = [tensor.requires_grad_() for tensor in case(3, (16, 5), FP32)]
    got, want = (torch.autograd.grad(function(*tensors).square().sum(), tensors) for function in (ops.linear, F.linear))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@torch.no_grad()
def test_what_the_kernel_does_not_take_is_torchs_with_a_reason():
    x, weight, bias = case(4, (64, 34), BF16)
    choice = backends.choose("few_rows_linear", "cpu", torch.float16)
    assert choice == ("reference", "the cpu kernel does not take torch.float16")
    misfit = ops.linear.__globals__["_misfit"]
    assert misfit(x, weight, bias) == ""
    assert misfit(randn(9, 64), weight, bias) == "more than 8 rows"
    assert misfit(x, weight, bias.float()) == "weight or bias is not torch.bfloat16, as x"
    for strided in ((x[:, :32], weight[:, :32], bias), (x[:, ::2], weight[:, ::2], None),
                    (x, weight, bias[:1].expand(34))):
        assert misfit(*strided) == "weight or bias is not contiguous"
        torch.testing.assert_close(ops.linear(*strided), F.linear(*strided))
    for tensors in ((x.half(), weight.half(), None), (x.double(), weight.double(), bias.double()),
                    (x[:, ::2], weight[:, ::2].contiguous(), bias),  # x alone is strided, which the op copies
                    (x[:0], weight, bias), (x[:, :0], weight[:, :0], bias)):
        torch.testing.assert_close(ops.linear(*tensors), F.linear(*tensors))
    with pytest.raises(RuntimeError):
        ops.linear(x, weight.float())  # as torch
    with pytest.raises(RuntimeError, match=r"weight has shape \(34, 64\), expected \(out, in=63\)"):
        ops.linear(x[:, :63], weight)


def test_a_forced_reference_is_torchs(monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    x, weight, bias = case(4, (64, 34), BF16)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_model_in_training_does_not_take_the_op(calls):
    model = small_model()
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    model(tokens, tokens).sum().backward()
    assert calls.count == 0
    with torch.no_grad():
        model(tokens, at=torch.tensor([1]))
    assert calls.count == 4 * len(model.blocks) + 1


X, W, B = randn(2, 8), randn(5, 8), randn(5)


@compiled
@pytest.mark.parametrize(("arguments", "message"), [
    ((X[0, 0], W, B), "x is a scalar"),
    ((X[:, :7], W, B), r"weight has shape \(5, 8\), expected \(out, in=7\)"),
    ((X, W[0], B), r"weight has shape \(8\)"),
    ((X[:, :0], W[:, :0], B), r"weight has shape \(5, 0\), expected in >= 1"),
    ((X.double(), W, B), "x is float64, expected float32 or bfloat16"),
    ((X, W.bfloat16(), B), "weight is bfloat16, expected float32 as x"),
    ((X, W, B.bfloat16()), "bias is bfloat16, expected float32 as x"),
    ((X, W, B[:4]), r"bias has shape \(4\), expected \(out=5\)"),
    ((X, randn(8, 5).t(), B), "weight is not contiguous"),
    ((randn(8, 2).t(), W, B), "x is not contiguous"),
    ((X.repeat(5, 1), W, B), "x has 10 rows, expected at most 8"),
])
def test_the_library_refuses_what_it_cannot_read(arguments, message):
    with pytest.raises(RuntimeError, match=f"few_rows_linear: {message}"):
        kernels().few_rows_linear(*arguments)


@compiled
def test_opcheck_of_the_kernel():
    for rows, dtype in ((1, FP32), (8, BF16)):
        torch.library.opcheck(torch.ops.gptdist.few_rows_linear.default, case(rows, (33, 17), dtype))
