"""bias_gelu: y = gelu(x + b), the tanh approximation.

    h = x + b,  u = sqrt(2/pi) (h + 0.044715 h^3),  y = h/2 (1 + tanh u)
    dx = dy (1/2 (1 + tanh u) + h/2 (1 - tanh^2 u) sqrt(2/pi) (1 + 3 * 0.044715 h^2)),  db = sum over rows of dx

Forward reads x, writes y. Backward reads dy and x, writes dx (overwrites a fresh buffer) and db; h is recomputed.
fp32 arithmetic for every dtype but float64. Source: Hendrycks and Gimpel (2016), section 2.
"""

import torch
import torch.nn.functional as F

from .backends import aligned, choose, compute_dtype, cuda_kernels, cuda_parameter, custom_op, width_misfit


def reference_forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    h = x.to(compute_dtype(x.dtype))
    if bias is not None:
        h = h + bias
    return F.gelu(h, approximate="tanh").to(x.dtype)


def reference_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = compute_dtype(x.dtype)
    h = x.to(compute)
    if bias is not None:
        h = h + bias
    dh = torch.ops.aten.gelu_backward(dy.to(compute), h, approximate="tanh")
    dbias = x.new_empty(0) if bias is None else dh.unsqueeze(0).sum(tuple(range(dh.dim()))).to(bias.dtype)
    return dh.to(x.dtype), dbias


def _backend(x):
    return choose("bias_gelu", x.device, x.dtype, width_misfit(x.shape[-1])).backend


@custom_op("gptdist::bias_gelu_fwd")
def _fwd(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    backend = _backend(x)
    if backend == "cuda":
        return cuda_kernels().bias_gelu_fwd(aligned(x), None if bias is None else cuda_parameter(bias, x.dtype))
    if backend == "cpu":
        return torch.ops.gptdist_c.bias_gelu_fwd(x.contiguous(), None if bias is None else bias.float().contiguous())
    return reference_forward(x, bias).contiguous()


@custom_op("gptdist::bias_gelu_bwd")
def _bwd(dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    backend = _backend(x)
    if backend == "cuda":
        bias_in = None if bias is None else cuda_parameter(bias, x.dtype)
        dx, dbias = cuda_kernels().bias_gelu_bwd(aligned(dy.to(x.dtype)), aligned(x), bias_in)
        return dx, x.new_empty(0) if bias is None else dbias.to(bias.dtype)
    if backend == "cpu":
        fp32_bias = None if bias is None else bias.float().contiguous()
        dx, dbias = torch.ops.gptdist_c.bias_gelu_bwd(dy.to(x.dtype).contiguous(), x.contiguous(), fp32_bias)
        return dx, x.new_empty(0) if bias is None else dbias.to(bias.dtype)
    dx, dbias = reference_backward(dy, x, bias)
    return dx.contiguous(), dbias


@_fwd.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_bwd.register_fake
def _(dy, x, bias):
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dbias


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = _bwd(dy, x, bias)
    return dx, None if bias is None else dbias


_fwd.register_autograd(_backward, setup_context=_setup)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """gelu(x + bias) with the tanh approximation. x: (..., C). bias: (C,), any floating dtype. Returns x's dtype."""
    if x.dim() == 0:
        raise ValueError("bias_gelu: x is a scalar, expected (..., C)")
    if bias is not None and tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(f"bias_gelu: bias has shape {tuple(bias.shape)}, expected ({x.shape[-1]},)")
    return _fwd(x, bias)
