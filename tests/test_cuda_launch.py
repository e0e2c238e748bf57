"""The CUDA ops without a GPU: what they refuse, what they launch, and a model's training step through their kernels.

That the kernels compute the right numbers, and touch no memory that is not theirs, is shown in test_cuda_kernels.py.
"""

import re
from pathlib import Path

import pytest
import torch

from gptdist import ops
from gptdist.config import ModelConfig
from gptdist.model import Dropout, LanguageModel
from gptdist.ops import backends
from gptdist.parallel.init import fill_initial_values
from tests import cuda_vm

CSRC = Path(__file__).resolve().parent.parent / "csrc"
VM = torch.ops.gptdist_vm
BF16 = torch.bfloat16


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


# what the ops refuse

X, W = randn(4, 64), randn(64)
ROW = torch.ones(4)
TARGETS = torch.tensor([1, 2, -100, 4])
KEY = ops.dropout_key(1, 2)
X3, IDS = randn(2, 5, 64), torch.arange(2)
STRIDED = randn(64, 4).t()  # (4, 64), columns contiguous
MISALIGNED = randn(4 * 64 + 1)[1:].view(4, 64)
ELSEWHERE = "another kind of device, expected cpu"


def norm(x=X, weight=W, bias=None):
    return VM.layer_norm_fwd(x, weight, bias, 1e-5)


def residual_norm(x=X, residual=X, weight=W):
    return VM.residual_layer_norm_fwd(x, residual, weight, None, 1e-5)


def norm_backward(dy=X, x=X, mean=ROW, rstd=ROW, weight=W):
    return VM.layer_norm_bwd(dy, x, mean, rstd, weight, True)


def residual_norm_backward(dy=X, ds=X, s=X):
    return VM.residual_layer_norm_bwd(dy, ds, s, ROW, ROW, W, True)


def gelu(x=X, bias=None):
    return VM.bias_gelu_fwd(x, bias)


def gelu_backward(dy=X, x=X, bias=None):
    return VM.bias_gelu_bwd(dy, x, bias)


def entropy(logits=X, targets=TARGETS):
    return VM.cross_entropy_fwd(logits, targets, -100)


def entropy_backward(dloss=ROW, logits=X, targets=TARGETS, lse=ROW):
    return VM.cross_entropy_bwd(dloss, logits, targets, lse, -100)


def entropy_in_place(logits=X, dloss=ROW):
    return VM.cross_entropy_bwd_(dloss, logits, TARGETS, ROW, -100)


def drop(x=X3, p=0.1, key=KEY, ids=IDS, site=0, row_offset=0):
    return VM.dropout(x, p, key, ids, site, row_offset)


def adamw(params=None, grads=None, exp_avg=None, exp_avg_sq=None, shadows=(), grad_scale=None, step=1):
    """A step of two tensors; what is given is the second one."""
    lists = [[torch.ones(3), torch.ones(4) if given is None else given]
             for given in (params, grads, exp_avg, exp_avg_sq)]
    return VM.adamw_(*lists, list(shadows), grad_scale, 1e-3, 0.9, 0.95, 1e-8, 0.1, step)


def grad_norm(tensors):
    return VM.grad_norm(tensors)


