"""dropout: its mask, its gradient, and that it depends on nothing but its arguments."""

import re

import pytest
import torch

from gptdist.ops import backends, dropout, dropout_key

compiled = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")
C = torch.ops.gptdist_c
KEY = dropout_key(1, 2)
IDS = torch.tensor([40, 7, 9])


def test_values_and_gradient_share_the_mask():
    x = torch.randn(3, 10, 17, requires_grad=True)
    y = dropout(x, 0.4, key=KEY, sample_ids=IDS, site=3)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.6, 0.0))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, kept / 0.6)


def test_mask_does_not_depend_on_the_batch_or_on_where_a_sequence_is_cut():
    x = torch.ones(3, 10, 17)
    whole = dropout(x, 0.4, key=KEY, sample_ids=IDS, site=3)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(dropout(x[order], 0.4, key=KEY, sample_ids=IDS[order], site=3), whole[order])
    torch.testing.assert_close(dropout(x[:, 6:], 0.4, key=KEY, sample_ids=IDS, site=3, row_offset=6), whole[:, 6:])


@pytest.mark.parametrize(
    "change", [{"site": 4}, {"key": dropout_key(1, 3)}, {"sample_ids": IDS + 1}, {"row_offset": 1}]
)
def test_mask_depends_on_every_argument(change):
    x = torch.ones(3, 10, 17)
    arguments = {"key": KEY, "sample_ids": IDS, "site": 3}
    assert not torch.equal(dropout(x, 0.4, **arguments), dropout(x, 0.4, **{**arguments, **change}))


def test_p_zero_is_the_identity_and_needs_no_key():
    x = torch.randn(2, 3, 4)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, "expected 0 <= p < 1"),
        ({"key": None}, "needs key"),
        ({"sample_ids": IDS[:2]}, r"expected int64 \(3,\)"),
        ({"site": 1 << 16}, "site is 65536"),
        ({"key": torch.tensor(1.0)}, "expected an int64 scalar"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {"p": 0.1, "key": KEY, "sample_ids": IDS, "site": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(3, 4, 5), **arguments)


@compiled
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 3, 256), (2, 3, 261), (2, 40, 1030)])
def test_the_kernel_gives_the_bits_of_the_reference(shape, dtype, level, monkeypatch):
    best = C.cpu_isa(-1)
    if C.cpu_isa(level) != level:
        pytest.skip(f"this processor has no level {level}")
    x = torch.randn(shape).to(dtype)
    x[0, 0, 0] = torch.nan
    arguments = {"key": KEY, "sample_ids": torch.tensor([5, (1 << 32) + 7, -3])[: shape[0]], "site": 65535}
    try:
        assert backends.choose("dropout", x.device, dtype).backend == "cpu"
        got = dropout(x, 0.3, row_offset=70_000, **arguments)
    finally:
        C.cpu_isa(best)
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    torch.testing.assert_close(got, dropout(x, 0.3, row_offset=70_000, **arguments), atol=0, rtol=0, equal_nan=True)


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 5)}, r"x has shape (4, 5), expected (B, T, C)"),
        ({"x": torch.ones(3, 4, 5).double()}, "x is float64, expected float32 or bfloat16"),
        ({"x": torch.ones(3, 5, 4).mT}, "x is not contiguous"),
        ({"p": 1.0}, "probability is 1, expected 0 <= p < 1"),
        ({"key": KEY.int()}, "key is int32, expected int64"),
        ({"ids": IDS[:2]}, "sample_ids has 2 elements, expected B=3"),
        ({"site": 1 << 16}, "site is 65536"),
        ({"row_offset": -1}, "row_offset is -1"),
    ],
)
def test_the_kernel_names_what_does_not_fit(change, message):
    arguments = {"x": torch.ones(3, 4, 5), "p": 0.1, "key": KEY, "ids": IDS, "site": 0, "row_offset": 0} | change
    with pytest.raises(RuntimeError, match=re.escape(message)):
        C.dropout(*arguments.values())
