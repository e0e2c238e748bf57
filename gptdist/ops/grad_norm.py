"""grad_norm: the L2 norm of a list of tensors, in one pass.

Small pieces are summed in fp32, pieces and tensors in fp64, so that the result depends neither on how tensors are
grouped nor (beyond one rounding) on their number. The pieces of the reference are BLOCK elements.
Reads every element once, writes a scalar. No autograd.
"""

from collections.abc import Sequence

import torch

from .backends import choose, custom_op, kernels

BLOCK = 256  # elements summed in fp32; at 4096 equal summands a norm was off by 2e-6, at 256 by less than 1e-7


def _norms(x: torch.Tensor) -> list[torch.Tensor]:
    """fp64 norms of x's whole blocks and of what is left beyond them."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=-1, dtype=dtype)
    norms = [torch.linalg.vector_norm(blocks, dtype=torch.float64)]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).double())
    return norms


def _backend(tensors):
    """The backend that takes the tensors of all dtypes, else the reference."""
    found = {choose("grad_norm", tensors[0].device, dtype).backend for dtype in {x.dtype for x in tensors}}
    return found.pop() if len(found) == 1 else "reference"


@custom_op("gptdist::grad_norm")
def _grad_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    backend = _backend(tensors)
    if backend != "reference":
        return kernels(backend).grad_norm([x.contiguous() for x in tensors])
    return torch.linalg.vector_norm(torch.stack([norm for x in tensors for norm in _norms(x)])).float()


@_grad_norm.register_fake
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


def grad_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """sqrt(sum of squares over all tensors), an fp32 scalar on their device; zero for an empty list.

    Tensors may differ in shape and dtype, not in device. They are local tensors: a caller that shards squares and
    reduces the result.
    """
    tensors = [x.detach() for x in tensors]
    if not tensors:
        return torch.zeros(())
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"grad_norm: tensors are on {', '.join(sorted(devices))}, expected one device")
    return _grad_norm(tensors)
