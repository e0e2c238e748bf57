"""layer_norm and residual_layer_norm.

    xhat = (x - mean) rstd,  rstd = (var + eps)^(-1/2),  y = xhat w + b
    g = dy w,  dx = rstd (g - mean(g) - xhat mean(g xhat)),  dw = sum over rows of dy xhat,  db = sum over rows of dy

residual_layer_norm normalises s = x + r and returns s too; its backward adds the gradient of s to dx, which is then
the gradient of both x and r. Statistics are fp32 (fp64 for float64) and kept for the backward.
Forward reads x (and r), writes y (and s). Backward reads dy, x or s (and ds), writes dx, dw, db into fresh buffers.
Source: Ba, Kiros, Hinton, "Layer normalization" (2016), section 3.
"""

import torch

from .backends import (
    COMPILED,
    aligned,
    choose,
    compute_dtype,
    cuda_kernels,
    cuda_parameter,
    custom_op,
    norm_misfit,
)


def _normalise(x, weight, bias, eps):
    """y, mean, rstd in the compute dtype; mean and rstd have x's shape without its last dimension."""
    compute = compute_dtype(x.dtype)
    shape = x.shape[-1:]
    bias = None if bias is None else bias.to(compute)
    y, mean, rstd = torch.native_layer_norm(x.to(compute).contiguous(), shape, weight.to(compute), bias, eps)
    return y, mean.reshape(x.shape[:-1]), rstd.reshape(x.shape[:-1])


def _gradients(dy, x, mean, rstd, weight, bias):
    """dx in the compute dtype; dweight and dbias in their parameter's dtype (dbias empty without a bias)."""
    compute = compute_dtype(x.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(compute).contiguous(),
        x.to(compute).contiguous(),
        x.shape[-1:],
        mean[..., None],
        rstd[..., None],
        weight.to(compute),
        None if bias is None else bias.to(compute),
        [True, True, bias is not None],
    )
    dbias = weight.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias


def _backend(op, x):
    return choose(op, x.device, x.dtype, norm_misfit(x.shape[-1])).backend


def _cuda_parameters(weight, bias, dtype):
    """weight and bias in one dtype that the CUDA kernels take beside activations of `dtype`."""
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    return cuda_parameter(weight, dtype), None if bias is None else cuda_parameter(bias, dtype)


def _cpu_parameters(weight, bias):
    """weight and bias as the CPU kernels take them."""
    return weight.float().contiguous(), None if bias is None else bias.float().contiguous()


def _kernel_gradients(backend, dy, ds, s, mean, rstd, weight, bias):
    """dx, dweight, dbias by a kernel; ds is None, or joins dx."""
    if s.dtype != torch.float32 or dy.dtype not in COMPILED[backend]["layer_norm"].dtypes:
        dy = dy.to(s.dtype)  # kernels take dy in the dtype of s, or beside fp32 in another of theirs
    name = "layer_norm_bwd" if ds is None else "residual_layer_norm_bwd"
    tensors = (dy, s, mean, rstd) if ds is None else (dy, ds.to(s.dtype), s, mean, rstd)
    if backend == "cuda":
        weight_in = cuda_parameter(weight, dy.dtype)
        dx, dweight, dbias = getattr(cuda_kernels(), name)(*map(aligned, tensors), weight_in, bias is not None)
    else:
        (weight_in, _), contiguous = _cpu_parameters(weight, None), [tensor.contiguous() for tensor in tensors]
        dx, dweight, dbias = getattr(torch.ops.gptdist_c, name)(*contiguous, weight_in, bias is not None)
    return dx, dweight.to(weight.dtype), weight.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _empty_statistics(x):
    return x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