LIST_REFUSED = [
    (adamw, {"params": torch.ones(4).double()}, "adamw_: params[1] is float64, expected float32"),
    (adamw, {"params": torch.ones(4, device="meta")}, f"adamw_: params[1] is on {ELSEWHERE}"),
    (adamw, {"grads": torch.ones(4).double()}, "adamw_: grads[1] is float64, expected float32, bfloat16 or float16"),
    (adamw, {"grads": torch.ones(8)[::2]}, "adamw_: grads[1] is not contiguous"),
    (adamw, {"exp_avg": torch.ones(5)}, "adamw_: exp_avg[1] has 5 elements, expected params[1]=4"),
    (adamw, {"exp_avg_sq": torch.ones(4).half()}, "adamw_: exp_avg_sq[1] is float16, expected float32"),
    (adamw, {"shadows": [ROW.half()]}, "2 exp_avg_sq and 1 shadows, expected 2 of each (or no shadows)"),
    (adamw, {"shadows": [torch.ones(3).half(), ROW]}, "adamw_: shadows[1] is float32, expected bfloat16 or float16"),
    (adamw, {"grad_scale": ROW}, "adamw_: grad_scale has 4 elements, expected one=1"),
    (adamw, {"grad_scale": torch.ones(1).double()}, "adamw_: grad_scale is float64, expected float32"),
    (adamw, {"step": 0}, "adamw_: step is 0, expected at least 1"),
    (grad_norm, {"tensors": []}, "grad_norm: the list is empty"),
    (grad_norm, {"tensors": [ROW, ROW.double()]}, "grad_norm: tensors[1] is float64, expected float32,"),
    (grad_norm, {"tensors": [ROW, ROW.to("meta")]}, f"grad_norm: tensors[1] is on {ELSEWHERE}"),
    (grad_norm, {"tensors": [X.t()]}, "grad_norm: tensors[0] is not contiguous"),
]

REFUSED = [
    *LIST_REFUSED,
    (norm, {"x": STRIDED}, "layer_norm: x is not contiguous"),
    (norm, {"x": MISALIGNED}, "layer_norm: x does not start at a multiple of 16 bytes"),
    (norm, {"x": X.double()}, "layer_norm: x is float64, expected float32, bfloat16 or float16"),
    (norm, {"x": randn(4, 60), "weight": randn(60)}, "x has C=60, expected a multiple of 8 from 64 to 16384"),
    (norm, {"x": randn(4, 56), "weight": randn(56)}, "x has C=56, expected a multiple of 8 from 64 to 16384"),
    (norm, {"x": randn(1, 16392)}, "x has C=16392, expected"),
    (norm, {"x": torch.tensor(1.0)}, "layer_norm: x is a scalar"),
    (norm, {"weight": randn(72)}, "layer_norm: weight has 72 elements, expected C=64"),
    (norm, {"weight": W.to(BF16)}, "layer_norm: weight is bfloat16, expected x's dtype or float32"),
    (norm, {"weight": W.half(), "x": X.to(BF16)}, "layer_norm: weight is float16, expected"),
    (norm, {"weight": W.to("meta")}, f"layer_norm: weight is on {ELSEWHERE}"),
    (norm, {"bias": randn(8)}, "layer_norm: bias has 8 elements, expected C=64"),
    (norm, {"bias": W.to("meta")}, f"layer_norm: bias is on {ELSEWHERE}"),
    (norm, {"x": X.to(BF16), "bias": W.to(BF16)}, "layer_norm: bias is bfloat16, expected float32 as weight"),
    (norm, {"x": X.to("meta")}, "layer_norm: the first tensor is on another kind of device"),
    (residual_norm, {"residual": X[:2]}, r"residual has shape (2, 64), expected (4, 64) as x"),
    (residual_norm, {"residual": X.half()}, "residual_layer_norm: residual is float16, expected x's dtype or float32"),
    (residual_norm, {"residual": STRIDED}, "residual_layer_norm: residual is not contiguous"),
    (norm_backward, {"x": X[:2]}, "layer_norm: x has shape (2, 64), expected (4, 64) as dy"),
    (norm_backward, {"x": X.to(BF16)}, "layer_norm: x is bfloat16, expected dy's dtype or float32"),
    (norm_backward, {"mean": ROW[:3]}, "layer_norm: mean has 3 elements, expected rows=4"),
    (norm_backward, {"rstd": ROW.double()}, "layer_norm: rstd is float64, expected float32"),
    (norm_backward, {"dy": STRIDED}, "layer_norm: dy is not contiguous"),
    (residual_norm_backward, {"ds": X.to(BF16)}, "residual_layer_norm: ds is bfloat16, expected float32 as sum"),
    (residual_norm_backward, {"ds": X[:1]}, "residual_layer_norm: ds has shape (1, 64), expected (4, 64) as sum"),
    (gelu, {"x": randn(4, 60)}, "bias_gelu: x has C=60, expected a multiple of 8"),
    (gelu, {"x": STRIDED}, "bias_gelu: x is not contiguous"),
    (gelu, {"bias": randn(8)}, "bias_gelu: bias has 8 elements, expected C=64"),
    (gelu, {"x": X.half(), "bias": W.to(BF16)}, "bias_gelu: bias is bfloat16, expected x's dtype or float32"),
    (gelu_backward, {"dy": X.to(BF16)}, "bias_gelu: dy is bfloat16, expected float32 as x"),
    (gelu_backward, {"dy": X[:2]}, "bias_gelu: dy has shape (2, 64), expected (4, 64) as x"),
    (gelu_backward, {"x": MISALIGNED}, "bias_gelu: x does not start at a multiple of 16 bytes"),
    (entropy, {"logits": W}, "cross_entropy: logits has shape (64), expected (N, V)"),
    (entropy, {"logits": randn(4, 0)}, "cross_entropy: logits have V=0"),
    (entropy, {"logits": STRIDED}, "cross_entropy: logits has rows that are not contiguous"),
    (entropy, {"logits": W.expand(4, 64)}, "cross_entropy: logits has rows that overlap"),
    (entropy, {"logits": X.double()}, "cross_entropy: logits is float64"),
    (entropy, {"targets": TARGETS[:3]}, "cross_entropy: targets has 3 elements, expected N=4"),
    (entropy, {"targets": TARGETS.int()}, "cross_entropy: targets is int32, expected int64"),
    (entropy_backward, {"logits": randn(4, 72)[:, :64]}, "cross_entropy: logits is not contiguous"),
    (entropy_backward, {"dloss": ROW.to(BF16)}, "cross_entropy: dloss is bfloat16, expected float32"),
    (entropy_backward, {"dloss": torch.ones(1).expand(4)}, "cross_entropy: dloss is not contiguous"),
    (entropy_backward, {"lse": ROW[:2]}, "cross_entropy: lse has 2 elements, expected N=4"),
    (entropy_in_place, {"logits": MISALIGNED}, "cross_entropy: logits does not start at a multiple of 16 bytes"),
    (drop, {"x": X}, "dropout: x has shape (4, 64), expected (B, T, C)"),
    (drop, {"p": 1.0}, "dropout: probability is 1, expected 0 <= p < 1"),
    (drop, {"key": KEY.to("meta")}, f"dropout: key is on {ELSEWHERE}"),
    (drop, {"key": KEY.int()}, "dropout: key is int32, expected int64"),
    (drop, {"key": IDS}, "dropout: key has 2 elements"),
    (drop, {"ids": IDS[:1]}, "dropout: sample_ids has 1 elements, expected B=2"),
    (drop, {"site": 1 << 16}, "dropout: site is 65536, expected 0 <= site < 65536"),
    (drop, {"row_offset": -1}, "dropout: row_offset is -1"),
]

