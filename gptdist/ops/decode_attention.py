"""decode_attention: new queries against a paged key and value cache, for generation.

Query i of row b stands at position lengths[b] + i and sees the cached positions up to and including its own; its own
k and v are in the cache already. Position s of row b lies in page block_table[b, s // page], slot s % page.

    o = softmax(q k^T / sqrt(D)) v, fp32 (fp64 for float64)

Reads the pages in use of every row once, writes out. No autograd. Kernels: csrc/cuda/decode_attention.cu and
csrc/cpu/decode_attention.h. Source: Kwon et al., "Efficient memory management for LLM serving with PagedAttention"
(2023), section 4.1.
"""

import math

import torch

from .attention import cpu_head_misfit, head_misfit, heads_contiguous
from .backends import aligned, aligned_rows, choose, compute_dtype, cuda_kernels, custom_op

BLOCK_ELEMENTS = 1 << 24  # cached elements or scores at once: 64 MiB of fp32


def _rows(q, k_cache, v_cache, block_table, lengths, width):
    """out (b, Tq, Hkv, G, D) in the compute dtype for rows whose context fits `width` positions, whole pages."""
    b, Tq, H, G, D = q.shape
    compute = compute_dtype(q.dtype)
    pages = block_table[:, : width // k_cache.shape[1]].long().clamp(0, k_cache.shape[0] - 1)
    # (b, pages, page, Hkv, D) -> (b, Hkv, width, D)
    k = k_cache[pages].flatten(1, 2).transpose(1, 2).to(compute)
    v = v_cache[pages].flatten(1, 2).transpose(1, 2).to(compute)
    positions = torch.arange(width, device=q.device)
    last = lengths[:, None] + torch.arange(Tq, device=q.device)  # (b, Tq): the last position each query sees
    # A slot that was never written may hold NaN, and 0 * NaN is NaN: clear what no query of the row sees.
    v = v.masked_fill((positions > last[:, -1:])[:, None, :, None], 0.0)
    queries = q.permute(0, 2, 3, 1, 4).reshape(b, H, G * Tq, D).to(compute)
    scores = (queries @ k.transpose(2, 3)).view(b, H, G, Tq, width).mul_(1.0 / math.sqrt(D))
    hidden = positions > last[..., None]  # (b, Tq, width)
    scores.masked_fill_(hidden[:, None, None], -math.inf)
    out = scores.softmax(-1).view(b, H, G * Tq, width) @ v
    return out.view(b, H, G, Tq, D).permute(0, 3, 1, 2, 4)


def _width(block_table, lengths, Tq, page):
    """Positions, in whole pages, that the longest row reaches. Raises ValueError where its block table has fewer."""
    longest = max(lengths.tolist()) + Tq
    width = -(-longest // page) * page
    if width > block_table.shape[1] * page:
        raise ValueError(
            f"decode_attention: a row reaches {longest} positions, its block table holds {block_table.shape[1] * page}"
        )
    return width


def _reference(q, k_cache, v_cache, block_table, lengths, width):
    B, Tq, H, G, D = q.shape
    out = q.new_empty(q.shape)
    queries = max(1, min(Tq, BLOCK_ELEMENTS // (H * G * width)))
    rows = max(1, BLOCK_ELEMENTS // (H * width * max(D, G * queries)))
    for b in range(0, B, rows):
        row = slice(b, b + rows)
        for t in range(0, Tq, queries):
            block = slice(t, t + queries)
            out[row, block] = _rows(q[row, block], k_cache, v_cache, block_table[row], lengths[row] + t, width)
    return out


def _dtype_misfit(q, k_cache, v_cache) -> str:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype:
            return f"{name} is {cache.dtype}, q {q.dtype}"
    return ""


def misfit(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str:
    """Why the CUDA kernel does not take these, or the empty string."""
    page = k_cache.shape[1]
    if page & (page - 1):
        return f"pages of {page} positions, no power of two"
    return _dtype_misfit(q, k_cache, v_cache) or head_misfit(q.shape[-1])


@custom_op("gptdist::decode_attention")
def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    caches = q, k_cache, v_cache
    cpu_misfit = _dtype_misfit(*caches) or cpu_head_misfit(q.shape[-1])
    backend = choose("decode_attention", q.device, q.dtype, misfit(*caches), cpu_misfit).backend
    if backend == "cuda":
        tensors = (aligned(x) for x in (k_cache, v_cache, block_table, lengths))
        return cuda_kernels().decode_attention(aligned_rows(q), *tensors)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    width = _width(block_table, lengths, q.shape[1], k_cache.shape[1])
    if backend == "cpu":
        tensors = (heads_contiguous(x) for x in caches)
        return torch.ops.gptdist_c.decode_attention(*tensors, block_table.contiguous(), lengths.contiguous())
    return _reference(q, k_cache, v_cache, block_table, lengths, width)


@_decode.register_fake
def _(q, k_cache, v_cache, block_table, lengths):
    return q.new_empty(q.shape)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Attention of q (B, Tq, Hkv, G, D) over a paged cache; returns q's shape and dtype.

    k_cache, v_cache: (pages, page, Hkv, D). block_table: int32 (B, P), pages of each row in order; entries beyond a
    row's context are not read. lengths: int64 (B,), tokens of the row before this call's first query.

    A row that reaches beyond its block table raises ValueError. The CUDA kernel does not wait for lengths to say so: it
    reads nothing beyond the table, and makes the queries that stand there NaN.
    """
    if q.dim() != 5 or k_cache.dim() != 4 or k_cache.shape[2:] != (q.shape[2], q.shape[4]):
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)}, "
            "expected (B, Tq, Hkv, G, D) and (pages, page, Hkv, D)"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"decode_attention: v_cache has shape {tuple(v_cache.shape)}, expected k_cache's {tuple(k_cache.shape)}"
        )
    B = q.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != B or block_table.dtype != torch.int32:
        raise ValueError(
            f"decode_attention: block_table is {block_table.dtype} {tuple(block_table.shape)}, expected int32 ({B}, P)"
        )
    if tuple(lengths.shape) != (B,) or lengths.dtype != torch.int64:
        raise ValueError(
            f"decode_attention: lengths is {lengths.dtype} {tuple(lengths.shape)}, expected int64 ({B},)"
        )
    Tq, held = q.shape[1], block_table.shape[1] * k_cache.shape[1]
    if Tq > held and B > 0:
        raise ValueError(f"decode_attention: a row reaches {Tq} positions, its block table holds {held}")
    return _decode(q, k_cache, v_cache, block_table, lengths)
