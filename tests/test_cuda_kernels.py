"""The CUDA kernels' numbers, run from their PTX, against float64; edge cases, determinism, memory traffic.

Every bound is half a unit in the last place of the result's dtype plus a multiple of 2^-24 (fp32's) times the size of
what was added up. The machine checks at the same time that no access leaves a tensor, that nothing uninitialised is
read, and that no two threads race.
"""

import pytest
import torch

from gptdist import ops
from gptdist.ops.random import keep_mask
from tests import cuda_vm

VM = torch.ops.gptdist_vm
FP32, BF16, FP16 = cuda_vm.DTYPES
HALF_ULP = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}
LEAST_NORMAL_HALF_ULP = {FP32: 2.0**-150, BF16: 2.0**-134, FP16: 2.0**-25}  # of subnormal results
EPS = 2.0**-24
# (x, residual and sum, weight and bias): each of the latter in x's dtype or fp32
TYPES = [(FP32, FP32, FP32), *((x, s, p) for x in (BF16, FP16) for s in (x, FP32) for p in (x, FP32))]
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
INFINITY, NAN = float("inf"), float("nan")


def name(types):
    return "-".join(NAMES[dtype] for dtype in types)


pytestmark = pytest.mark.usefixtures("poisoned")


def run(device, op, *arguments, seed=0):
    """The op's outputs and its launches."""
    with device.run(seed=seed) as log:
        outputs = getattr(VM, op)(*arguments)
    return outputs, log.launches


def assert_within(got, exact, arithmetic):
    """|got - exact| is at most half an ulp of got's dtype and `arithmetic`."""
    bound = HALF_ULP[got.dtype] * exact.abs() + LEAST_NORMAL_HALF_ULP[got.dtype] + arithmetic
    excess = ((got.double() - exact).abs() / bound).max().item() if got.numel() else 0.0
    assert excess <= 1.0, f"{excess:.2f} times the bound"  # NaN fails too


def traffic(launch):
    """(sectors, least sectors) of a launch's global loads and stores."""
    counters = launch.counters
    return tuple(counters[f"load_sectors{ideal}"] + counters[f"store_sectors{ideal}"] for ideal in ("", "_ideal"))


# layer norm


def norm_case(rows, width, types):
    x_dtype, sum_dtype, parameter_dtype = types
    offset = torch.randn(rows, 1)  # a mean that is not zero
    x = (torch.randn(rows, width) * 2 + offset).to(x_dtype)
    residual = torch.randn(rows, width).to(sum_dtype)
    weight, bias = (torch.randn(width).to(parameter_dtype) for _ in range(2))
    return x, residual, weight, bias


def check_norm_forward(y, mean, rstd, s, weight, bias, eps):
    s = s.double()
    exact_mean = s.mean(-1)
    variance = (s - exact_mean[:, None]).square().mean(-1)
    exact_rstd = (variance + eps).rsqrt()
    largest = s.abs().amax(-1) if s.numel() else exact_mean
    assert_within(mean, exact_mean, 8 * EPS * largest)
    assert_within(rstd, exact_rstd, 8 * EPS * exact_rstd * (1 + largest * exact_rstd))
    scaled = (s - exact_mean[:, None]) * exact_rstd[:, None] * weight.double()
    exact = scaled if bias is None else scaled + bias.double()
    size = largest[:, None] * exact_rstd[:, None] * weight.double().abs()  # the mean's error, in y
    assert_within(y, exact, EPS * (8 * size + 8 * scaled.abs() + 4 * exact.abs()))


NORM_SHAPES = [
    (1, 64),
    (7, 72),
    (100, 64),
    (100, 512),
    (7, 768),
    (33, 1024),
    (5, 1032),
    (7, 1600),
    (3, 4096),
    (2, 16384),
    (2000, 64),  # more rows than the partials take in one turn
]


@pytest.mark.parametrize("types", TYPES, ids=name)
def test_layer_norm_forward(device, types):
    for rows, width in NORM_SHAPES:
        x, residual, weight, bias = norm_case(rows, width, types)
        (y, mean, rstd), _ = run(device, "layer_norm_fwd", x, weight, bias, 1e-5)
        check_norm_forward(y, mean, rstd, x, weight, bias, 1e-5)
        (y, s, mean, rstd), _ = run(device, "residual_layer_norm_fwd", x, residual, weight, None, 1e-3)
        assert torch.equal(s, (x.float() + residual.float()).to(s.dtype))
        check_norm_forward(y, mean, rstd, s, weight, None, 1e-3)


