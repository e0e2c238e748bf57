"""rope against complex multiplication; its backward; its tables."""

import pytest
import torch

from gptdist.ops import rope, rope_tables


def by_complex_numbers(x, positions, theta):
    """Rotate x (..., T, D) as D/2 complex numbers x_i + j x_{i + D/2}."""
    D = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * positions[:, None] * frequencies)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_equals_complex_rotation():
    qkv = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64)
    positions = torch.arange(7) + 5
    out = rope(qkv, *rope_tables(positions, 8, 500.0))
    heads_first = qkv.permute(0, 2, 3, 1, 4)  # (B, Hkv, G+2, T, D)
    expected = by_complex_numbers(heads_first, positions, 500.0).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(out[..., :-1, :], expected[..., :-1, :], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[..., -1, :], qkv[..., -1, :], atol=0, rtol=0)


def test_positions_may_differ_by_row():
    qkv = torch.randn(2, 4, 1, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3], [9, 10, 11, 12]])
    out = rope(qkv, *rope_tables(positions, 8))
    for b in range(2):
        torch.testing.assert_close(out[b : b + 1], rope(qkv[b : b + 1], *rope_tables(positions[b], 8)))


def test_gradcheck():
    qkv = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_tables(torch.arange(3), 4)
    torch.autograd.gradcheck(lambda x: rope(x, cos, sin), qkv)
    torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin), qkv)


def test_bf16_keeps_its_dtype():
    qkv = torch.randn(1, 3, 1, 3, 4).bfloat16()
    cos, sin = rope_tables(torch.arange(3), 4)
    out = rope(qkv, cos, sin)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), rope(qkv.float(), cos, sin), atol=2e-2, rtol=1e-2)


def test_wrong_arguments_are_named():
    cos, sin = rope_tables(torch.arange(3), 4)
    with pytest.raises(ValueError, match="even D"):
        rope(torch.ones(1, 3, 1, 3, 5), cos, sin)
    with pytest.raises(ValueError, match="sin has shape"):
        rope(torch.ones(1, 3, 1, 3, 4), cos, sin[:2])
    with pytest.raises(ValueError, match="head_dim is 5"):
        rope_tables(torch.arange(3), 5)
