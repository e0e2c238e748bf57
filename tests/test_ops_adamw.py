"""adamw_: the reference and every instruction set of the C++ kernel against float64; what it refuses; determinism."""

import re

import pytest
import torch

from gptdist.ops import adamw_, backends
from tests import adamw_cases
from tests.adamw_cases import BF16, FP16, FP32, OPTIONS

needs_library = pytest.mark.skipif(bool(backends.library_problem()), reason=backends.library_problem() or "built")
CHUNK = 1 << 14  # csrc/cpu/adamw.h
SHAPES = [(3, 5), (), (0,), (1,), (CHUNK - 1,), (CHUNK,), (2, CHUNK + 33), (16, 64)]


def step(case):
    """The case after a step; the case is left as it was."""
    after = case.clone()
    after.run()
    return after


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shadow_dtypes", [(), (BF16,), (FP16, BF16)], ids=["none", "bf16", "mixed"])
@pytest.mark.parametrize("grad_dtypes", [(FP32,), (BF16,), (FP16,), (BF16, FP32, FP16)],
                         ids=["fp32", "bf16", "fp16", "mixed"])
def test_equals_float64(grad_dtypes, shadow_dtypes):
    case = adamw_cases.make(SHAPES, grad_dtypes, shadow_dtypes)
    adamw_cases.check(case, step(case))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", [
    dict(weight_decay=0.0), dict(step=1), dict(step=10**6), dict(beta1=0.0), dict(beta2=0.999, step=2), dict(eps=1e-2),
    dict(scaled=False), dict(offset=1)], ids=str)
def test_options(options):
    case = adamw_cases.make([*SHAPES[:4], (77,)], shadow_dtypes=(BF16,), **options)
    adamw_cases.check(case, step(case))


@pytest.mark.usefixtures("backend")
def test_autograd_knows_what_was_changed():
    case = adamw_cases.make(SHAPES[:2])
    weight = case.params[0].requires_grad_()
    loss = weight.square().sum()
    case.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("backend")
def test_a_thousand_small_tensors():
    case = adamw_cases.make([(i % 7, 3) for i in range(1000)], (BF16, FP32))
    adamw_cases.check(case, step(case))


