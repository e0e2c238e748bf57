"""rope: rotary position embedding of the queries and keys inside a packed qkv.

Pairs are (i, i + D/2), the half-split layout of GPT-NeoX and Llama. With angle a = position * theta^(-2i/D):

    y_i       = x_i cos a - x_{i+D/2} sin a
    y_{i+D/2} = x_{i+D/2} cos a + x_i sin a

The backward is the rotation by -a. Reads qkv and the tables, writes one new qkv (finite values are copied).
Source: Su et al., "RoFormer" (2021), section 3.2.
"""

import torch

from .backends import compute_dtype, custom_op


@custom_op("gptdist::rope")
def _rope(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    (heads, slots), half = qkv.shape[2:4], qkv.shape[-1] // 2
    x = qkv.to(compute_dtype(qkv.dtype))
    sin = -sin if inverse else sin
    # Tables as wide as a token's qkv, so that passes over memory have long rows: half the time of passes over halves of
    # heads. A value is itself times 1 plus its other half times 0.
    c = x.new_ones(*cos.shape[:-1], heads, slots, 2 * half)  # (T, Hkv, G+2, D) or (B, T, Hkv, G+2, D)
    s = torch.zeros_like(c)
    c[..., :-1, :] = torch.cat([cos, cos], dim=-1)[..., None, None, :]
    s[..., :-1, :] = torch.cat([-sin, sin], dim=-1)[..., None, None, :]
    other = torch.empty_like(x, memory_format=torch.contiguous_format)
    other[..., :half] = x[..., half:]
    other[..., half:] = x[..., :half]
    return other.mul_(s).addcmul_(x, c).to(qkv.dtype)


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
