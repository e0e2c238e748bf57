"""attention against a dense float64 formula: GQA, documents, dropout; both paths; what masks may depend on."""

import importlib
import math

import pytest
import torch

from gptdist.ops import attention, dropout_key
from gptdist.ops.random import keep_mask

attention_module = importlib.import_module("gptdist.ops.attention")

KEY = dropout_key(3, 4)
SHAPES = [(2, 7, 2, 1, 8), (1, 33, 1, 4, 16), (3, 12, 3, 2, 4)]  # B, T, Hkv, G, D


def document_starts(B, T):
    starts = torch.zeros(B, T, dtype=torch.int32)
    for b in range(B):
        for start in (T // 3 + b % 2, T // 2 + 1):
            starts[b, start:] = start
    return starts


def dense(qkv, doc_start=None, p=0.0, key=None, sample_ids=None, site=0, head_offset=0):
    """The formula in the module's header, all at once, in qkv's dtype."""
    B, T, H, slots, D = qkv.shape
    G = slots - 2
    q, k, v = qkv[:, :, :, :G], qkv[:, :, :, G], qkv[:, :, :, G + 1]
    scores = torch.einsum("bthgd,bshd->bhgts", q, k) / math.sqrt(D)
    t, s = torch.arange(T)[:, None], torch.arange(T)
    seen = (s <= t).expand(B, T, T)
    if doc_start is not None:
        seen = seen & (s >= doc_start[..., None])
    probabilities = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
    if p > 0:
        heads = (torch.arange(H * G) + head_offset).repeat(B)
        keep = keep_mask(key, p, sample_ids.repeat_interleave(H * G), site, heads, torch.arange(T), T)
        probabilities = probabilities * keep.view(B, H, G, T, T) / (1 - p)
    return torch.einsum("bhgts,bshd->bthgd", probabilities, v)


def both(qkv, dout, function, **options):
    leaf = qkv.clone().requires_grad_()
    out = function(leaf, **options)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def inputs(shape, dtype=torch.float32):
    B, T, H, G, D = shape
    generator = torch.Generator().manual_seed(T)
    qkv = torch.randn(B, T, H, G + 2, D, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, torch.randn(B, T, H, G, D, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_forward_and_backward_equal_the_dense_formula(shape, documents, p, monkeypatch):
    # Small blocks, so that several of queries and of (batch, head) pairs meet.
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 5)
    monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 300)
    qkv, dout = inputs(shape)
    doc_start = document_starts(*shape[:2]) if documents else None
    ids = torch.arange(shape[0]) + 5
    random = {"key": KEY, "sample_ids": ids, "site": 2, "head_offset": 6}
    out, dqkv = both(qkv, dout, attention, doc_start=doc_start, dropout_p=p, **random)
    expected, dexpected = both(qkv.double(), dout.double(), dense, doc_start=doc_start, p=p, **random)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dqkv.double(), dexpected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flash_path_equals_the_math_path(shape, dtype):
    qkv, dout = inputs(shape, dtype)
    plain = attention_module.Dropout(0.0, None, None, 0, 0)
    out, lse = attention_module.flash_forward(qkv)
    expected, lse_expected = attention_module.math_forward(qkv, None, plain)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, lse_expected, atol=tolerance, rtol=tolerance)
    dqkv = attention_module.flash_backward(dout, qkv, out, lse)
    dexpected = attention_module.math_backward(dout, qkv, out, lse, None, plain)
    torch.testing.assert_close(dqkv, dexpected, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(documents, p):
    qkv, _ = inputs((2, 5, 2, 2, 3), torch.float64)
    doc_start = document_starts(2, 5) if documents else None
    ids = torch.tensor([1, 2])
    torch.autograd.gradcheck(
        lambda x: attention(x, doc_start=doc_start, dropout_p=p, key=KEY, sample_ids=ids),
        qkv.requires_grad_(),
        fast_mode=True,
    )


def test_dropout_does_not_depend_on_batch_or_head_sharding():
    qkv, _ = inputs((3, 9, 4, 2, 8))
    ids = torch.tensor([10, 20, 30])
    options = {"dropout_p": 0.3, "key": KEY, "site": 1}
    whole = attention(qkv, sample_ids=ids, **options)
    rows = attention(qkv[1:2], sample_ids=ids[1:2], **options)
    heads = attention(qkv[:, :, 2:], sample_ids=ids, head_offset=4, **options)  # 2 kv heads of 2 queries before
    torch.testing.assert_close(rows, whole[1:2])
    torch.testing.assert_close(heads, whole[:, :, 2:])


def test_documents_equal_separate_sequences():
    qkv, _ = inputs((1, 12, 2, 2, 8))
    doc_start = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    packed = attention(qkv, doc_start=doc_start)
    torch.testing.assert_close(packed[:, :5], attention(qkv[:, :5]))
    torch.testing.assert_close(packed[:, 5:], attention(qkv[:, 5:]))


def test_future_does_not_leak():
    qkv, _ = inputs((1, 12, 2, 2, 8))
    changed = qkv.clone()
    changed[:, 8:] += 100.0
    torch.testing.assert_close(attention(changed)[:, :8], attention(qkv)[:, :8])


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        (torch.ones(2, 3, 4), {}, "expected \\(B, T, Hkv, G\\+2, D\\)"),
        (torch.ones(2, 3, 1, 2, 4), {}, "G >= 1"),
        (torch.ones(2, 3, 1, 3, 4), {"doc_start": torch.zeros(2, 3)}, "expected int32 \\(2, 3\\)"),
        (
            torch.ones(1, 3, 1, 3, 4),
            {"doc_start": torch.tensor([[0, 2, 2]], dtype=torch.int32)},
            "doc_start\\[0, 1\\] is 2, expected 0 to 1",
        ),
        (
            torch.ones(2, 3, 1, 3, 4),
            {"doc_start": torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.int32)},
            "doc_start\\[1, 2\\] is 0, expected 1 to 2",
        ),
        (
            torch.ones(1, 2, 1, 3, 4),
            {"doc_start": torch.tensor([[-1, 0]], dtype=torch.int32)},
            "doc_start\\[0, 0\\] is -1, expected 0 to 0",
        ),
        (torch.ones(2, 3, 1, 3, 4), {"dropout_p": 0.1}, "needs key"),
        (
            torch.ones(2, 3, 1, 3, 4),
            {"dropout_p": 0.1, "key": KEY, "sample_ids": torch.arange(2), "head_offset": 65536},
            "beyond 65535",
        ),
    ],
)
def test_wrong_arguments_are_named(qkv, options, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, **options)
