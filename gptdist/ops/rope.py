"""rope: rotary position embedding of the queries and keys inside a packed qkv.

Pairs are (i, i + D/2), the half-split layout of GPT-NeoX and Llama. With angle a = position * theta^(-2i/D):

    y_i       = x_i cos a - x_{i+D/2} sin a
    y_{i+D/2} = x_{i+D/2} cos a + x_i sin a

The backward is the rotation by -a. Reads qkv and the tables, writes one new qkv (values are copied).
Source: Su et al., "RoFormer" (2021), section 3.2.
"""

import torch

from .backends import compute_dtype, custom_op


@custom_op("gptdist::rope")
def _rope(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    half = qkv.shape[-1] // 2
    compute = compute_dtype(qkv.dtype)
    # (T, D/2) or (B, T, D/2) -> (..., T, 1, 1, D/2), against (B, T, Hkv, G+1, D/2)
    c = cos.to(compute)[..., None, None, :]
    s = sin.to(compute)[..., None, None, :]
    if inverse:
        s = -s
    a = qkv[..., :-1, :half].to(compute)
    b = qkv[..., :-1, half:].to(compute)
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    out[..., :-1, :half] = a * c - b * s
    out[..., :-1, half:] = b * c + a * s
    out[..., -1, :] = qkv[..., -1, :]
    return out


@_rope.register_fake
def _(qkv, cos, sin, inverse):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dout):
    cos, sin = ctx.saved_tensors
    return _rope(dout, cos, sin, not ctx.inverse), None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


def rope(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the G queries and the key of every kv head; the value (last slot) is copied.

    qkv: (B, T, Hkv, G+2, D), D even. cos, sin: (T, D/2) or (B, T, D/2), from `rope_tables`.
    """
    if qkv.dim() != 5 or qkv.shape[-1] % 2:
        raise ValueError(f"rope: qkv has shape {tuple(qkv.shape)}, expected (B, T, Hkv, G+2, D) with an even D")
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[-1]
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((T, D // 2), (B, T, D // 2)):
            raise ValueError(
                f"rope: {name} has shape {tuple(table.shape)}, expected ({T}, {D // 2}) or ({B}, {T}, {D // 2})"
            )
    return _rope(qkv, cos, sin, False)


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (..., head_dim/2) fp32 of positions (...); angles in fp64, as fp32 is off by 0.004 at 100 000."""
    if head_dim % 2:
        raise ValueError(f"rope_tables: head_dim is {head_dim}, expected an even number")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[..., None] * theta**-exponent
    return angles.cos().float(), angles.sin().float()
