"""The C++ kernels of layer_norm, residual_layer_norm and cross_entropy, each instruction set against float64."""

import math

import pytest
import torch

from gptdist.ops import backends, cross_entropy, layer_norm, residual_layer_norm

pytestmark = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")

C = torch.ops.gptdist_c
FP32, BF16 = torch.float32, torch.bfloat16
HALF_ULP = {FP32: 2.0**-24, BF16: 2.0**-8}  # relative
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}
EPS = 1e-5
INF = math.inf


@pytest.fixture(params=LEVELS)
def isa(request):
    """Each instruction set that this processor has."""
    best, level = C.cpu_isa(-1), LEVELS[request.param]
    if C.cpu_isa(level) != level:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    C.cpu_isa(best)


@pytest.fixture(autouse=True)
def compiled_ops(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)


def randn(*shape, dtype=FP32, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def close(got, exact, dtype, bound):
    """|got - exact| <= the rounding to dtype, and `bound`, a tensor or number of the arithmetic's error before it."""
    error = (got.double() - exact).abs()
    allowed = 1.01 * HALF_ULP[dtype] * exact.abs() + bound
    assert got.dtype == dtype
    assert (error <= allowed).all(), f"error {error.max():.3g}, {(error / allowed).max():.3g} times what is allowed"


# layer norm

# Rows around the 32-row blocks of partial sums; widths around vector widths and the 64 lanes of a sum.
SHAPES = [(1, 1), (2, 3, 5), (31, 16), (33, 63), (32, 64), (65, 130), (3, 1000), (7,)]
# x, the residual or none, y
FORWARD = [(FP32, None, FP32), (BF16, None, BF16), (FP32, None, BF16), (FP32, FP32, FP32), (BF16, BF16, BF16),
           (BF16, FP32, BF16)]


def exact_norm(s, weight, bias):
    """y, mean, rstd in float64, and a bound of fp32's error in y: some 2^-24 of each term."""
    s = s.double()
    mean = s.mean(-1, keepdim=True)
    rstd = ((s - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    product = (s - mean) * rstd * weight.double()
    offset = 0.0 if bias is None else bias.double()
    scale = product.abs() + (s.abs() + mean.abs()) * rstd * weight.abs() + (0.0 if bias is None else bias.abs())
    return product + offset, mean[..., 0], rstd[..., 0], 8 * HALF_ULP[FP32] * scale


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", FORWARD, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_forward(shape, dtypes):
    x_dtype, residual_dtype, y_dtype = dtypes
    x, weight = randn(*shape, dtype=x_dtype, scale=3.0) + 1, randn(shape[-1], seed=1)
    bias = randn(shape[-1], seed=2) if shape[0] % 2 else None
    if residual_dtype is None:
        s = x
        op = C.layer_norm_fwd if x_dtype == y_dtype else C.layer_norm_to_bf16_fwd
        y, mean, rstd = op(x, weight, bias, EPS)
    else:
        residual = randn(*shape, dtype=residual_dtype, seed=3)
        y, s, mean, rstd = C.residual_layer_norm_fwd(x, residual, weight, bias, EPS)
        assert torch.equal(s, x + residual)
    exact, exact_mean, exact_rstd, bound = exact_norm(s, weight, bias)
    close(y, exact, y_dtype, bound)
    close(mean, exact_mean, FP32, 4 * HALF_ULP[FP32] * s.double().abs().mean(-1))
    close(rstd, exact_rstd, FP32, 8 * HALF_ULP[FP32] * exact_rstd)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)  # dy, s
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_backward(shape, dtypes):
    dy, s = randn(*shape, dtype=dtypes[0]), randn(*shape, dtype=dtypes[1], seed=1, scale=3.0) + 1
    ds, weight = randn(*shape, dtype=dtypes[1], seed=2), randn(shape[-1], seed=3)
    _, mean, rstd, _ = exact_norm(s, weight, None)
    mean, rstd = mean.float(), rstd.float()
    xhat = (s.double() - mean.double()[..., None]) * rstd.double()[..., None]
    g = dy.double() * weight.double()
    parts = g, g.mean(-1, keepdim=True), xhat * (g * xhat).mean(-1, keepdim=True)
    exact_dx = rstd.double()[..., None] * (parts[0] - parts[1] - parts[2])
    # Each part has errors of some 2^-24 of the absolute values that were summed for it.
    absolute = g.abs() + g.abs().mean(-1, keepdim=True) + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True)
    bound = 8 * HALF_ULP[FP32] * (rstd.double()[..., None] * absolute + ds.double().abs())
    rows = tuple(range(dy.dim() - 1))
    dx, dweight, dbias = C.residual_layer_norm_bwd(dy, ds, s, mean, rstd, weight, True)
    close(dx, exact_dx + ds.double(), dtypes[1], bound)
    for got, terms in ((dweight, dy.double() * xhat), (dbias, dy.double())):
        total, size = (terms.sum(rows), terms.abs().sum(rows)) if rows else (terms, terms.abs())
        close(got, total, FP32, 8 * HALF_ULP[FP32] * size)
    alone, same, none = C.layer_norm_bwd(dy, s, mean, rstd, weight, False)
    close(alone, exact_dx, dtypes[1], bound)
    assert torch.equal(same, dweight)
    assert none.numel() == 0


@pytest.mark.usefixtures("isa")
def test_layer_norm_of_special_rows():
    x = randn(5, 70)
    x[1, 3], x[2, 69], x[3] = INF, math.nan, 7.5
    x[4] += 1000.0  # variance is taken around the mean: no cancellation
    y, mean, _ = C.layer_norm_fwd(x, torch.ones(70), None, EPS)
    assert y[1:3].isnan().all()
    assert (y[3] == 0).all()
    assert mean[1] == INF
    torch.testing.assert_close(y[4].double(), exact_norm(x[4], torch.ones(70), None)[0], atol=1e-3, rtol=0)


def test_layer_norm_dtype_of_the_result():
    x, weight, bias = randn(4, 40).requires_grad_(), randn(40, seed=1).requires_grad_(), randn(40, seed=2)
    y = layer_norm(x, weight, bias, dtype=BF16)
    assert torch.equal(y, layer_norm(x, weight, bias).bfloat16())
    dy = randn(4, 40, dtype=BF16, seed=3)
    cast = torch.autograd.grad(layer_norm(x, weight, bias).bfloat16(), (x, weight), dy)
    for got, want in zip(torch.autograd.grad(y, (x, weight), dy), cast, strict=True):
        assert got.dtype == FP32
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


# cross entropy


@pytest.mark.usefixtures("isa")
def test_exponential_has_two_ulps():
    x = torch.cat([torch.linspace(-87.0, 1.0, 200_001), -torch.logspace(-30, 1, 1000), torch.zeros(1)])[None]
    gradient = C.cross_entropy_bwd(torch.ones(1), x, torch.tensor([0]), torch.zeros(1), -100)[0, 1:]  # exp(x - 0)
    exact = x[0, 1:].double().exp()
    assert ((gradient.double() - exact).abs() <= 2 * 2.0**-23 * exact).all()
    below = torch.tensor([[0.0, -87.1, -90.0, -104.0, -1e30, -INF]])
    assert (C.cross_entropy_bwd(torch.ones(1), below, torch.tensor([0]), torch.zeros(1), -100)[0, 1:] == 0).all()


def entropy_case(rows, vocabulary, dtype):
    """Logits whose rows lie apart, targets of which some are ignored, dloss."""
    logits = randn(rows, vocabulary + 7, dtype=dtype, scale=3.0)[:, :vocabulary]
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[1::5] = -100
    return logits, targets, randn(rows, seed=4)


def exact_entropy(logits, targets):
    """loss, lse and the gradient for a dloss of 1, in float64 with the kernels' conventions for what is not finite."""
    z, ignored = logits.double(), targets == -100
    lse = torch.logsumexp(z, -1)
    index = targets.masked_fill(ignored, 0)[:, None]
    loss = (lse - z.gather(1, index)[:, 0]).masked_fill(ignored, 0.0)
    gradient = (z - lse[:, None]).exp().scatter_add(1, index, -torch.ones_like(index, dtype=z.dtype))
    return loss, lse, gradient.masked_fill(ignored[:, None], 0.0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 63), (2, 64), (11, 65), (6, 1003)], ids=str)