@pytest.mark.parametrize("types", TYPES, ids=name)
def test_layer_norm_backward(device, types):
    for rows, width in NORM_SHAPES:
        dy, s, weight, _ = norm_case(rows, width, types)
        ds = torch.randn(rows, width).to(s.dtype)
        exact_s, g = s.double(), dy.double() * weight.double()
        mean = exact_s.mean(-1).float()
        rstd = ((exact_s - exact_s.mean(-1, keepdim=True)).square().mean(-1) + 1e-5).rsqrt().float()
        (dx, dweight, dbias), _ = run(device, "residual_layer_norm_bwd", dy, ds, s, mean, rstd, weight, True)

        scale = rstd.double()[:, None]
        xhat = (exact_s - mean.double()[:, None]) * scale
        mean_g, mean_g_xhat = g.mean(-1, keepdim=True), (g * xhat).mean(-1, keepdim=True)
        inner = g - mean_g - xhat * mean_g_xhat
        size = g.abs() + g.abs().mean(-1, keepdim=True) + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True)
        # (s - mean) rounds once, as do most steps; sums of up to 16384 are 16 to 32 in sequence, then a tree
        assert_within(dx, scale * inner + ds.double(), EPS * (8 * scale * size + 2 * ds.double().abs()))
        dy = dy.double()
        assert_within(dweight, (dy * xhat).sum(0), 8 * EPS * (dy * xhat).abs().sum(0))
        assert_within(dbias, dy.sum(0), 8 * EPS * dy.abs().sum(0))

        (alone, _, none), _ = run(device, "layer_norm_bwd", dy.to(types[0]), s, mean, rstd, weight, False)
        assert_within(alone, scale * inner, EPS * 8 * scale * size)
        assert none.numel() == 0


def test_layer_norm_gradients_do_not_depend_on_the_schedule(device):
    dy, s, weight, _ = norm_case(100, 768, (BF16, BF16, FP32))
    statistic = torch.ones(100)
    first, second = (
        run(device, "layer_norm_bwd", dy, s, statistic, statistic, weight, True, seed=seed)[0] for seed in (1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layer_norm_of_special_rows(device):
    x = torch.randn(6, 1600)
    x[1], x[2] = 3.0, 1e4  # constant: exactly the bias
    x[3, 7], x[4, 1599] = NAN, INFINITY
    weight, bias = torch.randn(2, 1600)
    (y, _, rstd), _ = run(device, "layer_norm_fwd", x, weight, bias, 1e-5)
    assert torch.equal(y[1:3], bias.expand(2, -1))
    torch.testing.assert_close(rstd[1:3], torch.full((2,), 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert y[3:5].isnan().all()
    assert y[[0, 5]].isfinite().all()


# bias_gelu


def gelu_terms(h):
    """gelu(h), its slope, and u of the header, in float64 without cancellation."""
    k = (2 / torch.pi) ** 0.5
    u = k * (h + 0.044715 * h**3)
    s = torch.sigmoid(2 * u)
    return h * s, s + h * s * torch.sigmoid(-2 * u) * 2 * k * (1 + 3 * 0.044715 * h**2), u


GELU_TYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]
GELU_SHAPES = [(1, 8), (4000, 8), (7, 72), (100, 64), (33, 768), (7, 1600), (70, 3072), (2, 16384)]


@pytest.mark.parametrize("types", GELU_TYPES, ids=name)
def test_bias_gelu(device, types):
    dtype, bias_dtype = types
    for rows, width in GELU_SHAPES:
        x, dy = (torch.randn(rows, width) * 3).to(dtype), torch.randn(rows, width).to(dtype)
        for bias in (torch.randn(width).to(bias_dtype), None):
            h = (x.float() if bias is None else x.float() + bias.float()).double()  # one rounding, as in the kernel
            y, slope, u = gelu_terms(h)
            got, _ = run(device, "bias_gelu_fwd", x, bias)
            assert_within(got, y, EPS * y.abs() * (8 + 8 * u.abs()) + h.abs() * 2.0**-126)
            (dx, dbias), _ = run(device, "bias_gelu_bwd", dy, x, bias)
            exact = dy.double() * slope
            assert_within(dx, exact, 16 * EPS * dy.double().abs())
            if bias is not None:
                assert_within(dbias, exact.sum(0), EPS * 24 * dy.double().abs().sum(0))


def test_bias_gelu_over_the_whole_range(device):
    h = torch.cat([torch.linspace(-16, 16, 4096), torch.logspace(-30, 18, 2048), -torch.logspace(-30, 18, 2048)])[None]
    y, slope, u = gelu_terms(h.double())
    got, _ = run(device, "bias_gelu_fwd", h, None)
    assert_within(got, y, EPS * y.abs() * (8 + 8 * u.abs()) + h.double().abs() * 2.0**-126)
    (dx, _), _ = run(device, "bias_gelu_bwd", torch.ones_like(h), h, None)
    assert_within(dx, slope, torch.full_like(slope, 16 * EPS))


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
def test_bias_gelu_of_special_values_is_pytorchs(device, dtype):
    x = torch.tensor([INFINITY, -INFINITY, NAN, 0.0, -0.0, 60.0, -60.0, -1000.0], dtype=dtype)[None]
    exact = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x.float()), x.float(), approximate="tanh").to(dtype)
    got, _ = run(device, "bias_gelu_fwd", x, None)
    (dx, _), _ = run(device, "bias_gelu_bwd", torch.ones_like(x), x, None)
    for a, b in ((got, exact), (dx, slope)):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=1e-30)


