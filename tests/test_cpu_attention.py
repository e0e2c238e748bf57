"""attention's CPU kernels, on every instruction set that this processor has, against float64.

Bounds are those of rounding, element by element, to first order. With u = 2^-24, w = 2^-8 for bf16 (2^-24 for fp32),
scores x = q k^T / sqrt(D) of D products and |.| taken of every factor of a product:

    e = u (2 D max_s |x| + 2 |L| + 16)         relative error of a row's probabilities P: those of x, exp and L
    out    (w + e + T u) (P Z |v|) + w |out|   P rounded for the product, T sums, out rounded
    L      e
    dv     (w + e + T u) ((P Z)^T |do|) + w |dv|
    dS     (w + 2e + (D + T) u) P (|do| |v|^T Z + |do| |out|) + P sum |do| error(out)      =: s
    dq     s |k| / sqrt(D) + w |dq|,           dk     s^T |q| / sqrt(D) + w |dk|

A wrong mask, tile or factor is off by orders of magnitude more.
"""

import importlib
import math

import pytest
import torch

from gptdist.config import ModelConfig
from gptdist.model import Dropout, LanguageModel
from gptdist.ops import attention, backends, dropout_key
from gptdist.ops.random import keep_mask
from gptdist.parallel.init import fill_initial_values

from .test_ops_attention import document_starts

attention_module = importlib.import_module("gptdist.ops.attention")
pytestmark = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")

KEY = dropout_key(3, 4)
SITE, HEAD_OFFSET = 2, 6
U = 2.0**-24

# T, Hkv, G, D, documents, p: ends of tiles and of strips, one and several heads of a group, all widths of a row
CASES = [
    (1, 2, 1, 64, False, 0.0),
    (7, 2, 2, 16, True, 0.25),
    (64, 1, 4, 64, False, 0.25),
    (64, 2, 1, 80, True, 0.0),
    (128, 2, 1, 64, False, 0.0),
    (128, 1, 2, 128, True, 0.25),
    (131, 2, 2, 64, True, 0.0),
    (131, 1, 1, 16, False, 0.25),
    (200, 1, 4, 80, False, 0.0),
    (200, 1, 2, 64, True, 0.25),
    (256, 1, 1, 128, False, 0.0),
    (256, 1, 4, 16, True, 0.0),
    (330, 1, 2, 80, True, 0.25),
    (512, 1, 1, 64, False, 0.0),
    (512, 1, 2, 128, True, 0.0),
]


def kernels():
    return torch.ops.gptdist_c


def levels():
    """Instruction sets, each selected in turn; the best again at the end."""
    best = kernels().cpu_isa(-1)
    try:
        for level in range(best + 1):
            assert kernels().cpu_isa(level) == level
            yield level
    finally:
        kernels().cpu_isa(best)


def inputs(B, T, H, G, D, dtype):
    generator = torch.Generator().manual_seed(T + D)
    qkv = torch.randn(B, T, H, G + 2, D, generator=generator).to(dtype)
    return qkv, torch.randn(B, T, H, G, D, generator=generator).to(dtype)


def arguments(B, T, documents=False, p=0.0, causal=True):
    """What the compiled ops take after the tensors."""
    doc_start = document_starts(B, T) if documents else None
    return causal, doc_start, p, KEY if p else None, torch.arange(B) + 5 if p else None, SITE, HEAD_OFFSET


def run(qkv, dout, options):
    out, lse = kernels().attention_fwd(qkv, *options)
    return out, lse, kernels().attention_bwd(dout, qkv, out, lse, *options)