Q, CACHE = randn(2, 3, 1, 2, 64, dtype=BF16), randn(5, 4, 1, 64, dtype=BF16)
TABLE, LENGTHS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([0, 5])
HEADS_64 = randn(2, 3, 2, 1, 64, dtype=BF16)


def decode(q=Q, k_cache=CACHE, v_cache=CACHE, table=TABLE, lengths=LENGTHS):
    return VM.decode_attention(q, k_cache, v_cache, table, lengths)


DECODE_REFUSED = [
    (decode, {"q": Q[0]}, "decode_attention: q has shape (3, 1, 2, 64), expected (B, Tq, Hkv, G, D)"),
    (decode, {"q": Q.to("meta")}, "decode_attention: the first tensor is on another kind of device"),
    (decode, {"q": Q.float()}, "decode_attention: q is float32, expected bfloat16 or float16"),
    (decode, {"q": Q[..., :32]}, "decode_attention: q has D=32, expected 64 or 128"),
    (decode, {"q": Q[:, :, :, :0]}, "decode_attention: q has G=0, expected at least 1"),
    (decode, {"q": HEADS_64}, "k_cache has shape (5, 4, 1, 64), expected (pages, page, 2, 64)"),
    (decode, {"q": randn(2, 3, 1, 2, 68, dtype=BF16)[..., :64]}, "q has a stride of 68 elements, expected a multiple"),
    (decode, {"q": randn(2, 3, 1, 64, 2, dtype=BF16).mT}, "decode_attention: q has rows that are not contiguous"),
    (decode, {"q": randn(769, dtype=BF16)[1:].view(2, 3, 1, 2, 64)}, "q does not start at a multiple of 16 bytes"),
    (decode, {"k_cache": CACHE[0]}, "k_cache has shape (4, 1, 64), expected (pages, page, Hkv, D)"),
    (decode, {"k_cache": CACHE[:, :3]}, "decode_attention: k_cache has pages of 3 positions, expected a power of two"),
    (decode, {"k_cache": CACHE[:, :0]}, "decode_attention: k_cache has pages of 0 positions, expected a power of two"),
    (decode, {"k_cache": CACHE[:0]}, "decode_attention: k_cache has 0 pages of 4, expected 1 to"),
    (decode, {"k_cache": CACHE.half()}, "decode_attention: k_cache is float16, expected bfloat16 as q"),
    (decode, {"k_cache": CACHE[:, :2], "v_cache": CACHE[:, :2]}, "decode_attention: k_cache is not contiguous"),
    (decode, {"v_cache": CACHE[:4]}, "v_cache has shape (4, 4, 1, 64), expected (5, 4, 1, 64) as k_cache"),
    (decode, {"v_cache": CACHE.half()}, "decode_attention: v_cache is float16, expected bfloat16 as q"),
    (decode, {"v_cache": CACHE.to("meta")}, f"decode_attention: v_cache is on {ELSEWHERE}"),
    (decode, {"table": TABLE[0]}, "decode_attention: block_table has shape (2), expected (B, P)"),
    (decode, {"table": TABLE[:1]}, "decode_attention: block_table has 2 elements, expected B*P=4"),
    (decode, {"table": TABLE.long()}, "decode_attention: block_table is int64, expected int32"),
    (decode, {"table": TABLE[:, :0]}, "3 queries, tables of 0 pages of 4, expected 1 to 1073741824 positions"),
    (decode, {"lengths": LENGTHS[:1]}, "decode_attention: lengths has 1 elements, expected B=2"),
    (decode, {"lengths": LENGTHS.int()}, "decode_attention: lengths is int32, expected int64"),
]
REFUSED += DECODE_REFUSED


