"""cross_entropy over given logits, and linear_cross_entropy that never holds the (N, V) logits whole.

    loss_n = logsumexp(z_n) - z_n[t_n],  dz_n = dloss_n (softmax(z_n) - onehot(t_n)),  z = h W^T
    dh = dz W,  dW = dz^T h

Rows are handled in chunks through one buffer of at most BUFFER_ELEMENTS logits; log-sum-exps (N fp32) are kept, and
the backward of linear_cross_entropy computes the logits again chunk by chunk, as the upstream gradient of every
token's loss is arbitrary. The matrix products run in the hidden states' dtype, the softmax in fp32 (fp64 for
float64), and dW is summed over chunks in fp32. Forward reads h once and W once per chunk; backward reads W twice.
Sources: Wijmans et al., "Cut your losses" (2024), section 4; Liger-Kernel's fused linear cross entropy.
"""

import torch

from .backends import ALIGNMENT, aligned, choose, compute_dtype, cuda_kernels, custom_op

BUFFER_ELEMENTS = 1 << 24  # 64 MiB of fp32: 333 rows of GPT-2's vocabulary, enough rows to keep a GEMM efficient
LEAST_ROWS = 64  # fewer would make the GEMM read W for too little work
# For the CUDA kernels slices of (N,) start at multiples of 16 bytes, and so do rows of the buffer; GEMMs like both.
CUDA_ROWS, CUDA_COLUMNS = 64, 8