def test_cross_entropy(shape, dtype):
    logits, targets, dloss = entropy_case(*shape, dtype)
    loss, lse, gradient = exact_entropy(logits, targets)
    bound = 2e-7 * (lse.abs() + logits.double().abs().amax(-1))  # of a difference of numbers of that size
    got = C.cross_entropy_fwd(logits, targets, -100)
    close(got[0], loss, FP32, bound)
    close(got[1], lse, FP32, bound)
    bound = 1e-6 + bound[:, None]  # an error in lse is a relative one in its exponential
    contiguous = logits.contiguous()
    scaled = C.cross_entropy_bwd(dloss, contiguous, targets, got[1], -100)
    close(scaled, gradient * dloss.double()[:, None], dtype, bound * dloss.double().abs()[:, None])
    in_place = entropy_case(*shape, dtype)[0]
    C.cross_entropy_bwd_(dloss, in_place, targets, got[1], -100)
    assert torch.equal(in_place, scaled)
    both = entropy_case(*shape, dtype)[0]
    unit_loss, unit_lse = C.cross_entropy_gradient_(both, targets, -100)
    assert torch.equal(unit_loss, got[0])
    assert torch.equal(unit_lse, got[1])
    close(both, gradient, dtype, bound)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocabulary", [17, 200])
