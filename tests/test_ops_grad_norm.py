"""grad_norm against float64."""

import pytest
import torch

from gptdist.ops import grad_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_float64_norm(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(3, 5), (4096,), (10000, 7), (), (0,)]]
    expected = sum(x.double().square().sum() for x in tensors).sqrt()
    norm = grad_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


def test_grouping_does_not_matter():
    x = torch.randn(5 * 4096)
    assert grad_norm([x]).item() == grad_norm(list(x.split(4096))).item()


def test_accurate_for_many_elements():
    x = torch.full((1 << 22,), 0.1)  # a running fp32 sum would lose digits here
    torch.testing.assert_close(grad_norm([x]).double(), x.double().norm(), rtol=1e-6, atol=0)


def test_empty_list_nan_and_non_contiguous():
    assert grad_norm([]).item() == 0.0
    assert grad_norm([torch.ones(3), torch.tensor([float("nan")])]).isnan()
    assert grad_norm([torch.tensor([float("inf")])]).isinf()
    x = torch.randn(30, 400)
    torch.testing.assert_close(grad_norm([x.t()]), x.norm())
    assert not grad_norm([torch.ones(3, requires_grad=True)]).requires_grad


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="expected one device"):
        grad_norm([torch.ones(1), torch.ones(1, device="meta")])
