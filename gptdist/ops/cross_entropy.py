"""cross_entropy over given logits, and linear_cross_entropy that never holds the (N, V) logits whole.

    loss_n = logsumexp(z_n) - z_n[t_n],  dz_n = dloss_n (softmax(z_n) - onehot(t_n)),  z = h W^T
    dh = dz W,  dW = dz^T h

Rows are handled in chunks through one buffer of logits; log-sum-exps (N fp32) are kept. The matrix products run in the
hidden states' dtype, the softmax in fp32 (fp64 for float64), and dW is summed over chunks in fp32.

Gradients of linear_cross_entropy, where the upstream gradient of every token's loss is arbitrary:

- On a CPU the forward turns each chunk of logits into their gradient for an upstream gradient of 1, and keeps dh and
  dW for it. Where all losses turn out to have one upstream gradient (a mean or a sum of them), the backward scales:
  three products of (N, V) by C in all. dh scales row by row in any case; dW of differently weighted losses is computed
  anew.
- On an accelerator, where to look at the upstream gradient would be to wait for the device, the backward computes the
  logits again, chunk by chunk: four products.

Forward reads h once and W once per chunk, with gradients twice; a backward that computes reads W twice.
Sources: Wijmans et al., "Cut your losses" (2024), section 4; Liger-Kernel's fused linear cross entropy.
"""

import torch

from .backends import ALIGNMENT, aligned, choose, compute_dtype, custom_op, kernels, on_cuda

# Of the buffer of logits. 64 MiB of fp32 are 333 rows of GPT-2's vocabulary, enough rows to keep a GEMM efficient. On a
# CPU dW wants more: each chunk writes it once, and adds it in fp32 where products are in 16 bits, 460 MB of traffic for
# GPT-2 124M; 128 MiB are 1335 rows in bf16, a micro-batch of 1024 tokens whole.
BUFFER_ELEMENTS = 1 << 24
CPU_BUFFER_BYTES = 1 << 27
LEAST_ROWS = 64  # fewer would make the GEMM read W for too little work
# For the CUDA kernels slices of (N,) start at multiples of 16 bytes; rows of the buffer start at multiples of a CPU's
# cache line (in 16 bits), which the kernels and GEMMs of both devices like.
CUDA_ROWS, BUFFER_COLUMNS, CPU_COLUMNS = 64, 32, 64