def test_cross_entropy_of_special_logits_is_torchs(vocabulary, dtype):
    logits = randn(9, vocabulary, dtype=dtype, scale=3.0)
    targets = torch.tensor([0, 1, 2, 5, 6, 0, 3, 0, -100])
    logits[1, ::2] = -INF  # padding
    logits[2] = -INF
    logits[3, 5] = logits[4, 5] = INF
    logits[5, vocabulary - 1] = math.nan
    logits[6] = -INF
    logits[6, 3] = 2.0
    logits[7, 0] = -INF  # the target is padding
    logits[8, 4] = math.nan
    loss, lse, gradient = exact_entropy(logits, targets)
    got = C.cross_entropy_fwd(logits, targets, -100)
    for a, b in zip(got, (loss, lse), strict=True):
        torch.testing.assert_close(a.double(), b, equal_nan=True, rtol=1e-6, atol=1e-6)
    dlogits = C.cross_entropy_bwd(torch.ones(9), logits, targets, got[1], -100)
    both = logits.clone()
    for a, b in zip(C.cross_entropy_gradient_(both, targets, -100), got, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    for a in (dlogits, both):
        torch.testing.assert_close(a.double(), gradient, equal_nan=True, rtol=2 * HALF_ULP[dtype], atol=1e-6)
        assert (a[1, ::2] == 0).all()


def test_a_nan_of_any_bits_stays_nan():
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7FC000FF, -1, 0x7F800001):
        logits = torch.zeros(1, 80)
        logits.view(torch.int32)[0, 40] = bits
        loss, lse = C.cross_entropy_gradient_(logits, torch.tensor([3]), -100)
        assert loss.isnan()
        assert lse.isnan()
        assert logits.isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scaled_sum(dtype):
    x, addend = randn(3, 47, dtype=dtype), randn(3, 47, seed=1)
    out = torch.full((3, 47), math.nan)
    C.scaled_sum_(out, x, None, 0.5)
    assert torch.equal(out, x.float() * 0.5)
    C.scaled_sum_(out, x, addend, 0.25)
    assert torch.equal(out, (x.float() + addend) * 0.25)
    C.scaled_sum_(addend, x, addend, 0.25)
    assert torch.equal(addend, out)


# what they share