def exact(qkv, dout, options, w):
    """out, L and dqkv in float64, and the bounds of the header for each."""
    causal, doc_start, p, key, ids, site, head_offset = options
    B, T, H, slots, D = qkv.shape
    G, scale = slots - 2, 1 / math.sqrt(D)
    heads = qkv.double().permute(0, 2, 3, 1, 4)  # (B, H, slots, T, D)
    q, k, v = heads[:, :, :G], heads[:, :, G, None], heads[:, :, G + 1, None]
    do = dout.double().permute(0, 2, 3, 1, 4)
    t, s = torch.arange(T)[:, None], torch.arange(T)
    seen = ((s <= t) if causal else torch.ones(T, T, dtype=torch.bool)).expand(B, T, T)
    if doc_start is not None:
        seen = seen & (s >= doc_start[..., None])
    hidden = ~seen[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(hidden, -math.inf)
    L = scores.logsumexp(-1)
    P = (scores - L[..., None]).exp()
    Z = torch.ones_like(P)
    if p:
        all_heads = (torch.arange(H * G) + head_offset).repeat(B)
        Z = keep_mask(key, p, ids.repeat_interleave(H * G), site, all_heads, torch.arange(T), T).view_as(P) / (1 - p)
    out = (P * Z) @ v
    dP = (do @ v.mT) * Z
    dS = P * (dP - (do * out).sum(-1, keepdim=True))
    gradients = [dS @ k * scale, (dS.mT @ q * scale).sum(2, keepdim=True), ((P * Z).mT @ do).sum(2, keepdim=True)]

    sizes = (q.abs() @ k.abs().mT * scale).masked_fill(hidden, 0.0).amax(-1)
    e = U * (2 * D * sizes + 2 * L.abs() + 16)
    rounding = w + e[..., None] + T * U
    out_bound = rounding * ((P * Z) @ v.abs()) + w * out.abs()
    of_delta = (do.abs() * out_bound).sum(-1, keepdim=True)
    terms = do.abs() @ v.abs().mT * Z + (do.abs() * out.abs()).sum(-1, keepdim=True)
    dS_bound = P * ((w + 2 * e[..., None] + (D + T) * U) * terms + of_delta)
    bounds = [
        dS_bound @ k.abs() * scale,
        (dS_bound.mT @ q.abs() * scale).sum(2, keepdim=True),
        ((P * Z * rounding).mT @ do.abs()).sum(2, keepdim=True),
    ]
    bounds = [bound + w * gradient.abs() for bound, gradient in zip(bounds, gradients, strict=True)]

    def packed(parts):  # (B, H, slots, T, D) -> (B, T, H, slots, D)
        return torch.cat(parts, dim=2).permute(0, 3, 1, 2, 4)

    values = out.permute(0, 3, 1, 2, 4), L, packed(gradients)
    return values, (out_bound.permute(0, 3, 1, 2, 4), e, packed(bounds))


def assert_within(got, values, bounds, what):
    for name, x, value, bound in zip(("out", "lse", "dqkv"), got, values, bounds, strict=True):
        excess = ((x.double() - value).abs() / bound.clamp_min(1e-30)).nan_to_num(math.inf).max()
        assert excess <= 1.0, f"{what}: {name} is off by {excess:.3g} times its bound"


@pytest.mark.parametrize("case", CASES, ids=lambda case: "T{}-Hkv{}-G{}-D{}-{}-{}".format(*case))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(case, dtype):
    T, H, G, D, documents, p = case
    B = 2
    qkv, dout = inputs(B, T, H, G, D, dtype)
    options = arguments(B, T, documents, p)
    values, bounds = exact(qkv, dout, options, 2.0**-8 if dtype == torch.bfloat16 else U)
    for level in levels():
        got = run(qkv, dout, options)
        assert got[0].dtype == got[2].dtype == dtype
        assert_within(got, values, bounds, f"level {level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [5, 100])
def test_without_the_causal_mask(T, dtype):
    qkv, dout = inputs(2, T, 2, 2, 32, dtype)
    options = arguments(2, T, p=0.2, causal=False)
    values, bounds = exact(qkv, dout, options, 2.0**-8 if dtype == torch.bfloat16 else U)
    for level in levels():
        assert_within(run(qkv, dout, options), values, bounds, f"level {level}")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(documents, dtype):
    # Few heads and many threads: the backward is split in two kinds of tasks.
    qkv, dout = inputs(1, 330, 3, 2, 64, dtype)
    options = arguments(1, 330, documents, 0.1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            results.append(run(qkv, dout, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_of_a_row_depend_on_its_row_alone():
    qkv, dout = inputs(3, 150, 2, 1, 64, torch.bfloat16)
    whole = run(qkv, dout, arguments(3, 150))
    row = run(qkv[1:2], dout[1:2], arguments(1, 150))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, row, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_tensors(dtype):
    wide = torch.randn(2, 90, 5, 4, 3 * 48).to(dtype)
    qkv = wide.transpose(2, 3)[:, 1:-1, :, 1:4, 48:96]  # (B, T, Hkv, G+2, D): its own strides everywhere
    dout = torch.randn(3, 2, 88, 1, 48).to(dtype).permute(1, 2, 3, 0, 4)[:, :, :, :1].expand(2, 88, 4, 1, 48)
    qkv = qkv[:, :, :4, :3]
    assert not qkv.is_contiguous()
    options = arguments(2, 88)
    expected = run(qkv.contiguous(), dout.contiguous(), options)
    for a, b in zip(run(qkv, dout, options), expected, strict=True):
        assert torch.equal(a, b)
    leaf = qkv.contiguous().requires_grad_()
    summed = torch.autograd.grad(attention(leaf).sum(), leaf)[0]  # a gradient of stride 0 everywhere
    assert torch.equal(summed, run(leaf.detach(), torch.ones_like(expected[0]), options)[2])


def test_mask_is_the_references():
    # v of key s is the s-th unit vector, so out holds the kept probabilities themselves.
    T, H, G, p = 128, 2, 2, 0.4
    qkv, _ = inputs(2, T, H, G, T, torch.float32)
    qkv[:, :, :, G + 1] = torch.eye(T)[None, :, None]
    ids = torch.tensor([5, (1 << 40) + 6])
    for level in levels():
        out, _ = kernels().attention_fwd(qkv, True, None, p, KEY, ids, SITE, HEAD_OFFSET)
        heads = (torch.arange(H * G) + HEAD_OFFSET).repeat(2)
        keep = keep_mask(KEY, p, ids.repeat_interleave(H * G), SITE, heads, torch.arange(T), T)
        keep = keep.view(2, H, G, T, T).permute(0, 3, 1, 2, 4) & torch.ones(T, T).tril().bool()[None, :, None, None]
        assert torch.equal(out != 0, keep), f"level {level}"


def test_backward_is_the_forwards_derivative():
    qkv, dout = inputs(1, 70, 1, 2, 16, torch.float32)
    options, step = arguments(1, 70, True, 0.2), 1e-2
    direction = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(1))
    for level in levels():
        ends = [run(qkv + sign * step * direction, dout, options)[0].double() for sign in (1, -1)]
        slope = ((ends[0] - ends[1]) * dout).sum() / (2 * step)
        expected = (run(qkv, dout, options)[2].double() * direction).sum()
        # the third derivative times step^2, and cancellation in fp32
        torch.testing.assert_close(slope, expected, rtol=2e-3, atol=2e-3, msg=f"level {level}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_reaches_the_rows_that_see_it_alone(value, slot, dtype):
    T, bad = 200, 130  # the tile of keys from 128
    qkv, dout = inputs(1, T, 1, 1, 64, dtype)
    qkv[0, bad, 0, slot, 3] = value
    clean, _ = inputs(1, T, 1, 1, 64, dtype)
    reference = attention_module.math_forward(qkv, None, attention_module.Dropout(0.0, None, None, 0, 0))[0]
    for level in levels():
        out, _, dqkv = run(qkv, dout, arguments(1, T))
        before = run(clean, dout, arguments(1, T))[0]
        assert torch.equal(out[:, :128], before[:, :128]), f"level {level}"
        finite = reference.isfinite()
        assert torch.equal(out.isfinite()[:, bad:], finite[:, bad:]), f"level {level}"
        assert torch.equal(out.isnan()[:, bad:], reference.isnan()[:, bad:]), f"level {level}"
        if not finite.all():
            assert not dqkv.isfinite().all()


def test_large_scores_do_not_overflow():
    qkv, dout = inputs(1, 80, 1, 1, 64, torch.float32)
    qkv[:, :, :, :2] *= 100.0  # scores of some 1e5
    values, bounds = exact(qkv, dout, arguments(1, 80), U)
    for level in levels():
        assert_within(run(qkv, dout, arguments(1, 80)), values, bounds, f"level {level}")


@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 16), (2, 0, 2, 3, 16), (1, 4, 0, 3, 16)])
def test_empty(shape):
    qkv = torch.randn(shape)
    out, lse = kernels().attention_fwd(qkv, *arguments(shape[0], shape[1]))
    assert out.shape == (*shape[:3], 1, 16)
    assert lse.shape == (shape[0], shape[2], 1, shape[1])
    assert kernels().attention_bwd(out, qkv, out, lse, *arguments(shape[0], shape[1])).shape == shape


def test_misfits_run_elsewhere_for_a_reason(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)

    def choose(dtype, D):
        return backends.choose("attention", "cpu", dtype, cpu_misfit=attention_module.cpu_head_misfit(D))

    assert choose(torch.bfloat16, 64).backend == "cpu"
    assert choose(torch.float16, 64) == ("reference", "the cpu kernel does not take torch.float16")
    for D in (0, 8, 72, 272):
        assert choose(torch.float32, D) == ("reference", f"head dimension {D} is no multiple of 16 up to 256")
    qkv = torch.randn(1, 9, 1, 3, 24)
    torch.testing.assert_close(attention(qkv), attention_module.flash_forward(qkv)[0])


def test_the_op_runs_the_kernel(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    qkv, dout = inputs(2, 70, 2, 2, 32, torch.float32)
    options = arguments(2, 70, True, 0.2)
    named = dict(
        doc_start=options[1], dropout_p=0.2, key=KEY, sample_ids=options[4], site=SITE, head_offset=HEAD_OFFSET
    )

    def gradient():
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, **named)
        return out.detach(), torch.autograd.grad(out, leaf, dout)[0]

    expected = run(qkv, dout, options)
    assert all(torch.equal(a, b) for a, b in zip(gradient(), (expected[0], expected[2]), strict=True))
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    for a, b in zip(gradient(), (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_opcheck():
    ops = torch.ops.gptdist
    qkv, dout = inputs(2, 9, 2, 2, 16, torch.float32)
    plain = (None, 0.0, None, None, 0, 0)
    torch.library.opcheck(ops.attention_fwd.default, (qkv.requires_grad_(), *plain))
    out, lse = ops.attention_fwd(qkv.detach(), *plain)
    torch.library.opcheck(ops.attention_bwd.default, (dout, qkv.detach(), out, lse, *plain))


QKV, DOUT = torch.zeros(2, 5, 1, 3, 16), torch.zeros(2, 5, 1, 1, 16)
LSE, STARTS, IDS = torch.zeros(2, 1, 1, 5), torch.zeros(2, 5, dtype=torch.int32), torch.arange(2)
PLAIN = (True, None, 0.0, None, None, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QKV[0], *PLAIN), r"qkv has shape \(5, 1, 3, 16\), expected \(B, T, Hkv, G\+2, D\)"),
        ((QKV[:, :, :, :2], *PLAIN), "with G >= 1"),
        ((QKV.double(), *PLAIN), "expected float32 or bfloat16"),
        ((QKV[..., :8], *PLAIN), "D=8, expected a multiple of 16 up to 256"),
        ((torch.zeros(1, 1, 1, 3, 272), *PLAIN), "D=272"),
        ((torch.zeros(2, 5, 1, 3, 32)[..., ::2], *PLAIN), "last dimension of qkv has stride 2, expected 1"),
        ((QKV, False, STARTS, 0.0, None, None, 0, 0), "doc_start is given, but causal is false"),
        ((QKV, True, STARTS[:1], 0.0, None, None, 0, 0), r"doc_start has shape \(1, 5\), expected \(B, T\) = "),
        ((QKV, True, STARTS.long(), 0.0, None, None, 0, 0), "expected int32"),
        ((QKV, True, None, 1.0, KEY, IDS, 0, 0), "dropout probability is 1, expected 0 <= p < 1"),
        ((QKV, True, None, 0.1, None, IDS, 0, 0), "needs key and sample_ids"),
        ((QKV, True, None, 0.1, KEY, IDS[:1], 0, 0), "sample_ids has shape"),
        ((QKV, True, None, 0.1, KEY.int(), IDS, 0, 0), "key has another dtype than the expected int64"),
        ((QKV, True, None, 0.1, KEY, IDS, 1 << 16, 0), "site is 65536"),
        ((QKV, True, None, 0.1, KEY, IDS, 0, 1 << 16), "head_offset is 65536"),
        ((DOUT[:1], QKV, DOUT, LSE, *PLAIN), r"dout has shape .* expected \(B, T, Hkv, G, D\) = \(2, 5, 1, 1, 16\)"),
        ((DOUT, QKV, DOUT.bfloat16(), LSE, *PLAIN), "out has another dtype"),
        ((DOUT, QKV, DOUT, LSE[..., :4], *PLAIN), r"lse has shape .* expected \(B, Hkv, G, T\)"),
        ((DOUT, QKV, DOUT, LSE.double(), *PLAIN), "lse has another dtype than the expected float32"),
    ],
)
def test_the_library_refuses_what_it_cannot_read(arguments, message):
    op = kernels().attention_fwd if len(arguments) == 8 else kernels().attention_bwd
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


def curve(dtype):
    """Losses of a few steps of a model with grouped queries, dropout and documents."""
    config = ModelConfig(vocab_size=64, context=96, n_layers=2, n_heads=4, n_kv_heads=2, width=64, dropout=0.1)
    model = LanguageModel(config)
    fill_initial_values(model, seed=1)
    tokens = torch.randint(64, (3, 97), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(6):
        dropout = Dropout(0.1, dropout_key(1, step), torch.arange(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:], dropout=dropout, doc_start=document_starts(3, 96)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_as_on_the_reference(dtype, monkeypatch):
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    expected = curve(dtype)
    monkeypatch.delenv("GPTDIST_OPS")
    losses = curve(dtype)
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(losses, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)
