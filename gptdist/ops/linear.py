"""linear: y = x W^T + b, as torch.nn.functional.linear; for few rows of x on a CPU by a kernel that reads W once.

Generation multiplies a row of x for each prompt: it is bound by the memory that W is read from. few_rows_linear, its
op, reads W at the speed of memory: csrc/cpu/few_rows_linear_kernel.h. fp32 sums, rounded once to x's dtype; no
autograd.
"""

import torch
import torch.nn.functional as F

from .backends import MAX_FEW_ROWS, choose, custom_op, observed


def _misfit(x, weight, bias) -> str:
    """Why the CPU kernel does not take these, or the empty string."""
    if x.shape[-1] == 0:
        return "no inputs"
    if x.numel() > MAX_FEW_ROWS * x.shape[-1]:
        return f"more than {MAX_FEW_ROWS} rows"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"weight or bias is not {x.dtype}, as x"
    if weight.is_contiguous() and (bias is None or bias.is_contiguous()):
        return ""
    return "weight or bias is not contiguous"


@custom_op("gptdist::few_rows_linear")
def _few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if choose("few_rows_linear", x.device, x.dtype, cpu_misfit=_misfit(x, weight, bias)).backend == "cpu":
        return torch.ops.gptdist_c.few_rows_linear(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


@_few_rows_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear: x (..., in), weight (out, in), bias (out,) -> (..., out).

    Where gradients are off, outside of autocast and torch.compile, up to 8 rows of x on a CPU take the kernel.
    """
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.numel() > MAX_FEW_ROWS * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
        or observed((x, weight, bias))
    ):
        return F.linear(x, weight, bias)
    return _few_rows_linear.run(x, weight, bias)