def test_bits_do_not_depend_on_the_number_of_threads():
    x, residual, weight, bias = randn(700, 530, dtype=BF16), randn(700, 530), randn(530), randn(530, seed=1)
    dy, ds = randn(700, 530, dtype=BF16, seed=2), randn(700, 530, seed=3)
    logits, targets, dloss = entropy_case(50, 9001, BF16)
    both, threads, results = torch.empty_like(logits), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, s, mean, rstd = C.residual_layer_norm_fwd(x, residual, weight, bias, EPS)
            gradients = C.residual_layer_norm_bwd(dy, ds, s, mean, rstd, weight, True)
            loss, lse = C.cross_entropy_fwd(logits, targets, -100)
            dlogits = C.cross_entropy_bwd(dloss, logits.contiguous(), targets, lse, -100)
            losses = C.cross_entropy_gradient_(both.copy_(logits), targets, -100)
            results.append((y, s, mean, rstd, *gradients, loss, lse, dlogits, *losses, both.clone()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_tensors():
    empty, weight = torch.empty(0, 8), torch.ones(8)
    y, s, mean, _ = C.residual_layer_norm_fwd(empty, empty, weight, None, EPS)
    assert (y.shape, s.shape, mean.shape) == ((0, 8), (0, 8), (0,))
    dx, dweight, dbias = C.layer_norm_bwd(empty, empty, mean, mean, weight, True)
    assert dx.shape == (0, 8)
    assert torch.equal(torch.cat([dweight, dbias]), torch.zeros(16))
    loss, lse = C.cross_entropy_gradient_(empty, torch.empty(0, dtype=torch.int64), -100)
    assert loss.numel() == lse.numel() == 0


X, W, ROW, TARGETS = randn(4, 8), randn(8), randn(4), torch.tensor([1, 2, -100, 3])


@pytest.mark.parametrize(("op", "arguments", "message"), [
    ("layer_norm_fwd", (X.t(), ROW, None, EPS), "layer_norm: x is not contiguous"),
    ("layer_norm_fwd", (X.double(), W, None, EPS), "layer_norm: x is float64, expected float32 or bfloat16"),
    ("layer_norm_fwd", (torch.tensor(1.0), W, None, EPS), "layer_norm: x is a scalar"),
    ("layer_norm_fwd", (X, randn(7), None, EPS), "layer_norm: weight has 7 elements, expected C=8"),
    ("layer_norm_fwd", (X, W.bfloat16(), None, EPS), "layer_norm: weight is bfloat16, expected float32"),
    ("layer_norm_fwd", (X, W, randn(9), EPS), "layer_norm: bias has 9 elements, expected C=8"),
    ("layer_norm_to_bf16_fwd", (X.bfloat16(), W, None, EPS), "layer_norm: x is bfloat16, expected float32"),
    ("residual_layer_norm_fwd", (X, X[:2], W, None, EPS), r"residual has shape \(2, 8\), expected \(4, 8\) as x"),
    ("residual_layer_norm_fwd", (X, X.bfloat16(), W, None, EPS), "residual is bfloat16, expected float32 as x"),
    ("layer_norm_bwd", (X[:2], X, ROW, ROW, W, True), r"dy has shape \(2, 8\), expected \(4, 8\) as x"),
    ("layer_norm_bwd", (X, X.bfloat16(), ROW, ROW, W, True), "x is bfloat16, expected float32 as dy"),
    ("layer_norm_bwd", (X, X, ROW[:3], ROW, W, True), "mean has 3 elements, expected rows=4"),
    ("layer_norm_bwd", (X, X, ROW, ROW.double(), W, True), "rstd is float64, expected float32"),
    ("residual_layer_norm_bwd", (X, X.bfloat16(), X, ROW, ROW, W, True), "ds is bfloat16, expected float32 as sum"),
    ("cross_entropy_fwd", (W, TARGETS, -100), r"logits has shape \(8\), expected \(N, V\)"),
    ("cross_entropy_fwd", (X.half(), TARGETS, -100), "logits is float16, expected float32 or bfloat16"),
    ("cross_entropy_fwd", (X[:, :0], TARGETS, -100), "logits have V=0"),
    ("cross_entropy_fwd", (X[:, ::2], TARGETS, -100), "rows that are not contiguous"),
    ("cross_entropy_fwd", (W.expand(4, 8), TARGETS, -100), "rows that overlap"),
    ("cross_entropy_fwd", (X, TARGETS[:3], -100), "targets has 3 elements, expected N=4"),
    ("cross_entropy_fwd", (X, TARGETS.int(), -100), "targets is int32, expected int64"),
    ("cross_entropy_fwd", (X, TARGETS + 5, -100), r"targets hold -95, expected 0 <= target < 8"),
    ("cross_entropy_gradient_", (X, TARGETS * 4, -100), r"targets hold 8, expected 0 <= target < 8"),
    ("cross_entropy_bwd", (ROW, X[:, :6], TARGETS, ROW, -100), "logits is not contiguous"),
    ("cross_entropy_bwd_", (ROW[:1], X, TARGETS, ROW, -100), "dloss has 1 elements, expected N=4"),
    ("scaled_sum_", (X, W, None, 1.0), "out has 32 elements, expected x's=8"),
])
def test_kernels_refuse_what_they_cannot_read(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(C, op)(*arguments)


def test_what_does_not_fit_goes_to_the_reference_with_a_reason():
    for op in ("layer_norm", "residual_layer_norm", "cross_entropy", "linear_cross_entropy"):
        assert backends.choose(op, "cpu", BF16).backend == "cpu"
        assert backends.choose(op, "cpu", torch.float16) == ("reference", "the cpu kernel does not take torch.float16")
    x, weight = randn(3, 8).half(), randn(8).half()
    assert layer_norm(x, weight).dtype == torch.float16
    assert residual_layer_norm(randn(3, 8), x, weight)[1].dtype == FP32
    assert cross_entropy(x, torch.tensor([0, 1, 2])).dtype == FP32


def test_ops_agree_with_their_references(monkeypatch):
    """Strided inputs, parameters in bf16, expanded gradients: what the ops adapt for the kernels."""
    def results():
        x, residual = randn(40, 6, dtype=BF16).t().requires_grad_(), randn(6, 40, seed=1).requires_grad_()
        weight, bias = randn(40, dtype=BF16).requires_grad_(), randn(40, seed=2).requires_grad_()
        y, s = residual_layer_norm(x, residual, weight, bias)
        z = layer_norm(s, weight, bias)
        loss = cross_entropy(y[:, 1:21], torch.tensor([1, 2, 3, -100, 5, 6]))
        total = (y.float() * 0.3).sum() + z.sum() + loss.sum()
        return y, s, z, loss, *torch.autograd.grad(total, (x, residual, weight, bias))

    compiled = results()
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    for got, want in zip(compiled, results(), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-5, rtol=2.0**-7 if got.dtype == BF16 else 1e-5)
