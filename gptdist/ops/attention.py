"""attention: causal, grouped-query, optionally confined to documents, for training.

For query head g of kv head h, query t and key s, with doc_start[b, t] <= s <= t:

    S = q k^T / sqrt(D),  L = logsumexp_s(S),  P = exp(S - L),  Z = keep / (1 - p),  o = (P Z) v
    dv = (P Z)^T do,  dP = (do v^T) Z,  dS = P (dP - rowsum(do o)),  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D)

Z is dropout's mask (all ones without it; counters in random.py). Only L is kept for the backward, which computes S
again. Reads the packed qkv, writes out and L; the backward writes one packed dqkv. Arithmetic is fp32 (fp64 for
float64). Sources: Vaswani et al. (2017) 3.2.1; Dao et al., "FlashAttention" (2022), appendix B; Ainslie et al.,
"GQA" (2023).

Four paths. `cuda` is csrc/cuda/attention_*.cu, `cpu` is csrc/cpu/attention_*. `math` is the reference: blocks of
queries over blocks of (batch, kv head) pairs, so that no more than BLOCK_ELEMENTS scores exist at once. On a CPU,
`flash` hands what the compiled kernels do not take to PyTorch's own, if it is plain (no dropout, no documents).
"""

import math
from typing import NamedTuple

import torch

from .backends import aligned, choose, compute_dtype, cuda_kernels, custom_op
from .random import check_randomness, keep_mask

BLOCK_ELEMENTS = 1 << 22  # scores at once: 16 MiB of fp32
QUERY_BLOCK = 256  # queries at once, so that the causal triangle is followed and little of it computed in vain


class Dropout(NamedTuple):
    """What the mask is a function of; `p` is 0 where there is no dropout."""

    p: float
    key: torch.Tensor | None
    sample_ids: torch.Tensor | None
    site: int
    head_offset: int


# math path


def _unpack(qkv, dtype):
    """q (N, G, T, D), k and v (N, T, D) in `dtype`, with N = B * Hkv pairs."""
    B, T, H, slots, D = qkv.shape
    grouped = qkv.permute(0, 2, 3, 1, 4).reshape(B * H, slots, T, D).to(dtype)
    return grouped[:, :-2], grouped[:, -2], grouped[:, -1]


def _group(x):
    """(B, T, Hkv, G, D) -> (N, G, T, D)."""
    B, T, H, G, D = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(B * H, G, T, D)


def _blocks(N, G, T):
    """Pairs and queries to handle together: (slice of N, slice of T)."""
    rows = max(1, min(T, QUERY_BLOCK))
    pairs = max(1, BLOCK_ELEMENTS // max(1, G * rows * T))
    for n in range(0, N, pairs):
        for t in range(0, T, rows):
            yield slice(n, min(n + pairs, N)), slice(t, min(t + rows, T))


def _hidden(pairs, rows, H, doc_start, device):
    """Keys a query must not see, of the keys before rows.stop: bool (1 or n, 1, rows, keys)."""
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None]  # (rows, 1)
    keys = torch.arange(rows.stop, device=device)  # (keys,)
    hidden = (keys > queries)[None, None]  # (1, 1, rows, keys)
    if doc_start is None:
        return hidden
    rows_of_pairs = torch.arange(pairs.start, pairs.stop, device=device) // H
    return hidden | (keys < doc_start[rows_of_pairs, rows][:, None, :, None])  # (n, 1, rows, keys)


