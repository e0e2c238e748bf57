"""decode_attention's CPU kernels, on every instruction set that this processor has, against the formula in float64.

With u = 2^-24 and w = 2^-8 for bf16 (u for fp32), scores x = q k^T / sqrt(D) and softmax P, to first order:

    |error of out| <= (w + e + T u) (P |v|) + w |out|,   e = u (2 D max |x| + 2 |L| + 16)

as in test_cpu_attention.py: P rounded to bf16 in the second product of a prompt, out rounded in every case.
"""

import math

import pytest
import torch

from gptdist.ops import backends, decode_attention

from .test_cpu_attention import U, kernels, levels
from .test_ops_decode_attention import paged

pytestmark = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")

# Longest context, Hkv, G, Tq, D, page: one and several segments of 256 keys; few queries and a prompt; pages that end
# within tiles
CASES = [
    (14, 2, 1, 1, 16, 4),
    (257, 2, 1, 1, 64, 16),
    (700, 1, 4, 1, 128, 16),
    (600, 1, 3, 2, 80, 7),
    (520, 2, 1, 5, 64, 16),
    (600, 1, 1, 17, 64, 16),
    (130, 2, 2, 40, 64, 16),
    (300, 1, 4, 100, 32, 256),
    (90, 1, 1, 90, 256, 1),
]


def inputs(case, dtype):
    """q, caches (slots that were never written hold NaN), block table, lengths of three rows, unpaged k and v."""
    T, H, G, Tq, D, page = case
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(3, Tq, H, G, D, generator=generator).to(dtype)
    k, v = (torch.randn(3, T, H, D, generator=generator).to(dtype) for _ in range(2))
    return (q, *paged(k, v, page), torch.tensor([0, (T - Tq) // 2, T - Tq])), k, v


def exact(q, k, v, lengths, w):
    """The formula and the bound of the header."""
    T, Tq, D = k.shape[1], q.shape[1], q.shape[-1]
    q, k, v = q.double().permute(0, 2, 3, 1, 4), k.double().transpose(1, 2)[:, :, None], v.double().transpose(1, 2)
    hidden = torch.arange(T) > (lengths[:, None] + torch.arange(Tq))[..., None]
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(hidden[:, None, None], -math.inf)
    P, v = scores.softmax(-1), v[:, :, None]
    sizes = (q.abs() @ k.abs().mT / math.sqrt(D)).masked_fill(hidden[:, None, None], 0.0).amax(-1, keepdim=True)
    e = U * (2 * D * sizes + 2 * scores.logsumexp(-1, keepdim=True).abs() + 16)
    out = P @ v
    bound = (w + e + T * U) * (P @ v.abs()) + w * out.abs()
    return out.permute(0, 3, 1, 2, 4), bound.permute(0, 3, 1, 2, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "T{}-Hkv{}-G{}-Tq{}-D{}-page{}".format(*case))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(case, dtype):
    tensors, k, v = inputs(case, dtype)
    expected, bound = exact(tensors[0], k, v, tensors[-1], 2.0**-8 if dtype == torch.bfloat16 else U)
    for level in levels():
        out = kernels().decode_attention(*tensors)
        assert out.dtype == dtype
        excess = ((out.double() - expected).abs() / bound).nan_to_num(math.inf).max()
        assert excess <= 1.0, f"level {level}: off by {excess:.3g} times the bound"


@pytest.mark.parametrize("case", [(700, 2, 2, 1, 64, 16), (300, 2, 2, 40, 64, 16)])
def test_bits_do_not_depend_on_the_number_of_threads_or_on_other_rows(case):
    (q, k_cache, v_cache, table, lengths), *_ = inputs(case, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernels().decode_attention(q, k_cache, v_cache, table, lengths))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][1:2], kernels().decode_attention(q[1:2], k_cache, v_cache, table[1:2], lengths[1:2]))


def test_strided_tensors_and_the_op(monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    (q, k_cache, v_cache, table, lengths), *_ = inputs((100, 2, 2, 3, 32, 16), torch.float32)
    expected = kernels().decode_attention(q, k_cache, v_cache, table, lengths)
    caches = torch.stack([k_cache, v_cache], dim=2).unbind(2)  # one tensor of both: own strides
    wide = torch.cat([q, q], dim=-1)[..., :32]
    assert torch.equal(kernels().decode_attention(wide, *caches, table, lengths), expected)
    assert torch.equal(decode_attention(q, k_cache, v_cache, table, lengths), expected)
    mixed = decode_attention(q, k_cache.bfloat16(), v_cache.bfloat16(), table, lengths)  # the reference's case
    assert mixed.dtype == torch.float32
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    torch.testing.assert_close(decode_attention(q, k_cache, v_cache, table, lengths), expected, atol=2e-6, rtol=1e-5)


Q, CACHE = torch.zeros(1, 1, 1, 2, 16), torch.zeros(2, 4, 1, 16)
TABLE, LENGTHS = torch.tensor([[0, -1]], dtype=torch.int32), torch.tensor([2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q has shape \(1, 1, 2, 16\), expected \(B, Tq, Hkv, G, D\)"),
        ({"q": Q.double()}, "q has another dtype than the expected float32 or bfloat16"),
        ({"q": Q[..., :8]}, "D=8, expected a multiple of 16"),
        ({"k_cache": CACHE.bfloat16()}, "k_cache has another dtype than the expected one of q"),
        (
            {"v_cache": CACHE[:1]},
            r"v_cache has shape \(1, 4, 1, 16\), expected \(pages, page, Hkv, D\) = \(2, 4, 1, 16\)",
        ),
        ({"block_table": TABLE[:0]}, "block_table has shape .* with B=1"),
        ({"block_table": TABLE.long()}, "block_table has another dtype than the expected int32"),
        ({"lengths": LENGTHS.int()}, "lengths has another dtype than the expected int64"),
        ({"lengths": -LENGTHS}, r"lengths\[0\] is -2, expected 0 or more"),
        ({"lengths": LENGTHS + 6}, "row 0 reaches 9 positions, its block table holds 8"),
        ({"lengths": LENGTHS + 2}, r"block_table\[0, 1\] is -1, expected a page below 2"),
        ({"block_table": TABLE + 2}, r"block_table\[0, 0\] is 2, expected a page below 2"),
    ],
)
def test_the_library_refuses_what_it_cannot_read(changed, message):
    tensors = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "block_table": TABLE, "lengths": LENGTHS} | changed
    with pytest.raises(RuntimeError, match=message):
        kernels().decode_attention(*tensors.values())


def test_opcheck():
    torch.library.opcheck(torch.ops.gptdist.decode_attention.default, (Q, CACHE, CACHE, TABLE, LENGTHS))