def _chunks(rows: int, width: int) -> list[slice]:
    """Slices of `rows` that give BUFFER_ELEMENTS at most, or LEAST_ROWS."""
    return _slices(rows, max(LEAST_ROWS, BUFFER_ELEMENTS // max(1, width)))


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_range(op, targets, classes, ignore_index):
    """An out-of-range target is an error on a CPU; on an accelerator the check would wait for the device."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(f"{op}: targets hold {int(targets[wrong][0])}, expected 0 <= target < {classes}")


def _losses(backend, logits, targets, ignore_index):
    """Losses and log-sum-exps (n,) of logits (n, V)."""
    if backend != "reference":
        return kernels(backend).cross_entropy_fwd(logits, targets, ignore_index)
    logits = logits.to(compute_dtype(logits.dtype))
    ignored = targets == ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return (lse - picked).masked_fill_(ignored, 0.0), lse


def _logit_gradients_(backend, logits, targets, lse, dloss, ignore_index):
    """The gradient of logits (n, V), in their dtype; it may be their memory."""
    if backend != "reference":
        kernels(backend).cross_entropy_bwd_(dloss, logits, targets, lse, ignore_index)
        return logits
    return _reference_gradients_(logits.to(lse.dtype), targets, lse, dloss, ignore_index).to(logits.dtype)


def _losses_and_gradients_(backend, logits, targets, ignore_index):
    """Losses, log-sum-exps and, for a dloss of 1, the gradient of logits (n, V), which may be their memory."""
    if backend == "cpu":
        return *torch.ops.gptdist_c.cross_entropy_gradient_(logits, targets, ignore_index), logits
    loss, lse = _losses(backend, logits, targets, ignore_index)
    return loss, lse, _logit_gradients_(backend, logits, targets, lse, torch.ones_like(lse), ignore_index)


def _reference_gradients_(logits, targets, lse, dloss, ignore_index):
    """Overwrite logits (n, V) in the compute dtype with their gradient."""
    ignored = targets == ignore_index
    safe = targets.masked_fill(ignored, 0)[:, None]
    grads = logits.sub_(lse[:, None]).exp_()
    grads.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=grads.dtype))
    return grads.mul_(dloss.to(grads.dtype).masked_fill(ignored, 0.0)[:, None])


# cross_entropy


def _readable_rows(logits):
    """logits as the kernels of the forward read them, which may have a stride between rows: themselves or a copy."""
    rows_lie_apart = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if rows_lie_apart and logits.data_ptr() % ALIGNMENT == 0 else aligned(logits)


@custom_op("gptdist::cross_entropy_fwd")
def _fwd(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, V = logits.shape
    _check_range("cross_entropy", targets, V, ignore_index)
    backend = choose("cross_entropy", logits.device, logits.dtype).backend
    if backend != "reference":
        return _losses(backend, _readable_rows(logits), aligned(targets), ignore_index)
    loss = logits.new_empty(N, dtype=compute_dtype(logits.dtype))
    lse = torch.empty_like(loss)
    for rows in _chunks(N, V):
        loss[rows], lse[rows] = _losses(backend, logits[rows], targets[rows], ignore_index)
    return loss, lse


@custom_op("gptdist::cross_entropy_bwd")
def _bwd(
    dloss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    backend = choose("cross_entropy", logits.device, logits.dtype).backend
    if backend != "reference":
        tensors = aligned(dloss.float()), aligned(logits), aligned(targets), aligned(lse)
        return kernels(backend).cross_entropy_bwd(*tensors, ignore_index)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _chunks(*logits.shape):
        scratch = logits[rows].to(lse.dtype, copy=True)
        dlogits[rows] = _reference_gradients_(scratch, targets[rows], lse[rows], dloss[rows], ignore_index)
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


def _backend(hidden):
    return choose("linear_cross_entropy", hidden.device, hidden.dtype).backend


def _step(hidden, width):
    """Rows per chunk. A matter of the device, not of the backend: shapes that the forward returns depend on it."""
    if on_cuda(hidden.device):
        return max(LEAST_ROWS, BUFFER_ELEMENTS // width) // CUDA_ROWS * CUDA_ROWS
    return max(LEAST_ROWS, CPU_BUFFER_BYTES // (width * hidden.dtype.itemsize))


def _linear_chunks(hidden, width):
    return _slices(hidden.shape[0], _step(hidden, width))


def _logits(h, w, buffer):
    """The buffer, made for the first chunk, which has the most rows, and h @ w.T (n, V) in it."""
    V = w.shape[0]
    if buffer is None:
        buffer = h.new_empty(h.shape[0], -(-V // BUFFER_COLUMNS) * BUFFER_COLUMNS)
    return buffer, torch.mm(h, w.t(), out=buffer[: h.shape[0], :V])


def _products_weight(weight, shadow, vocab_size, dtype):
    """W for the products: (V, C) in `dtype`, without the padding, whose logits would be -inf and its gradients zero."""
    return (weight if shadow is None else shadow)[:vocab_size].to(dtype)


class _WeightGradient:
    """dW as the sum over chunks of dz^T h, rows of padding zero.

    `product`, in the hidden states' dtype, is the last chunk's, and `total`, in fp32, the sum of those before. There is
    no total, (0,), where there is one chunk, or where products are summed in the dtype that they are computed in.
    """

    def __init__(self, weight, vocab_size, dtype, chunks):
        make = weight.new_empty if chunks else weight.new_zeros
        self.product = make(weight.shape, dtype=dtype)
        self.total = _empty_total(weight, dtype, chunks > 1)
        self.vocab_size, self.chunks = vocab_size, 0
        for part in (self.product, self.total):
            part[vocab_size:] = 0

    def add(self, dlogits, h):
        product = self.product[: self.vocab_size]
        if self.chunks > 0 and self.total.numel() == 0:
            product.addmm_(dlogits.t(), h)
        else:
            if self.chunks > 0:
                _scaled_sum_(self.total, self.product, None if self.chunks == 1 else self.total, 1.0)
            _transposed_product(dlogits, h, product)
        self.chunks += 1


def _transposed_product(dlogits, h, out):
    """out = dlogits^T h. In 16 bits a CPU takes the columns of dlogits (n, V) in two parts, of which the first is even:
    as one product GPT-2's 50,257 columns take a fifth longer than 50,240 and 17 (1024 rows: 232 ms for 193).
    """
    first = dlogits.shape[1] // CPU_COLUMNS * CPU_COLUMNS
    if dlogits.device.type != "cpu" or dlogits.dtype.itemsize > 2 or first in (0, dlogits.shape[1]):
        torch.mm(dlogits.t(), h, out=out)
    else:
        torch.mm(dlogits[:, :first].t(), h, out=out[:first])
        torch.mm(dlogits[:, first:].t(), h, out=out[first:])


def _empty_total(weight, dtype, several_chunks):
    compute = compute_dtype(dtype)
    return weight.new_empty(weight.shape if several_chunks and dtype != compute else (0,), dtype=compute)


def _scaled_sum_(out, x, addend, scale):
    """out = (x + addend) scale in one pass, addend None for 0; out may be addend."""
    if choose("linear_cross_entropy", x.device, x.dtype).backend == "cpu":
        torch.ops.gptdist_c.scaled_sum_(out, x, addend, scale)
    else:
        out.copy_(x) if addend is None else torch.add(x, addend, out=out)
        if scale != 1.0:
            out.mul_(scale)


def _scaled_weight_gradient(product, total, scale, dtype):
    """(product + total) scale in `dtype`, a fresh tensor."""
    out = torch.empty_like(product, dtype=compute_dtype(product.dtype))
    _scaled_sum_(out, product, total if total.numel() else None, scale)
    return out.to(dtype)


@custom_op("gptdist::linear_cross_entropy_fwd")
def _linear_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shadow: torch.Tensor | None,
    vocab_size: int,
    ignore_index: int,
    with_dhidden: bool,
    with_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, log-sum-exps, and for a dloss of 1 dh and the two parts of a _WeightGradient; (0,) what is not wanted."""
    _check_range("linear_cross_entropy", targets, vocab_size, ignore_index)
    backend = _backend(hidden)
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    lse = torch.empty_like(loss)
    dhidden = _empty_like(hidden, with_dhidden)
    w, targets, buffer = _products_weight(weight, shadow, vocab_size, hidden.dtype), aligned(targets), None
    chunks = _linear_chunks(hidden, vocab_size)
    dweight = _WeightGradient(weight, vocab_size, hidden.dtype, len(chunks)) if with_dweight else None
    for rows in chunks:
        h = hidden[rows]
        buffer, logits = _logits(h, w, buffer)
        if not (with_dhidden or with_dweight):
            loss[rows], lse[rows] = _losses(backend, logits, targets[rows], ignore_index)
            continue
        loss[rows], lse[rows], dlogits = _losses_and_gradients_(backend, logits, targets[rows], ignore_index)
        if with_dhidden:
            torch.mm(dlogits, w, out=dhidden[rows])
        if with_dweight:
            dweight.add(dlogits, h)
    parts = (dweight.product, dweight.total) if with_dweight else (hidden.new_empty(0), lse.new_empty(0))
    return loss, lse, dhidden, *parts


@custom_op("gptdist::linear_cross_entropy_bwd")
def _linear_bwd(
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shadow: torch.Tensor | None,
    lse: torch.Tensor,
    unit_dhidden: torch.Tensor | None,
    unit_product: torch.Tensor | None,
    unit_total: torch.Tensor | None,
    vocab_size: int,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dh and dW, (0,) if not needed: scaled from those for a dloss of 1 where these are given and suffice."""
    dhidden = dweight = None
    if need_hidden and unit_dhidden is not None:
        scale = dloss.masked_fill(targets == ignore_index, 0.0)[:, None]
        dhidden = (unit_dhidden * scale).to(hidden.dtype)
    if need_weight and unit_product is not None:
        scale = _common_value(dloss[targets != ignore_index])
        if scale is not None:
            dweight = _scaled_weight_gradient(unit_product, unit_total, scale, weight.dtype)
    missing = need_hidden and dhidden is None, need_weight and dweight is None
    if any(missing):
        computed = _compute_gradients(dloss, hidden, weight, targets, shadow, lse, vocab_size, ignore_index, *missing)
        dhidden, dweight = (new if old is None else old for old, new in zip((dhidden, dweight), computed, strict=True))
    return hidden.new_empty(0) if dhidden is None else dhidden, weight.new_empty(0) if dweight is None else dweight


def _common_value(x):
    """The one value that all elements of x have, 0 where there are none; None for several or NaN."""
    if x.numel() == 0:
        return 0.0
    return x[0].item() if (x == x[0]).all() else None


def _compute_gradients(dloss, hidden, weight, targets, shadow, lse, vocab_size, ignore_index, need_hidden, need_weight):
    """dh and dW, (0,) if not needed, from the logits computed again."""
    backend = _backend(hidden)
    w, buffer = _products_weight(weight, shadow, vocab_size, hidden.dtype), None
    dloss, targets, lse = aligned(dloss.to(lse.dtype)), aligned(targets), aligned(lse)
    chunks = _linear_chunks(hidden, vocab_size)
    dhidden = _empty_like(hidden, need_hidden)
    dweight = _WeightGradient(weight, vocab_size, hidden.dtype, len(chunks)) if need_weight else None
    for rows in chunks:
        h = hidden[rows]
        buffer, logits = _logits(h, w, buffer)
        dlogits = _logit_gradients_(backend, logits, targets[rows], lse[rows], dloss[rows], ignore_index)
        if need_hidden:
            torch.mm(dlogits, w, out=dhidden[rows])
        if need_weight:
            dweight.add(dlogits, h)
    if not need_weight:
        return dhidden, weight.new_empty(0)
    if dweight.product.dtype == weight.dtype and dweight.total.numel() == 0:
        return dhidden, dweight.product
    return dhidden, _scaled_weight_gradient(dweight.product, dweight.total, 1.0, weight.dtype)


def _empty_like(x, wanted):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _linear_gradients(hidden, weight, need_hidden, need_weight):
    return _empty_like(hidden, need_hidden), _empty_like(weight, need_weight)


@_linear_fwd.register_fake
def _(hidden, weight, targets, shadow, vocab_size, ignore_index, with_dhidden, with_dweight):
    loss = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    product = hidden.new_empty(weight.shape if with_dweight else (0,))
    several = with_dweight and hidden.shape[0] > _step(hidden, vocab_size)
    total = _empty_total(weight, hidden.dtype, several)
    return loss, torch.empty_like(loss), _empty_like(hidden, with_dhidden), product, total


@_linear_bwd.register_fake
def _(dloss, hidden, weight, targets, shadow, lse, unit_dhidden, unit_product, unit_total, vocab_size, ignore_index,
      need_hidden, need_weight):
    return _linear_gradients(hidden, weight, need_hidden, need_weight)


def _linear_setup(ctx, inputs, output):
    hidden, weight, targets, shadow, ctx.vocab_size, ctx.ignore_index, with_dhidden, with_dweight = inputs
    lse, dhidden, product, total = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradient of dW's parts would be as large as they are
    units = dhidden if with_dhidden else None, *((product, total) if with_dweight else (None, None))
    ctx.save_for_backward(hidden, weight, targets, shadow, lse, *units)


def _linear_backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 8
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    dhidden, dweight = _linear_bwd(
        dloss, *ctx.saved_tensors, ctx.vocab_size, ctx.ignore_index, need_hidden, need_weight
    )
    return dhidden if need_hidden else None, dweight if need_weight else None, *[None] * 6


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
    shadow: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token losses (N,), fp32 (fp64 for float64), of the logits hidden @ weight.T; 0 where ignored.

    hidden: (N, C). weight: (V, C); rows at and beyond `vocab_size` are padding, with logits of -inf. targets: int64
    (N,). Products run in hidden's dtype. shadow: weight in that dtype, read in its place, where it would be cast; the
    gradient is weight's, in weight's dtype. Raises ValueError for arguments that do not fit, and on a CPU for a target
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
    if shadow is not None and (shadow.shape, shadow.dtype) != (weight.shape, hidden.dtype):
        raise ValueError(
            f"linear_cross_entropy: shadow is {shadow.dtype} {tuple(shadow.shape)}, expected hidden's {hidden.dtype} "
            f"and weight's {tuple(weight.shape)}"
        )
    in_forward = torch.is_grad_enabled() and hidden.device.type == "cpu" and not on_cuda(hidden.device)
    wanted = in_forward and hidden.requires_grad, in_forward and weight.requires_grad
    return _linear_fwd(hidden, weight, targets, shadow, vocab_size, ignore_index, *wanted)[0]