# cross entropy


def entropy_case(rows, vocabulary, dtype):
    logits = (torch.randn(rows, vocabulary) * 4).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,)), torch.rand(rows) + 0.5


def check_entropy(device, logits, targets, dloss):
    (loss, lse), _ = run(device, "cross_entropy_fwd", logits, targets, -100)
    z = logits.double()
    exact_lse, largest = torch.logsumexp(z, -1), z.amax(-1)
    picked = z.gather(1, targets[:, None])[:, 0]
    log_sum = exact_lse - largest
    assert_within(lse, exact_lse, EPS * (16 + 2 * log_sum))
    assert_within(loss, exact_lse - picked, EPS * (16 + 2 * log_sum + (largest - picked)))

    p = torch.exp(z - lse.double()[:, None])
    exact = p.scatter_add(1, targets[:, None], -torch.ones(len(z), 1, dtype=z.dtype)) * dloss.double()[:, None]
    got, _ = run(device, "cross_entropy_bwd", dloss, logits, targets, lse, -100)
    power = (z - lse.double()[:, None]).abs()
    arithmetic = EPS * (4 * exact.abs() + dloss.double()[:, None] * p * (8 + 3 * power))
    assert_within(got, exact, arithmetic + 2.0**-126)  # ex2 flushes below the normal range
    return lse, got


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(3, 1), (9, 7), (100, 17), (33, 1000), (4, 4099), (3, 50257), (2, 50304)]
)
def test_cross_entropy(device, rows, vocabulary, dtype):
    check_entropy(device, *entropy_case(rows, vocabulary, dtype))


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
def test_cross_entropy_in_place_in_rows_that_lie_apart(device, dtype):
    logits, targets, dloss = entropy_case(5, 1003, dtype)
    lse, expected = check_entropy(device, logits, targets, dloss)
    padded = torch.full((5, 1021), 7.0, dtype=dtype)
    padded[:, :1003] = logits
    (_, strided_lse), _ = run(device, "cross_entropy_fwd", padded[:, :1003], targets, -100)
    torch.testing.assert_close(strided_lse, lse)  # other alignments, another order of additions
    run(device, "cross_entropy_bwd_", dloss, padded[:, :1003], targets, lse, -100)
    assert torch.equal(padded[:, :1003], expected)
    assert (padded[:, 1003:] == 7.0).all()


@pytest.mark.parametrize("vocabulary", [17, 1000])
def test_ignored_and_impossible_targets(device, vocabulary):
    logits, targets, dloss = entropy_case(6, vocabulary, BF16)
    targets[1], targets[2], targets[3] = -100, vocabulary, -1
    logits[1] = NAN  # an ignored row is not even read
    dloss[1] = NAN
    (loss, lse), _ = run(device, "cross_entropy_fwd", logits, targets, -100)
    assert loss[1] == 0
    assert loss.isnan().tolist() == [False, False, True, True, False, False]
    assert lse[[0, 2, 3, 4, 5]].isfinite().all()
    got, _ = run(device, "cross_entropy_bwd", dloss, logits, targets, lse, -100)
    assert (got[1] == 0).all()
    assert got[2:4].isnan().all()
    assert got[[0, 4, 5]].isfinite().all()
    (loss, _), _ = run(device, "cross_entropy_fwd", logits, torch.full((6,), 5), 5)  # ignore_index in the vocabulary
    assert (loss == 0).all()


