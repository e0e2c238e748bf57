"""grad_norm: the reference and every instruction set of the C++ kernel against float64; determinism."""

import pytest
import torch

from gptdist.ops import backends, grad_norm

needs_library = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CHUNK, PIECE = 1 << 16, 1024  # csrc/cpu/grad_norm.h, grad_norm.cpp


def exact_norm(tensors):
    return sum(x.double().square().sum() for x in tensors).sqrt()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP16,), (FP64,), (BF16, FP32, FP16), (FP32, FP64)], ids=str)
def test_equals_the_float64_norm(dtypes):
    torch.manual_seed(0)
    shapes = [(3, 5), (4096,), (10000, 7), (), (0,), (PIECE - 1,), (CHUNK,), (CHUNK + 31,), (1,)]
    tensors = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    norm = grad_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), exact_norm(tensors), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [*range(1, 70), PIECE + 1, PIECE + 33])
def test_every_element_counts_once(size):
    x = torch.arange(1.0, size + 1).bfloat16()
    torch.testing.assert_close(grad_norm([x]).double(), exact_norm([x]), rtol=1e-7, atol=0)


@pytest.mark.usefixtures("backend")
def test_grouping_does_not_matter():
    x = torch.randn(5 * 4096)
    assert grad_norm([x]).item() == grad_norm(list(x.split(4096))).item()


@pytest.mark.usefixtures("backend")
def test_accurate_for_many_elements():
    x = torch.full((1 << 22,), 0.1)  # a running fp32 sum would lose digits here
    torch.testing.assert_close(grad_norm([x]).double(), x.double().norm(), rtol=1e-6, atol=0)


@needs_library
def test_bits_do_not_depend_on_the_number_of_threads():
    tensors = [torch.randn(CHUNK * 7 + 5), torch.randn(3), torch.randn(700, 530)]
    threads, norms = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.append(grad_norm(tensors).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


@pytest.mark.usefixtures("backend")
def test_empty_list_nan_and_non_contiguous():
    assert grad_norm([]).item() == 0.0
    assert grad_norm([torch.ones(0), torch.ones(0, 3)]).item() == 0.0
    assert grad_norm([torch.ones(3), torch.tensor([float("nan")])]).isnan()
    assert grad_norm([torch.tensor([float("inf")])]).isinf()
    x = torch.randn(30, 400)
    torch.testing.assert_close(grad_norm([x.t()]), x.norm())
    assert not grad_norm([torch.ones(3, requires_grad=True)]).requires_grad


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="expected one device"):
        grad_norm([torch.ones(1), torch.ones(1, device="meta")])


@needs_library
@pytest.mark.parametrize(("tensors", "message"), [
    ([torch.ones(1), torch.ones(2).double()], r"tensors\[1\] must be float32, bfloat16 or float16"),
    ([torch.ones(8)[::2]], r"tensors\[0\] must be contiguous"),
])
def test_library_refuses_what_it_cannot_read(tensors, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gptdist_c.grad_norm(tensors)