def _drop(pairs, rows, H, G, drop, dtype):
    """Dropout's factor for a block: (n, G, rows, keys) in `dtype`, 0 or 1 / (1 - p)."""
    device = drop.key.device
    pair = torch.arange(pairs.start, pairs.stop, device=device)
    heads = drop.head_offset + (pair % H)[:, None] * G + torch.arange(G, device=device)  # (n, G)
    samples = drop.sample_ids[pair // H][:, None].expand(-1, G)  # (n, G)
    queries = torch.arange(rows.start, rows.stop, device=device)
    keep = keep_mask(
        drop.key.reshape(()), drop.p, samples.flatten(), drop.site, heads.flatten(), queries, rows.stop
    )
    return keep.view(len(pair), G, len(queries), rows.stop).to(dtype).mul_(1.0 / (1.0 - drop.p))


def _scores(q, k, hidden, scale):
    """S (n, G, rows, keys), -inf where hidden. q: (n, G, rows, D). k: (n, keys, D)."""
    n, G, R, D = q.shape
    scores = torch.bmm(q.reshape(n, G * R, D), k.transpose(1, 2)).view(n, G, R, -1)
    return scores.mul_(scale).masked_fill_(hidden, -math.inf)


def math_forward(qkv, doc_start, drop: Dropout):
    """out (B, T, Hkv, G, D) in qkv's dtype and L (B, Hkv, G, T) in the compute dtype."""
    B, T, H, slots, D = qkv.shape
    G, scale = slots - 2, 1.0 / math.sqrt(D)
    q, k, v = _unpack(qkv, compute_dtype(qkv.dtype))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for pairs, rows in _blocks(B * H, G, T):
        n, seen = pairs.stop - pairs.start, slice(0, rows.stop)
        hidden = _hidden(pairs, rows, H, doc_start, qkv.device)
        scores = _scores(q[pairs, :, rows], k[pairs, seen], hidden, scale)
        lse[pairs, :, rows] = L = torch.logsumexp(scores, dim=-1)
        probabilities = scores.sub_(L[..., None]).exp_()
        if drop.p > 0.0:
            probabilities.mul_(_drop(pairs, rows, H, G, drop, q.dtype))
        out[pairs, :, rows] = torch.bmm(probabilities.view(n, -1, rows.stop), v[pairs, seen]).view(n, G, -1, D)
    out = out.view(B, H, G, T, D).permute(0, 3, 1, 2, 4).to(qkv.dtype).contiguous()  # (B, T, H, G, D)
    return out, lse.view(B, H, G, T)


def math_backward(dout, qkv, out, lse, doc_start, drop: Dropout):
    """dqkv (B, T, Hkv, G+2, D) in qkv's dtype."""
    B, T, H, slots, D = qkv.shape
    G, scale = slots - 2, 1.0 / math.sqrt(D)
    compute = compute_dtype(qkv.dtype)
    q, k, v = _unpack(qkv, compute)
    do, L = _group(dout).to(compute), lse.reshape(B * H, G, T)
    delta = (do * _group(out)).sum(-1)  # (N, G, T)
    dgrouped = q.new_zeros(B * H, slots, T, D)
    dq, dk, dv = dgrouped[:, :-2], dgrouped[:, -2], dgrouped[:, -1]
    for pairs, rows in _blocks(B * H, G, T):
        n, seen = pairs.stop - pairs.start, slice(0, rows.stop)
        hidden = _hidden(pairs, rows, H, doc_start, qkv.device)
        P = _scores(q[pairs, :, rows], k[pairs, seen], hidden, scale).sub_(L[pairs, :, rows, None]).exp_()
        do_block = do[pairs, :, rows].reshape(n, -1, D)  # (n, G * rows, D)
        q_block = q[pairs, :, rows].reshape(n, -1, D)
        dP = torch.bmm(do_block, v[pairs, seen].transpose(1, 2)).view_as(P)
        PZ = P
        if drop.p > 0.0:
            Z = _drop(pairs, rows, H, G, drop, compute)
            dP.mul_(Z)
            PZ = Z.mul_(P)
        dv[pairs, seen] += torch.bmm(PZ.view(n, -1, rows.stop).transpose(1, 2), do_block)
        dS = dP.sub_(delta[pairs, :, rows, None]).mul_(P).mul_(scale).view(n, -1, rows.stop)
        dq[pairs, :, rows] = torch.bmm(dS, k[pairs, seen]).view(n, G, -1, D)
        dk[pairs, seen] += torch.bmm(dS.transpose(1, 2), q_block)
    return dgrouped.view(B, H, slots, T, D).permute(0, 3, 1, 2, 4).to(qkv.dtype).contiguous()


# flash path


def _plain(qkv, doc_start, p) -> bool:
    """PyTorch's CPU kernel takes this call. (It divides by zero for an empty sequence.)"""
    return (
        qkv.device.type == "cpu"
        and doc_start is None
        and p == 0.0
        and qkv.numel() > 0
        and qkv.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _heads_first(qkv):
    """q, k, v as the aten kernel wants them: (B, H, T, D), with queries h * G + g reading kv head h."""
    q = qkv[:, :, :, :-2].flatten(2, 3).transpose(1, 2)  # (B, T, Hkv, G, D) -> (B, Hkv * G, T, D)
    return q, qkv[:, :, :, -2].transpose(1, 2), qkv[:, :, :, -1].transpose(1, 2)


def flash_forward(qkv):
    B, T, H, slots, D = qkv.shape
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(qkv), 0.0, True)
    out = out.transpose(1, 2).reshape(B, T, H, slots - 2, D)  # (B, H, T, D) -> (B, T, Hkv, G, D)
    return out.contiguous(), lse.reshape(B, H, slots - 2, T).contiguous()


def flash_backward(dout, qkv, out, lse):
    B, T, H, slots, D = qkv.shape
    # The kernel wants lse with T outside the heads, as its forward gave it: strides (H * T, 1, H).
    lse = lse.flatten(1, 2).transpose(1, 2).contiguous().transpose(1, 2)  # (B, Hkv * G, T)
    dout, out = (x.flatten(2, 3).transpose(1, 2) for x in (dout.to(qkv.dtype), out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, *_heads_first(qkv), out, lse, 0.0, True
    )
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dqkv[:, :, :, :-2] = dq.transpose(1, 2).reshape(B, T, H, slots - 2, D)
    dqkv[:, :, :, -2] = dk.transpose(1, 2)
    dqkv[:, :, :, -1] = dv.transpose(1, 2)
    return dqkv


# compiled paths

HEAD_DIMS = (64, 128)
CPU_HEAD_DIM_STEP, CPU_MAX_HEAD_DIM = 16, 256  # csrc/cpu/attention.h


def head_misfit(D: int) -> str:
    """Why the CUDA kernels do not take heads of D elements, or the empty string."""
    return "" if D in HEAD_DIMS else f"head dimension {D} is not 64 or 128"


def cpu_head_misfit(D: int) -> str:
    """Why the CPU kernels do not take heads of D elements, or the empty string."""
    if 0 < D <= CPU_MAX_HEAD_DIM and D % CPU_HEAD_DIM_STEP == 0:
        return ""
    return f"head dimension {D} is no multiple of {CPU_HEAD_DIM_STEP} up to {CPU_MAX_HEAD_DIM}"


def _backend(qkv) -> str:
    D = qkv.shape[-1]
    return choose("attention", qkv.device, qkv.dtype, head_misfit(D), cpu_head_misfit(D)).backend


def _causal(doc_start, drop: Dropout):
    """The kernels' arguments after the tensors: causal, doc_start, p, key, sample_ids, site, head_offset."""
    tensors = (None if x is None else aligned(x) for x in (doc_start, drop.key, drop.sample_ids))
    doc_start, key, sample_ids = tensors
    return True, doc_start, drop.p, key, sample_ids, drop.site, drop.head_offset


def cuda_forward(qkv, doc_start, drop: Dropout):
    return cuda_kernels().attention_fwd(aligned(qkv), *_causal(doc_start, drop))


def cuda_backward(dout, qkv, out, lse, doc_start, drop: Dropout):
    tensors = (aligned(x) for x in (dout.to(qkv.dtype), qkv, out, lse))
    return cuda_kernels().attention_bwd(*tensors, *_causal(doc_start, drop))


def heads_contiguous(x):
    """x as the CPU kernels want it: any strides, but the elements of a head one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_forward(qkv, doc_start, drop: Dropout):
    return torch.ops.gptdist_c.attention_fwd(heads_contiguous(qkv), *_causal(doc_start, drop))


def cpu_backward(dout, qkv, out, lse, doc_start, drop: Dropout):
    dout, qkv, out = (heads_contiguous(x) for x in (dout.to(qkv.dtype), qkv, out))
    return torch.ops.gptdist_c.attention_bwd(dout, qkv, out, lse.contiguous(), *_causal(doc_start, drop))


# the op


def _check_documents(doc_start) -> None:
    """On a CPU alone: a GPU would have to be waited for."""
    if doc_start is None or doc_start.device.type != "cpu" or doc_start.numel() == 0:
        return
    position = torch.arange(doc_start.shape[1])
    least = doc_start.roll(1, 1).index_fill(1, position[:1], 0)  # (B, T): the one before, at first 0
    wrong = ((doc_start > position) | (doc_start < least)).nonzero()
    if len(wrong):
        b, t = wrong[0].tolist()
        raise ValueError(f"attention: doc_start[{b}, {t}] is {doc_start[b, t]}, expected {least[b, t]} to {t}")


@custom_op("gptdist::attention_fwd")
def _fwd(
    qkv: torch.Tensor,
    doc_start: torch.Tensor | None,
    dropout_p: float,
    key: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    site: int,
    head_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_documents(doc_start)
    drop = Dropout(dropout_p, key, sample_ids, site, head_offset)
    backend = _backend(qkv)
    if backend == "cuda":
        return cuda_forward(qkv, doc_start, drop)
    if backend == "cpu":
        return cpu_forward(qkv, doc_start, drop)
    if _plain(qkv, doc_start, dropout_p):
        return flash_forward(qkv)
    return math_forward(qkv, doc_start, drop)


@custom_op("gptdist::attention_bwd")
def _bwd(
    dout: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    doc_start: torch.Tensor | None,
    dropout_p: float,
    key: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    site: int,
    head_offset: int,
) -> torch.Tensor:
    drop = Dropout(dropout_p, key, sample_ids, site, head_offset)
    backend = _backend(qkv)
    if backend == "cuda":
        return cuda_backward(dout, qkv, out, lse, doc_start, drop)
    if backend == "cpu":
        return cpu_backward(dout, qkv, out, lse, doc_start, drop)
    if _plain(qkv, doc_start, dropout_p):
        return flash_backward(dout, qkv, out, lse)
    return math_backward(dout, qkv, out, lse, doc_start, drop)


@_fwd.register_fake
def _(qkv, doc_start, dropout_p, key, sample_ids, site, head_offset):
    B, T, H, slots, D = qkv.shape
    lse = qkv.new_empty(B, H, slots - 2, T, dtype=compute_dtype(qkv.dtype))
    return qkv.new_empty(B, T, H, slots - 2, D), lse


@_bwd.register_fake
def _(dout, qkv, out, lse, doc_start, dropout_p, key, sample_ids, site, head_offset):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    qkv, doc_start, ctx.dropout_p, key, sample_ids, ctx.site, ctx.head_offset = inputs
    ctx.save_for_backward(qkv, *output, doc_start, key, sample_ids)


def _backward(ctx, dout, dlse):
    qkv, out, lse, doc_start, key, sample_ids = ctx.saved_tensors
    dqkv = _bwd(dout, qkv, out, lse, doc_start, ctx.dropout_p, key, sample_ids, ctx.site, ctx.head_offset)
    return dqkv, None, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)


def attention(
    qkv: torch.Tensor,
    *,
    doc_start: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    key: torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    site: int = 0,
    head_offset: int = 0,
) -> torch.Tensor:
    """Causal attention of a packed projection; returns (B, T, Hkv, G, D) contiguous, in qkv's dtype.

    qkv: (B, T, Hkv, G+2, D): per kv head its G queries, then k, then v. doc_start: int32 (B, T), query t sees keys in
    [doc_start[b, t], t]; it must not exceed t, nor be negative, nor decrease along a row (documents lie one after the
    other): a ValueError on a CPU; on a GPU, where values are not looked at, what comes out is then undefined, but no
    memory outside of the tensors is touched.
    dropout_p, key, sample_ids, site: as for `dropout`, on the probabilities. head_offset: global index of the first
    query head, where heads are sharded.
    """
    if qkv.dim() != 5 or qkv.shape[3] < 3:
        raise ValueError(f"attention: qkv has shape {tuple(qkv.shape)}, expected (B, T, Hkv, G+2, D) with G >= 1")
    B, T, H, slots, _ = qkv.shape
    if doc_start is not None and (tuple(doc_start.shape) != (B, T) or doc_start.dtype != torch.int32):
        raise ValueError(
            f"attention: doc_start is {doc_start.dtype} {tuple(doc_start.shape)}, expected int32 ({B}, {T})"
        )
    check_randomness("attention", dropout_p, key, sample_ids, B, site)
    if dropout_p > 0.0 and not 0 <= head_offset <= (1 << 16) - H * (slots - 2):
        raise ValueError(f"attention: head_offset {head_offset} puts heads beyond 65535")
    if dropout_p == 0.0:
        key = sample_ids = None
    return _fwd(qkv, doc_start, dropout_p, key, sample_ids, site, head_offset)[0]
