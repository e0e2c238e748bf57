"""linear_logsumexp: what one shard of the vocabulary gives to a cross entropy, never holding its (N, V) logits whole.

For the rows W of an output head that have the ids [first, first + V):

    z_n = h_n W^T,  lse_n = logsumexp(z_n),  picked_n = z_n[t_n - first] where this shard has the target, else 0
    dz_n = dlse_n softmax(z_n) + dpicked_n onehot(t_n - first),  dh = dz W,  dW = dz^T h

The loss over all shards is logsumexp(their lse) - sum(their picked); a shard of padding alone has lse = -inf. Chunks,
dtypes and reads of memory are those of linear_cross_entropy. Source: Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

import math

import torch

from .backends import compute_dtype, custom_op
from .cross_entropy import _check_range, _check_targets, _chunks, _linear_gradients, _logits


def _present(weight, first, vocab_size):
    """Rows of this shard that are no padding."""
    return min(max(vocab_size - first, 0), weight.shape[0])


def _place(targets, first, rows):
    """Where targets lie in this shard, as an index (n, 1) that is 0 for those elsewhere, and which are here (n,)."""
    here = (targets >= first) & (targets < first + rows)
    return (targets - first).masked_fill(~here, 0)[:, None], here


@custom_op("gptdist::linear_logsumexp_fwd")
def _fwd(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first: int, vocab_size: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_range("linear_logsumexp", targets, vocab_size, ignore_index)
    N, compute, rows = hidden.shape[0], compute_dtype(hidden.dtype), _present(weight, first, vocab_size)
    lse, picked = hidden.new_full((N,), -math.inf, dtype=compute), hidden.new_zeros(N, dtype=compute)
    w = weight[:rows].to(hidden.dtype)  # (V, C) without the padding
    buffer = None
    for chunk in _chunks(N, rows) if rows else []:
        buffer, logits = _logits(hidden[chunk], w, buffer)
        logits = logits.to(compute)
        lse[chunk] = torch.logsumexp(logits, dim=-1)
        index, here = _place(targets[chunk], first, rows)
        picked[chunk] = logits.gather(1, index)[:, 0].masked_fill_(~here, 0.0)
    return lse, picked


@custom_op("gptdist::linear_logsumexp_bwd")
def _bwd(
    dlse: torch.Tensor,
    dpicked: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    first: int,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _present(weight, first, vocab_size)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape, dtype=lse.dtype)
    w = weight[:rows].to(hidden.dtype)
    buffer = None
    for chunk in _chunks(hidden.shape[0], rows) if rows else []:
        h = hidden[chunk]
        buffer, logits = _logits(h, w, buffer)
        dlogits = logits.to(lse.dtype).sub_(lse[chunk, None]).exp_().mul_(dlse[chunk, None])
        index, here = _place(targets[chunk], first, rows)
        dlogits.scatter_add_(1, index, dpicked[chunk].masked_fill(~here, 0.0)[:, None])
        dlogits = dlogits.to(hidden.dtype)
        torch.mm(dlogits, w, out=dhidden[chunk])
        dweight[:rows] += dlogits.t() @ h
    return dhidden, dweight.to(weight.dtype)


@_fwd.register_fake
def _(hidden, weight, targets, first, vocab_size, ignore_index):
    lse = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    return lse, torch.empty_like(lse)


@_bwd.register_fake
def _(dlse, dpicked, hidden, weight, targets, lse, first, vocab_size):
    return _linear_gradients(hidden, weight, True, True)


def _setup(ctx, inputs, output):
    hidden, weight, targets, ctx.first, ctx.vocab_size, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, output[0])


def _backward(ctx, dlse, dpicked):
    return *_bwd(dlse, dpicked, *ctx.saved_tensors, ctx.first, ctx.vocab_size), None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)


def linear_logsumexp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    first: int,
    vocab_size: int,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp of this shard's logits, the target's logit or 0): each (N,), fp32 (fp64 for float64).

    hidden: (N, C). weight: (V, C), the rows of ids first, first + 1, ...; those at and beyond `vocab_size` are padding,
    with logits of -inf. targets: int64 (N,), global ids. Raises ValueError for arguments that do not fit, and on a CPU
    for a target that is neither below `vocab_size` nor `ignore_index`.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logsumexp: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected (N, C) and (V, C)"
        )
    _check_targets("linear_logsumexp", targets, hidden.shape[0])
    if first < 0 or vocab_size < 1:
        raise ValueError(f"linear_logsumexp: first={first} and vocab_size={vocab_size}, expected >= 0 and >= 1")
    return _fwd(hidden, weight, targets, first, vocab_size, ignore_index)