def _empty_contiguous(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_parameters(weight, bias):
    return _empty_contiguous(weight), weight.new_empty(0) if bias is None else _empty_contiguous(bias)


# layer_norm


@custom_op("gptdist::layer_norm_fwd")
def _fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = _backend("layer_norm", x)
    if backend == "cuda":
        y, mean, rstd = cuda_kernels().layer_norm_fwd(aligned(x), *_cuda_parameters(weight, bias, x.dtype), eps)
    elif backend == "cpu":
        to_bf16 = x.dtype == torch.float32 and dtype == torch.bfloat16
        kernel = torch.ops.gptdist_c.layer_norm_to_bf16_fwd if to_bf16 else torch.ops.gptdist_c.layer_norm_fwd
        y, mean, rstd = kernel(x.contiguous(), *_cpu_parameters(weight, bias), eps)
    else:
        y, mean, rstd = _normalise(x, weight, bias, eps)
        y = y.to(x.dtype)
    return y.to(dtype), mean, rstd


@custom_op("gptdist::layer_norm_bwd")
def _bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = _backend("layer_norm", x)
    if backend != "reference":
        return _kernel_gradients(backend, dy, None, x, mean, rstd, weight, bias)
    dx, dweight, dbias = _gradients(dy, x, mean, rstd, weight, bias)
    return dx.to(x.dtype), dweight, dbias


@_fwd.register_fake
def _(x, weight, bias, eps, dtype):
    return _empty_contiguous(x).to(dtype), _empty_statistics(x), _empty_statistics(x)


@_bwd.register_fake
def _(dy, x, mean, rstd, weight, bias):
    return _empty_contiguous(x), *_empty_parameters(weight, bias)


def _setup(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, dy, dmean, drstd):
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
    dx, dweight, dbias = _bwd(dy, *saved)
    return dx, dweight, None if saved[-1] is None else dbias, None, None


_fwd.register_autograd(_backward, setup_context=_setup)


# residual_layer_norm


@custom_op("gptdist::residual_layer_norm_fwd")
def _residual_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = _backend("residual_layer_norm", x) if residual.dtype != torch.float64 else "reference"
    r = residual.to(torch.promote_types(x.dtype, residual.dtype))
    if backend == "cuda":
        parameters = _cuda_parameters(weight, bias, x.dtype)
        return cuda_kernels().residual_layer_norm_fwd(aligned(x), aligned(r), *parameters, eps)
    if backend == "cpu":
        parameters = _cpu_parameters(weight, bias)
        return torch.ops.gptdist_c.residual_layer_norm_fwd(x.contiguous(), r.contiguous(), *parameters, eps)
    s = (x + residual).contiguous()
    y, mean, rstd = _normalise(s, weight, bias, eps)
    return y.to(x.dtype), s, mean, rstd


@custom_op("gptdist::residual_layer_norm_bwd")
def _residual_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor,
    s: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = _backend("residual_layer_norm", s)
    if backend != "reference":
        return _kernel_gradients(backend, dy, ds, s, mean, rstd, weight, bias)
    dx, dweight, dbias = _gradients(dy, s, mean, rstd, weight, bias)
    return dx.add_(ds).to(s.dtype), dweight, dbias


@_residual_fwd.register_fake
def _(x, residual, weight, bias, eps):
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _empty_contiguous(x), s, _empty_statistics(s), _empty_statistics(s)


@_residual_bwd.register_fake
def _(dy, ds, s, mean, rstd, weight, bias):
    return _empty_contiguous(s), *_empty_parameters(weight, bias)


def _residual_setup(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(s, mean, rstd, weight, bias)
    ctx.dtypes = x.dtype, residual.dtype


def _residual_backward(ctx, dy, ds, dmean, drstd):
    saved = ctx.saved_tensors
    dsum, dweight, dbias = _residual_bwd(dy, ds, *saved)
    x_dtype, residual_dtype = ctx.dtypes
    return dsum.to(x_dtype), dsum.to(residual_dtype), dweight, None if saved[-1] is None else dbias, None


_residual_fwd.register_autograd(_residual_backward, setup_context=_residual_setup)


def _check(op, x, weight, bias):
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar, expected (..., C)")
    C = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (C,):
            raise ValueError(f"{op}: {name} has {parameter.numel()} elements, expected C={C}")


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer norm over the last dimension. x: (..., C). weight, bias: (C,), any floating dtype.

    Returns `dtype`, or else x's: what layer_norm(x, ...).to(dtype) gives, for an fp32 x in bf16 without a second pass
    on a CPU.
    """
    _check("layer_norm", x, weight, bias)
    return _fwd(x, weight, bias, eps, x.dtype if dtype is None else dtype)[0]


def residual_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual). x, residual: (..., C).

    The norm has x's dtype, the sum the wider of the two: a bf16 branch joins an fp32 residual stream.
    """
    _check("residual_layer_norm", x, weight, bias)
    if x.shape != residual.shape:
        raise ValueError(f"residual_layer_norm: residual is {tuple(residual.shape)}, expected x's {tuple(x.shape)}")
    y, s, _, _ = _residual_fwd(x, residual, weight, bias, eps)
    return y, s