@pytest.mark.parametrize("vocabulary", [17, 4099])
@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
def test_cross_entropy_of_special_logits_is_torchs(device, vocabulary, dtype):
    logits, targets, dloss = entropy_case(8, vocabulary, dtype)
    logits[1, ::2] = -INFINITY  # padding
    targets[1] = 1
    logits[2] = -INFINITY
    logits[3, 5] = INFINITY
    targets[3] = 5
    logits[4, 5] = INFINITY
    targets[4] = 6
    logits[5, vocabulary - 1] = NAN
    logits[6] = -INFINITY
    logits[6, 3] = 2.0
    targets[6] = 3
    targets[7], logits[7, 0] = 0, -INFINITY  # the target is padding
    z = logits.double()
    exact_lse = torch.logsumexp(z, -1)
    exact_loss = exact_lse - z.gather(1, targets[:, None])[:, 0]
    p = torch.exp(z - exact_lse[:, None]).scatter_add(1, targets[:, None], -torch.ones(8, 1, dtype=z.dtype))
    (loss, lse), _ = run(device, "cross_entropy_fwd", logits, targets, -100)
    torch.testing.assert_close(lse.double(), exact_lse, equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.double(), exact_loss, equal_nan=True, rtol=1e-6, atol=1e-6)
    got, _ = run(device, "cross_entropy_bwd", dloss, logits, targets, lse, -100)
    torch.testing.assert_close(got.double(), p * dloss[:, None], equal_nan=True, rtol=2 * HALF_ULP[dtype], atol=1e-6)
    assert (got[1, ::2] == 0).all()


# dropout


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 40, 8), (1, 33, 768), (2, 3, 13), (2, 9, 1), (1, 2, 2052)])
def test_dropout(device, shape, dtype):
    B, T, C = shape
    x = torch.randn(shape).to(dtype)
    x[0, 0, 0] = NAN
    key, ids = ops.dropout_key(11, 3), torch.tensor([5, (1 << 32) + 7, -3])[:B]
    got, _ = run(device, "dropout", x, 0.3, key, ids, 9, 1000)
    keep = keep_mask(key, 0.3, ids, 9, torch.zeros_like(ids), torch.arange(1000, 1000 + T), C)
    expected = torch.where(keep, x.float() * torch.tensor(1 / (1 - 0.3)), 0).to(dtype)  # one product, one rounding
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


# memory traffic: with whole sectors per row, no access touches a sector more than its bytes need


@pytest.mark.parametrize("types", TYPES, ids=name)
@pytest.mark.parametrize("width", [64, 768, 1600, 16384])
def test_layer_norm_touches_no_sector_more_than_needed(device, width, types):
    x, residual, weight, bias = norm_case(4, width, types)
    statistic = torch.ones(4)
    launches = run(device, "residual_layer_norm_fwd", x, residual, weight, bias, 1e-5)[1]
    launches += run(device, "residual_layer_norm_bwd", x, residual, residual, statistic, statistic, weight, True)[1]
    assert [traffic(launch)[0] - traffic(launch)[1] for launch in launches] == [0, 0, 0]


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
def test_the_other_kernels_touch_no_sector_more_than_needed(device, dtype):
    x, bias = torch.randn(16, 768).to(dtype), torch.randn(768).to(dtype)
    logits, targets, dloss = entropy_case(3, 50257, dtype)  # rows begin anywhere
    key, ids = ops.dropout_key(1, 2), torch.arange(2)
    launches = run(device, "bias_gelu_fwd", x, bias)[1] + run(device, "bias_gelu_bwd", x, x, bias)[1]
    launches += run(device, "dropout", x.view(2, 8, 768), 0.1, key, ids, 0, 0)[1]
    launches += run(device, "cross_entropy_fwd", logits, targets, -100)[1]
    launches += run(device, "cross_entropy_bwd", dloss, logits, targets, dloss, -100)[1]
    excess = [traffic(launch)[0] / traffic(launch)[1] - 1 for launch in launches]
    assert excess[:4] == [0, 0, 0, 0]
    assert max(excess[4:]) < 0.002  # heads and tails