def _chunks(rows: int, width: int, multiple: int = 1) -> list[slice]:
    """Slices of `rows`, each but the last of a number of rows that `multiple` divides."""
    step = max(LEAST_ROWS, BUFFER_ELEMENTS // max(1, width)) // multiple * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_range(op, targets, classes, ignore_index):
    """An out-of-range target is an error on a CPU; on an accelerator the check would wait for the device."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(f"{op}: targets hold {int(targets[wrong][0])}, expected 0 <= target < {classes}")


def _losses(logits, targets, ignore_index):
    """Losses and log-sum-exps (n,) of logits (n, V) in the compute dtype."""
    ignored = targets == ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return (lse - picked).masked_fill_(ignored, 0.0), lse


def _logit_gradients_(logits, targets, lse, dloss, ignore_index):
    """Overwrite logits (n, V) in the compute dtype with their gradient."""
    ignored = targets == ignore_index
    safe = targets.masked_fill(ignored, 0)[:, None]
    grads = logits.sub_(lse[:, None]).exp_()
    grads.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=grads.dtype))
    return grads.mul_(dloss.to(grads.dtype).masked_fill(ignored, 0.0)[:, None])


# cross_entropy


def _readable_rows(logits):
    """logits as the CUDA forward reads them, which may have a stride between rows: themselves or a copy."""
    rows_lie_apart = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if rows_lie_apart and logits.data_ptr() % ALIGNMENT == 0 else aligned(logits)


@custom_op("gptdist::cross_entropy_fwd")
def _fwd(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, V = logits.shape
    _check_range("cross_entropy", targets, V, ignore_index)
    if choose("cross_entropy", logits.device, logits.dtype).backend == "cuda":
        return cuda_kernels().cross_entropy_fwd(_readable_rows(logits), aligned(targets), ignore_index)
    compute = compute_dtype(logits.dtype)
    loss = logits.new_empty(N, dtype=compute)
    lse = torch.empty_like(loss)
    for rows in _chunks(N, V):
        loss[rows], lse[rows] = _losses(logits[rows].to(compute), targets[rows], ignore_index)
    return loss, lse


@custom_op("gptdist::cross_entropy_bwd")
def _bwd(
    dloss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    if choose("cross_entropy", logits.device, logits.dtype).backend == "cuda":
        tensors = aligned(dloss.float()), aligned(logits), aligned(targets), aligned(lse)
        return cuda_kernels().cross_entropy_bwd(*tensors, ignore_index)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _chunks(*logits.shape):
        scratch = logits[rows].to(lse.dtype, copy=True)
        dlogits[rows] = _logit_gradients_(scratch, targets[rows], lse[rows], dloss[rows], ignore_index)
    return dlogits


@_fwd.register_fake
def _(logits, targets, ignore_index):
    loss = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


@_bwd.register_fake
def _(dloss, logits, targets, lse, ignore_index):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx, dloss, dlse):
    return _bwd(dloss, *ctx.saved_tensors, ctx.ignore_index), None, None


_fwd.register_autograd(_backward, setup_context=_setup)


# linear_cross_entropy


@custom_op("gptdist::linear_cross_entropy_fwd")
def _linear_fwd(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    N = hidden.shape[0]
    _check_range("linear_cross_entropy", targets, vocab_size, ignore_index)
    compute = compute_dtype(hidden.dtype)
    loss = hidden.new_empty(N, dtype=compute)
    lse = torch.empty_like(loss)
    # Padding rows of W never take part: their logits would be -inf, their probability and gradient zero.
    w = weight[:vocab_size].to(hidden.dtype)  # (V, C)
    on_cuda = _linear_on_cuda(hidden)
    targets = aligned(targets) if on_cuda else targets
    buffer = None
    for rows in _chunks(N, vocab_size, CUDA_ROWS if on_cuda else 1):
        buffer, logits = _logits(hidden[rows], w, buffer, CUDA_COLUMNS if on_cuda else 1)
        if on_cuda:
            loss[rows], lse[rows] = cuda_kernels().cross_entropy_fwd(logits, targets[rows], ignore_index)
        else:
            loss[rows], lse[rows] = _losses(logits.to(compute), targets[rows], ignore_index)
    return loss, lse


def _linear_on_cuda(hidden):
    return choose("linear_cross_entropy", hidden.device, hidden.dtype).backend == "cuda"


def _logits(h, w, buffer, multiple=1):
    """(buffer, logits (n, V)): one buffer serves every chunk, the first being the largest.

    Its rows begin at multiples of `multiple` elements.
    """
    V = w.shape[0]
    if buffer is None:
        buffer = h.new_empty(h.shape[0], -(-V // multiple) * multiple)
    return buffer, torch.mm(h, w.t(), out=buffer[: h.shape[0], :V])


@custom_op("gptdist::linear_cross_entropy_bwd")
def _linear_bwd(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    vocab_size: int,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dhidden, _ = _linear_gradients(hidden, weight, need_hidden, need_weight)
    dweight = weight.new_zeros(weight.shape if need_weight else 0, dtype=lse.dtype)
    w = weight[:vocab_size].to(hidden.dtype)
    on_cuda = _linear_on_cuda(hidden)
    if on_cuda:
        dloss, targets, lse = aligned(dloss.float()), aligned(targets), aligned(lse)
    buffer = None
    for rows in _chunks(hidden.shape[0], vocab_size, CUDA_ROWS if on_cuda else 1):
        h = hidden[rows]
        buffer, logits = _logits(h, w, buffer, CUDA_COLUMNS if on_cuda else 1)
        if on_cuda:  # the buffer's logits become their gradient
            dlogits = logits
            cuda_kernels().cross_entropy_bwd_(dloss[rows], logits, targets[rows], lse[rows], ignore_index)
        else:
            dlogits = _logit_gradients_(logits.to(lse.dtype), targets[rows], lse[rows], dloss[rows], ignore_index)
            dlogits = dlogits.to(hidden.dtype)
        if need_hidden:
            torch.mm(dlogits, w, out=dhidden[rows])
        if need_weight and dlogits.dtype == dweight.dtype:
            dweight[:vocab_size].addmm_(dlogits.t(), h)
        elif need_weight:
            dweight[:vocab_size] += dlogits.t() @ h
    return dhidden, dweight.to(weight.dtype)


def _linear_gradients(hidden, weight, need_hidden, need_weight):
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    return dhidden, dweight


@_linear_fwd.register_fake
def _(hidden, weight, targets, vocab_size, ignore_index):
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    return loss, torch.empty_like(loss)


@_linear_bwd.register_fake
def _(dloss, hidden, weight, targets, lse, vocab_size, ignore_index, need_hidden, need_weight):
    return _linear_gradients(hidden, weight, need_hidden, need_weight)


def _linear_setup(ctx, inputs, output):
    hidden, weight, targets, ctx.vocab_size, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _linear_backward(ctx, dloss, dlse):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    dhidden, dweight = _linear_bwd(
        dloss, *ctx.saved_tensors, ctx.vocab_size, ctx.ignore_index, need_hidden, need_weight
    )
    return dhidden if need_hidden else None, dweight if need_weight else None, None, None, None


_linear_fwd.register_autograd(_linear_backward, setup_context=_linear_setup)


def _check_targets(op, targets, rows):
    if tuple(targets.shape) != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets is {targets.dtype} {tuple(targets.shape)}, expected int64 ({rows},)")


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """Per-token losses (N,) in fp32 (fp64 for float64), 0 where targets is ignore_index.

    logits: (N, V). targets: int64 (N,).
    """
    if logits.dim() != 2:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits.shape)}, expected (N, V)")
    _check_targets("cross_entropy", targets, logits.shape[0])
    return _fwd(logits, targets, ignore_index)[0]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Per-token losses (N,), fp32 (fp64 for float64), of the logits hidden @ weight.T; 0 where ignored.

    hidden: (N, C). weight: (V, C); rows at and beyond `vocab_size` are padding, with logits of -inf. targets: int64
    (N,). Products run in hidden's dtype. Raises ValueError for arguments that do not fit, and on a CPU for a target
    out of range; the CUDA kernels make the loss and gradients of such a row NaN.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected (N, C) and (V, C)"
        )
    _check_targets("linear_cross_entropy", targets, hidden.shape[0])
    V = weight.shape[0]
    vocab_size = V if vocab_size is None else vocab_size
    if not 0 < vocab_size <= V:
        raise ValueError(f"linear_cross_entropy: vocab_size is {vocab_size}, expected 1 to {V} (rows of weight)")
    return _linear_fwd(hidden, weight, targets, vocab_size, ignore_index)[0]
