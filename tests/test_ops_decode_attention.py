"""decode_attention against full attention on the unpaged sequences."""

import importlib

import pytest
import torch

from gptdist.ops import attention, decode_attention

decode_module = importlib.import_module("gptdist.ops.decode_attention")


def paged(k, v, page, spare=3):
    """Scatter k, v (B, T, Hkv, D) over shuffled pages; unwritten slots hold NaN. Returns caches and block table."""
    B, T, H, D = k.shape
    per_row = -(-T // page)
    order = torch.randperm(B * per_row + spare, generator=torch.Generator().manual_seed(1))
    table = order[: B * per_row].view(B, per_row).to(torch.int32)
    caches = []
    for x in (k, v):
        cache = torch.full((len(order), page, H, D), float("nan"), dtype=x.dtype)
        for b in range(B):
            for t in range(T):
                cache[table[b, t // page], t % page] = x[b, t]
        caches.append(cache)
    return *caches, table


@pytest.mark.parametrize(("G", "page", "Tq"), [(1, 4, 1), (2, 4, 3), (4, 16, 1), (2, 1, 5)])
@pytest.mark.parametrize("block", [40, 1 << 24])
def test_equals_full_attention_with_ragged_lengths(G, page, Tq, block, monkeypatch):
    monkeypatch.setattr(decode_module, "BLOCK_ELEMENTS", block)
    B, T, H, D = 3, 14, 2, 8
    qkv = torch.randn(B, T, H, G + 2, D, generator=torch.Generator().manual_seed(0))
    full = attention(qkv)
    k_cache, v_cache, table = paged(qkv[:, :, :, G], qkv[:, :, :, G + 1], page)
    lengths = torch.tensor([0, 4, T - Tq])
    q = torch.stack([qkv[b, n : n + Tq, :, :G] for b, n in enumerate(lengths.tolist())])
    out = decode_attention(q, k_cache, v_cache, table, lengths)
    expected = torch.stack([full[b, n : n + Tq] for b, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(out, expected)


def test_reads_nothing_beyond_a_rows_context():
    q, k, v = torch.randn(1, 1, 1, 1, 4), torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4)
    k_cache, v_cache, table = paged(k, v, 4)  # slots 5 to 7 hold NaN
    padded = torch.cat([table, torch.full((1, 2), -1, dtype=torch.int32)], dim=1)
    out = decode_attention(q, k_cache, v_cache, padded, torch.tensor([4]))
    assert out.isfinite().all()


def test_bf16_and_empty():
    cache = torch.randn(2, 4, 1, 8).bfloat16()
    table, lengths = torch.tensor([[0]], dtype=torch.int32), torch.tensor([2])
    assert decode_attention(torch.randn(1, 1, 1, 2, 8).bfloat16(), cache, cache, table, lengths).dtype == torch.bfloat16
    empty = decode_attention(torch.randn(0, 1, 1, 2, 8).bfloat16(), cache, cache, table[:0], lengths[:0])
    assert empty.shape == (0, 1, 1, 2, 8)


def test_wrong_arguments_are_named():
    q, cache = torch.randn(1, 1, 1, 2, 8), torch.randn(2, 4, 1, 8)
    table, lengths = torch.tensor([[0]], dtype=torch.int32), torch.tensor([2])
    with pytest.raises(ValueError, match=r"expected \(B, Tq, Hkv, G, D\)"):
        decode_attention(q[..., :4], cache, cache, table, lengths)
    with pytest.raises(ValueError, match="expected k_cache's"):
        decode_attention(q, cache, cache[:1], table, lengths)
    with pytest.raises(ValueError, match=r"expected int32 \(1, P\)"):
        decode_attention(q, cache, cache, table.long(), lengths)
    with pytest.raises(ValueError, match=r"expected int64 \(1,\)"):
        decode_attention(q, cache, cache, table, lengths.int())
    with pytest.raises(ValueError, match="reaches 5 positions, its block table holds 4"):
        decode_attention(q, cache, cache, table, torch.tensor([4]))
    with pytest.raises(ValueError, match="reaches 5 positions, its block table holds 4"):
        decode_attention(q.expand(1, 5, 1, 2, 8), cache, cache, table, torch.tensor([0]))
