"""adamw_: one step of AdamW on many tensors, in place, in one pass over memory.

    g = grad_scale * grad,  p <- p (1 - lr weight_decay)
    m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps),  shadow <- p, rounded

p, m, v are fp32, g is fp32, bf16 or fp16, a shadow bf16 or fp16. An element's 28 bytes (g in fp32; 26 in 16 bits) are
read and written once: 16 read and 12 written, and 2 more for a shadow. Clipping is grad_scale: it costs no pass.
The reference computes fp64 for fp64 tensors. Mutates params, exp_avg, exp_avg_sq and shadows; no autograd.
Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2; torch.optim.AdamW.
"""

import math
from collections.abc import Sequence

import torch

from .backends import choose, custom_op, kernels

MASTERS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def reference(params, grads, exp_avg, exp_avg_sq, shadows, grad_scale, lr, beta1, beta2, eps, weight_decay, step):
    grads = [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avg, denominators, -lr / (1 - beta1**step))
    if shadows:
        torch._foreach_copy_(shadows, params)


@custom_op("gptdist::adamw_", mutates_args=("params", "exp_avg", "exp_avg_sq", "shadows"))
def _adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    shadows: Sequence[torch.Tensor],
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    backend = choose("adamw_", params[0].device, params[0].dtype).backend
    function = reference if backend == "reference" else kernels(backend).adamw_
    function(params, grads, exp_avg, exp_avg_sq, shadows, grad_scale, lr, beta1, beta2, eps, weight_decay, step)
    # Autograd finds by it that a tensor was changed which a backward still needs; the kernels do not say it.
    torch.autograd.graph.increment_version([*params, *exp_avg, *exp_avg_sq, *shadows])


@_adamw_.register_fake
def _(params, grads, exp_avg, exp_avg_sq, shadows, grad_scale, lr, beta1, beta2, eps, weight_decay, step):
    return None


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    *,
    shadows: Sequence[torch.Tensor] | None = None,
    grad_scale: torch.Tensor | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step `params` in place, and overwrite `shadows` with them.

    The lists have one tensor for each parameter, of its shape, contiguous, all on one device; none overlaps another.
    params, exp_avg, exp_avg_sq: all fp32 (or all fp64). grads: params' dtype, bf16 or fp16; they may differ.
    shadows: bf16 or fp16. grad_scale: fp32, (), on the same device; multiplied into every gradient as it is read.
    step: 1 for the first. NaN and inf spread as in torch.optim.AdamW. Raises ValueError for what does not fit.
    """
    if step < 1:
        raise ValueError(f"adamw_: step is {step}, expected at least 1")
    lists = {"params": params, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if shadows is not None:
        lists["shadows"] = shadows
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {name} has {len(tensors)} tensors, expected {len(params)} as params")
    if not params:
        return
    device, master = params[0].device, params[0].dtype
    masters = (master,) if master in MASTERS else MASTERS
    allowed = {"grads": (*masters, *HALVES), "shadows": HALVES}
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            _check(f"{name}[{i}]", tensor, params[i].shape, allowed.get(name, masters), device)
    if grad_scale is not None:
        _check("grad_scale", grad_scale, (), (torch.float32,), device)
    with torch.no_grad():
        _adamw_(list(params), list(grads), list(exp_avg), list(exp_avg_sq), list(shadows or ()), grad_scale,
                lr, beta1, beta2, eps, weight_decay, step)


def _check(name, tensor, shape, dtypes, device):
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"adamw_: {name} is {tensor.dtype}, expected {expected}")
    if tensor.device != device:
        raise ValueError(f"adamw_: {name} is on {tensor.device}, expected {device} as params[0]")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"adamw_: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"adamw_: {name} is not contiguous, with strides {tensor.stride()}")
