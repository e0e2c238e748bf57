"""dropout: y = x * keep / (1 - p), with keep a pure function of (key, sample id, site, position, channel).

The mask is recomputed in the backward, which is the same operation on the gradient: dx = dy * keep / (1 - p).
Reads x, writes y; nothing is saved but the key. Reference: Srivastava et al., JMLR 15 (2014); counters in random.py.
"""

import torch

from .backends import aligned, choose, cuda_kernels, custom_op
from .random import check_randomness, keep_mask


@custom_op("gptdist::dropout")
def _dropout(
    x: torch.Tensor, p: float, key: torch.Tensor, sample_ids: torch.Tensor, site: int, row_offset: int
) -> torch.Tensor:
    backend = choose("dropout", x.device, x.dtype).backend
    if backend == "cpu":
        return torch.ops.gptdist_c.dropout(x.contiguous(), p, key, sample_ids.contiguous(), site, row_offset)
    if backend == "cuda":
        return cuda_kernels().dropout(aligned(x), p, aligned(key), aligned(sample_ids), site, row_offset)
    _, T, C = x.shape
    rows = torch.arange(row_offset, row_offset + T, device=x.device)
    keep = keep_mask(key.reshape(()), p, sample_ids, site, torch.zeros_like(sample_ids), rows, C)  # (B, T, C)
    return (torch.where(keep, x, 0) * (1.0 / (1.0 - p))).contiguous()


@_dropout.register_fake
def _(x, p, key, sample_ids, site, row_offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, ctx.p, key, sample_ids, ctx.site, ctx.row_offset = inputs
    ctx.save_for_backward(key, sample_ids)


def _backward(ctx, dy):
    key, sample_ids = ctx.saved_tensors
    return _dropout(dy, ctx.p, key, sample_ids, ctx.site, ctx.row_offset), None, None, None, None, None


_dropout.register_autograd(_backward, setup_context=_setup)


def dropout(
    x: torch.Tensor,
    p: float,
    *,
    key: torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    site: int = 0,
    row_offset: int = 0,
) -> torch.Tensor:
    """Zero a share `p` of x and scale the rest by 1 / (1 - p).

    x: (B, T, C). key: int64 scalar from `dropout_key`. sample_ids: int64 (B,), global ids of the sequences.
    site: which dropout of the model, below 65536. row_offset: position of x[:, 0] in its sequence.
    Returns x itself where p is 0. Raises ValueError for arguments that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"dropout: x has shape {tuple(x.shape)}, expected (B, T, C)")
    check_randomness("dropout", p, key, sample_ids, x.shape[0], site)
    if p == 0.0:
        return x
    return _dropout(x, p, key, sample_ids, site, row_offset)