@pytest.mark.usefixtures("backend")
def test_nan_and_inf_spread_as_in_torch():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0])
    p, g, m, v = torch.cartesian_prod(special, special, special, special.abs()).unbind(1)
    reference = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    optimizer.state[reference] = dict(step=torch.tensor(2.0), exp_avg=m.clone(), exp_avg_sq=v.clone())
    reference.grad = g.clone()
    optimizer.step()
    lists = [[t.clone()] for t in (p, g, m, v, p.to(BF16))]
    case = adamw_cases.Case(*lists, None, OPTIONS | dict(lr=0.1))
    case.run()
    torch.testing.assert_close(case.params[0], reference.detach(), equal_nan=True)
    for got, name in ((case.exp_avg, "exp_avg"), (case.exp_avg_sq, "exp_avg_sq")):
        torch.testing.assert_close(got[0], optimizer.state[reference][name], equal_nan=True)
    torch.testing.assert_close(case.shadows[0], case.params[0].to(BF16), equal_nan=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_16_bit_gradient_is_read_right(dtype):
    """With beta1 = 0 and lr = 0 exp_avg is the gradient itself."""
    grads = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    p, v = torch.zeros(1 << 16), torch.zeros(1 << 16)
    m = torch.zeros(1 << 16)
    adamw_([p], [grads], [m], [v], **OPTIONS | dict(lr=0.0, beta1=0.0))
    finite = grads.isfinite()
    assert torch.equal(m[finite], grads[finite].float())
    assert not m[~finite].isfinite().any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_shadows_are_rounded_to_nearest_even(dtype):
    """Around every value of the dtype: itself, the middle to its neighbour, and the floats on either side of it."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middles = values.view(torch.int32) + (1 << (15 if dtype == BF16 else 12))
    around = torch.cat([values, *((middles + i).view(FP32) for i in (-1, 0, 1)), torch.logspace(-9, -4, 999)])
    shadow = torch.empty(around.shape, dtype=dtype)
    zeros = [torch.zeros(around.shape) for _ in range(3)]
    params = around.clone()
    adamw_([params], [zeros[0]], [zeros[1]], [zeros[2]], shadows=[shadow], **OPTIONS | dict(lr=0.0))
    wanted = around.to(dtype)
    assert torch.equal(shadow.isnan(), wanted.isnan())
    assert torch.equal(shadow.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


def test_float64_is_computed_in_float64():
    p, g = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    reference = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [torch.zeros_like(p) for _ in range(2)]
    for i in range(1, 4):
        reference.grad = g * i
        optimizer.step()
        adamw_([p], [g * i], [moments[0]], [moments[1]], **OPTIONS | dict(lr=0.1, step=i))
    torch.testing.assert_close(p, reference.detach(), rtol=1e-13, atol=1e-14)


@needs_library
def test_bits_do_not_depend_on_the_number_of_threads():
    case = adamw_cases.make([(CHUNK * 9 + 5,), (3,), (700, 530)], (BF16, FP32), (BF16,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step(case).outputs())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_are_left_alone_and_versions_count():
    case = adamw_cases.make([(4, 4)])
    after = case.clone()
    after.params[0].requires_grad_()
    version = after.params[0]._version
    after.run()
    assert torch.equal(after.grads[0], case.grads[0])
    assert after.params[0]._version > version


def test_an_empty_list_is_nothing_to_do():
    adamw_([], [], [], [], **OPTIONS)
    adamw_([], [], [], [], shadows=[], **OPTIONS)


def changed(**lists):
    def arguments():
        case = adamw_cases.make([(2, 3), (4,)], shadow_dtypes=(BF16,))
        tensors = dict(params=case.params, grads=case.grads, exp_avg=case.exp_avg, exp_avg_sq=case.exp_avg_sq,
                       shadows=case.shadows, grad_scale=case.grad_scale)
        for name, value in lists.items():
            if name in tensors and name != "grad_scale":
                tensors[name] = [*tensors[name][:1], *value]
            elif name in tensors:
                tensors[name] = value
        return tensors | OPTIONS | {name: value for name, value in lists.items() if name not in tensors}

    return arguments


X = torch.zeros(4)
REFUSED = [
    (changed(step=0), "step is 0, expected at least 1"),
    (changed(grads=[]), "grads has 1 tensors, expected 2 as params"),
    (changed(shadows=[X.bfloat16()] * 2), "shadows has 3 tensors, expected 2 as params"),
    (changed(params=[X.bfloat16()]), "params[1] is torch.bfloat16, expected torch.float32"),
    (changed(params=[X.double()]), "params[1] is torch.float64, expected torch.float32"),
    (changed(grads=[X.double()]), "grads[1] is torch.float64, expected torch.float32 or torch.bfloat16 or"),
    (changed(exp_avg=[X.half()]), "exp_avg[1] is torch.float16, expected torch.float32"),
    (changed(exp_avg_sq=[X[:3]]), "exp_avg_sq[1] has shape (3,), expected (4,)"),
    (changed(shadows=[X]), "shadows[1] is torch.float32, expected torch.bfloat16 or torch.float16"),
    (changed(grads=[torch.zeros(8)[::2]]), "grads[1] is not contiguous, with strides (2,)"),
    (changed(exp_avg=[X.to("meta")]), "exp_avg[1] is on meta, expected cpu as params[0]"),
    (changed(grad_scale=torch.ones(1)), "grad_scale has shape (1,), expected ()"),
    (changed(grad_scale=torch.tensor(1.0).double()), "grad_scale is torch.float64, expected torch.float32"),
    (changed(grad_scale=torch.tensor(1.0, device="meta")), "grad_scale is on meta, expected cpu as params[0]"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"adamw_: {message}")):
        adamw_(**arguments())


@needs_library
@pytest.mark.parametrize(("change", "message"), [
    (dict(grads=[]), "one tensor for each of the 1 params"),
    (dict(params=[X.double()]), r"params\[0\] must be float32"),
    (dict(grads=[X.double()]), r"grads\[0\] must be float32, bfloat16 or float16"),
    (dict(exp_avg=[torch.zeros(8)[::2]]), r"exp_avg\[0\] must be contiguous"),
    (dict(exp_avg_sq=[X[:3]]), r"exp_avg_sq\[0\] has 3 elements, expected 4 as params\[0\]"),
    (dict(shadows=[X]), r"shadows\[0\] must be bfloat16 or float16"),
    (dict(grad_scale=X), "grad_scale must be one float32"),
    (dict(step=0), "step is 0"),
])
def test_library_refuses_what_it_cannot_read(change, message):
    arguments = dict(params=[X.clone()], grads=[X], exp_avg=[X.clone()], exp_avg_sq=[X.clone()], shadows=[],
                     grad_scale=None) | OPTIONS | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gptdist_c.adamw_(**arguments)