@pytest.mark.parametrize(("op", "arguments", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_bad_arguments_are_named(device, op, arguments, message):
    with device.run() as log, pytest.raises(RuntimeError, match=re.escape(message)):
        op(**arguments)
    assert log.launches == []


# what they launch


def fold(device, halves, width):
    return device.plan("fold_partials", torch.float32, halves, width)


def planned(device, op, dtype, rows, width):
    """Arguments for a call of `op`, and the launches that the plan has for it."""
    x = randn(rows, width, dtype=dtype)
    vector, statistic = randn(width), torch.ones(rows)
    targets = torch.arange(rows) % width
    calls = {
        "layer_norm_fwd": ((x, vector, vector, 1e-5), ["layer_norm_forward"], 0),
        "residual_layer_norm_fwd": ((x, x, vector, None, 1e-5), ["layer_norm_forward"], 0),
        "layer_norm_bwd": ((x, x, statistic, statistic, vector, True), ["layer_norm_backward"], 2),
        "residual_layer_norm_bwd": ((x, x, x, statistic, statistic, vector, False), ["layer_norm_backward"], 2),
        "bias_gelu_fwd": ((x, vector), ["bias_gelu_forward"], 0),
        "bias_gelu_bwd": ((x, x, vector), ["bias_gelu_backward"], 1),
        "cross_entropy_fwd": ((x, targets, -100), ["cross_entropy_forward"], 0),
        "cross_entropy_bwd": ((statistic, x, targets, statistic, -100), ["cross_entropy_backward"], 0),
        "cross_entropy_bwd_": ((statistic, x, targets, statistic, -100), ["cross_entropy_backward"], 0),
    }
    arguments, launchers, halves = calls[op]
    plans = [device.plan(launcher, dtype, rows, width) for launcher in launchers]
    return arguments, plans + ([fold(device, halves, width)] if halves else [])


WIDTHS = {"layer_norm": (64, 768, 1032), "bias_gelu": (8, 264), "cross_entropy": (7, 300)}


@pytest.mark.parametrize("dtype", cuda_vm.DTYPES)
@pytest.mark.parametrize(
    "op",
    [
        "layer_norm_fwd",
        "layer_norm_bwd",
        "residual_layer_norm_fwd",
        "residual_layer_norm_bwd",
        "bias_gelu_fwd",
        "bias_gelu_bwd",
        "cross_entropy_fwd",
        "cross_entropy_bwd",
        "cross_entropy_bwd_",
    ],
)
def test_launches_are_those_of_the_plan(device, op, dtype):
    widths = next(widths for name, widths in WIDTHS.items() if name in op)
    for width in widths:
        for rows in (1, 9):
            arguments, plans = planned(device, op, dtype, rows, width)
            with device.run() as log:
                getattr(VM, op)(*arguments)
            assert len(log.launches) == len(plans)
            assert all(launch.follows(plan) for launch, plan in zip(log.launches, plans, strict=True)), (rows, width)


@pytest.mark.parametrize("channels", [64, 63])
def test_dropout_launches_are_those_of_the_plan(device, channels):
    x = randn(2, 5, channels)
    with device.run() as log:
        drop(x)
    (launch,) = log.launches
    assert launch.follows(device.plan("dropout", x.dtype, 5, channels, batch=2))


@pytest.mark.parametrize("size", [1, 8192, 8193, 16385])
def test_launches_of_lists_are_those_of_the_plan(device, size):
    x = torch.ones(size)
    with device.run() as log:
        VM.adamw_([x], [x.half()], [x.clone()], [x.clone()], [], None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
        VM.grad_norm([x])
    plans = [device.plan(name, x.dtype, 1, size) for name in ("adamw", "grad_norm", "grad_norm_fold")]
    assert len(log.launches) == len(plans)
    assert all(launch.follows(plan) for launch, plan in zip(log.launches, plans, strict=True))


def test_lists_without_elements_launch_nothing(device):
    none = torch.ones(0)
    with device.run() as log:
        VM.adamw_([], [], [], [], [], None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
        VM.adamw_([none], [none], [none.clone()], [none.clone()], [], None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
        assert VM.grad_norm([none, none]).item() == 0.0
    assert log.launches == []


def test_no_bias_gradient_no_fold(device):
    with device.run() as log:
        gelu_backward()
    (launch,) = log.launches
    assert launch.follows(device.plan("bias_gelu_backward", X.dtype, 4, 64))


def test_zero_rows_launch_nothing_and_give_zero_gradients(device):
    x, none, statistic = X[:0], TARGETS[:0], ROW[:0]
    with device.run() as log:
        outputs = [
            norm(x),
            residual_norm(x, x),
            norm_backward(x, x, statistic, statistic),
            (gelu(x), *gelu_backward(x, x, W)),
            (*entropy(x, none), entropy_backward(statistic, x, none, statistic)),
            (drop(X3[:0], ids=IDS[:0]), drop(X3[:, :0])),
            (decode(Q[:0], table=TABLE[:0], lengths=LENGTHS[:0]), decode(Q[:, :0])),
        ]
    assert log.launches == []
    assert all(tensor.isfinite().all() for group in outputs for tensor in group)
    _, dweight, dbias = outputs[2]
    assert torch.equal(torch.stack([dweight, dbias]), torch.zeros(2, 64))
    assert torch.equal(outputs[3][2], torch.zeros(64))


def test_nothing_but_the_launcher_launches():
    files = [*CSRC.glob("*.*"), *(CSRC / "cuda").rglob("*.*")]
    assert {"ops_cuda.cpp", "layer_norm.cu", "launch.h"} <= {path.name for path in files}
    text = {path.name: path.read_text() for path in files if path.suffix != ".md"}
    launching = [name for name, code in text.items() if re.search(r"cudaLaunch|cuLaunch|<<<", code)]
    assert launching == ["launch.h"]


def test_a_fault_of_the_machine_reaches_the_test_as_itself(device):
    from gptdist._ptxvm import Fault

    with pytest.raises(Fault), device.run(max_instructions=1):
        gelu()
    with pytest.raises(RuntimeError, match="bias_gelu: unspecified launch failure"):
        gelu()  # outside of any run


def test_limits_in_python_are_those_of_the_kernels():
    header = (CSRC / "cuda" / "kernels.h").read_text()
    names = ("kWidthStep", "kMinWidth", "kMaxWidth")
    values = tuple(int(re.search(rf"\b{name} = (\d+)", header).group(1)) for name in names)
    assert values == (backends.WIDTH_STEP, backends.MIN_WIDTH, backends.MAX_WIDTH)


# gptdist.ops on the device


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(function, tensors):
    """Outputs and gradients of a function, fp32."""
    inputs = leaves(*tensors)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(sum((out.float() * torch.sin(out.float())).sum() for out in outputs), inputs)
    return [tensor.float() for tensor in (*outputs, *found)]


SITE = {"key": KEY, "sample_ids": IDS, "site": 3}
CALLS = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b), (X3, W, W)),
    "layer_norm without bias": (lambda x, w: ops.layer_norm(x, w), (X3, W)),
    "layer_norm to bf16": (lambda x, w: ops.layer_norm(x, w, dtype=BF16), (X3, W)),
    "layer_norm bf16 bias": (lambda x, w, b: ops.layer_norm(x, w, b), (X3, W, W.to(BF16))),
    "residual_layer_norm": (ops.residual_layer_norm, (X3, X3 + 1, W, W)),
    "residual_layer_norm bf16 branch": (ops.residual_layer_norm, (X3.to(BF16), X3 + 1, W, W)),
    "residual_layer_norm bf16 residual": (ops.residual_layer_norm, (X3, (X3 + 1).to(BF16), W)),
    "bias_gelu": (ops.bias_gelu, (X3, W)),
    "bias_gelu bf16": (ops.bias_gelu, (X3.to(BF16), W)),
    "bias_gelu without bias": (ops.bias_gelu, (X3,)),
    "cross_entropy": (lambda z: ops.cross_entropy(z, TARGETS), (randn(4, 17),)),
    "linear_cross_entropy": (
        lambda h, w: ops.linear_cross_entropy(h, w, TARGETS, vocab_size=17),
        (X, 0.1 * randn(24, 64)),
    ),
    "linear_cross_entropy bf16": (
        lambda h, w: ops.linear_cross_entropy(h, w, TARGETS, vocab_size=17),
        (X.to(BF16), 0.1 * randn(24, 64)),
    ),
    "dropout": (lambda x: ops.dropout(x, 0.3, **SITE), (X3,)),
    "dropout odd width": (lambda x: ops.dropout(x, 0.3, row_offset=7, **SITE), (randn(2, 5, 13),)),
    "strided": (lambda x: ops.bias_gelu(x.t()), (randn(64, 5),)),
    "misaligned": (lambda x: ops.layer_norm(x[1:].view(3, 64), W), (randn(3 * 64 + 1),)),
    "strided logits": (lambda z: ops.cross_entropy(z[:, :17], TARGETS), (randn(4, 24),)),
    "one row": (lambda x: ops.layer_norm(x, W), (W,)),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_ops_equal_the_reference(device, name, monkeypatch):
    function, tensors = CALLS[name]
    with device.run() as log:
        got = gradients(function, tensors)
    assert len(log.launches) >= 2
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    expected = gradients(function, tensors)
    half = any(tensor.dtype == BF16 for tensor in tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-2 if half else 2e-5, rtol=2e-2 if half else 2e-5)


def test_dropout_masks_are_those_of_the_reference(device):
    x = torch.ones(3, 9, 64)
    arguments = {"key": ops.dropout_key(7, 5), "sample_ids": torch.tensor([5, 1 << 33, -1]), "site": 9}
    expected = ops.dropout(x, 0.2, row_offset=1000, **arguments)
    with device.run():
        got = ops.dropout(x, 0.2, row_offset=1000, **arguments)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x, w: ops.layer_norm(x, w), (randn(4, 60), randn(60))),
        (lambda x: ops.bias_gelu(x), (randn(4, 60),)),
        (lambda x: ops.bias_gelu(x), (X.double(),)),
        (lambda x, w: ops.layer_norm(x, w), (X.double(), W.double())),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_the_reference(device, function, tensors):
    expected = gradients(function, tensors)
    with device.run() as log:
        got = gradients(function, tensors)
    assert log.launches == []
    torch.testing.assert_close(got, expected)


def test_reasons(device):
    with device.run():
        assert backends.choose("layer_norm", "cpu", torch.float32).backend == "cuda"
        wide = backends.choose("layer_norm", "cpu", torch.float32, backends.norm_misfit(60))
        assert wide == ("reference", "width 60 is no multiple of 8 from 64 to 16384")
        assert "width 64 to 16384 in multiples of 8" in backends.choose("layer_norm", "cpu").reason
        assert backends.choose("rope", "cpu").reason == "no cuda kernel for this op"
    assert backends.choose("layer_norm", "cpu").backend != "cuda"


OPCHECKS = {
    "layer_norm_fwd": (X, W, W, 1e-5, torch.float32),
    "layer_norm_fwd bf16": (X.to(BF16), W, None, 1e-5, BF16),
    "layer_norm_fwd to bf16": (X, W, None, 1e-5, BF16),
    "layer_norm_bwd": (X, X, ROW, ROW, W, W),
    "residual_layer_norm_fwd": (X.to(BF16), X, W, None, 1e-5),
    "residual_layer_norm_bwd": (X.to(BF16), X, X, ROW, ROW, W, None),
    "bias_gelu_fwd": (STRIDED, W),
    "bias_gelu_bwd": (X, X, W.to(BF16)),
    "cross_entropy_fwd": (X, TARGETS, -100),
    "cross_entropy_bwd": (ROW, X, TARGETS, ROW, -100),
    "linear_cross_entropy_fwd": (X, randn(9, 64), TARGETS, None, 8, -100, False, False),
    "linear_cross_entropy_fwd with gradients": (X, randn(9, 64), TARGETS, None, 8, -100, True, True),
    "linear_cross_entropy_bwd": (
        ROW, X, randn(9, 64), TARGETS, None, ROW, None, None, None, 8, -100, True, True
    ),
    "dropout": (X3, 0.2, KEY, IDS, 1, 0),
    "adamw_": ([X], [X + 1], [X + 2], [X.abs()], [X.half()], torch.tensor(0.5), 1e-3, 0.9, 0.95, 1e-8, 0.1, 2),
    "grad_norm": ([X, X.half()],),
}


@pytest.mark.parametrize("name", list(OPCHECKS))
def test_opcheck(device, name):
    with device.run() as log:
        torch.library.opcheck(getattr(torch.ops.gptdist, name.split()[0]).default, OPCHECKS[name])
    assert log.launches


# a model


def training_step(model, tokens, drop, dtype):
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = model(tokens[:, :-1], tokens[:, 1:], dropout=drop)
    losses.mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_training_step_equals_the_reference(device, dtype, monkeypatch):
    model = LanguageModel(ModelConfig(vocab_size=33, context=8, width=64, n_layers=1, n_heads=2))
    fill_initial_values(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * randn(*parameter.shape))  # biases and norms that are not the identity
    tokens = torch.arange(18).view(2, 9) * 7 % 33
    dropped = Dropout(0.1, KEY, IDS)
    with device.run() as log:
        losses, grads = training_step(model, tokens, dropped, dtype)
    kernels = {"layer_norm", "bias_gelu", "cross_entropy", "dropout", "fold_partials"}
    assert {kernel for kernel in kernels if any(kernel in launch.name for launch in log.launches)} == kernels
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    expected_losses, expected_grads = training_step(model, tokens, dropped, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(losses, expected_losses, atol=tolerance, rtol=tolerance)
    for name, expected in expected_grads.items():
        error = (grads[name] - expected).norm() / expected.norm()
        assert error < tolerance, name
