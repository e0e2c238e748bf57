"""Whether the ops of a device are right: every op, forward and backward, against its PyTorch reference in float64.

Over dtypes and over shapes around the kernels' tiles; the error is the largest difference over the largest value.
Dropout must drop the very same elements. Two runs must give the same bits, and opcheck must pass. gpu_check.py runs
this on a GPU, the tests on their device. To add an op: a case, and its arguments for opcheck.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from gptdist import ops
from gptdist.ops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error over largest value: sums over thousands of fp32 products, or two roundings of the outputs.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LARGE_ELEMENTS = (1 << 31) + (1 << 16)  # offsets of 31 bits do not reach the end
LARGE_BYTES = 16 << 30  # free memory that the check of large tensors wants


@dataclass(frozen=True)
class Shapes:
    """What the checks go over: rows with each width, rows with each vocabulary, (B, T, C) of dropout, (B, Tq, Hkv, G,
    D, longest context) of decode_attention, elements of each tensor of the optimizer.
    """

    rows: tuple[int, ...] = (1, 33, 1000)
    widths: tuple[int, ...] = (64, 520, 768, 1000, 1032, 4096, 8192, 8200, 16384)
    vocabularies: tuple[int, ...] = (1, 17, 1000, 50257)
    blocks: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 33, 63), (3, 100, 768), (2, 65, 4104))
    decode: tuple[tuple[int, int, int, int, int, int], ...] = (
        (1, 1, 12, 1, 64, 1000),
        (3, 1, 2, 16, 128, 5000),
        (64, 1, 12, 1, 64, 700),
        (3, 7, 2, 4, 128, 300),
        (2, 130, 12, 2, 64, 0),
    )
    optimized: tuple[int, ...] = (1, 768, 8192, 8193, 1000003, *(range(1, 500)))


@dataclass(frozen=True)
class Check:
    """One comparison. `error` is what was measured, `limit` what is allowed; `detail` where it could not be."""

    name: str
    dtype: str
    shape: str
    error: float
    limit: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def reference():
    """Ops run on the PyTorch reference."""
    before = os.environ.get("GPTDIST_OPS")
    os.environ["GPTDIST_OPS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GPTDIST_OPS"]
        else:
            os.environ["GPTDIST_OPS"] = before


@dataclass(frozen=True)
class Case:
    """A public op as a function of tensors: those that are differentiated, whatever else it needs inside."""

    op: str
    shape: str
    function: Callable
    tensors: tuple[torch.Tensor, ...]


def cases(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[Case]:
    """Every op with CUDA kernels, over `shapes`. Activations are in `dtype`, parameters in fp32 or `dtype`."""
    torch.manual_seed(0)

    def randn(*shape, like=dtype):
        return torch.randn(*shape, device=device).to(like)

    for width in shapes.widths:
        for rows in shapes.rows:
            name = f"[{rows}, {width}]"
            x, weight, bias = 2 * randn(rows, width) + 1, randn(width, like=torch.float32), randn(width)
            yield Case("layer_norm", name, ops.layer_norm, (x, weight))
            yield Case("layer_norm", name, ops.layer_norm, (x, bias, bias))
            residual = randn(rows, width, like=torch.float32)
            yield Case("residual_layer_norm", name, ops.residual_layer_norm, (x, residual, weight, weight))
            yield Case("residual_layer_norm", name, ops.residual_layer_norm, (x, residual, bias, bias))
            yield Case("residual_layer_norm", name, ops.residual_layer_norm, (x, x, weight))
            yield Case("residual_layer_norm", name, ops.residual_layer_norm, (x, x, bias, bias))
            yield Case("bias_gelu", name, ops.bias_gelu, (x, weight))
            yield Case("bias_gelu", name, ops.bias_gelu, (x, bias))
            yield Case("bias_gelu", name, ops.bias_gelu, (x,))
    for vocabulary in shapes.vocabularies:
        for rows in shapes.rows:
            targets = torch.randint(vocabulary, (rows,), device=device)
            targets[rows // 2] = -100
            yield Case(
                "cross_entropy",
                f"[{rows}, {vocabulary}]",
                lambda z, t=targets: ops.cross_entropy(z, t),
                (4 * randn(rows, vocabulary),),
            )
            weight = randn(vocabulary + 3, 64, like=torch.float32)
            yield Case(
                "linear_cross_entropy",
                f"[{rows}, 64] x [{vocabulary}, 64]",
                lambda h, w, t=targets, v=vocabulary: ops.linear_cross_entropy(h, w, t, vocab_size=v),
                (0.3 * randn(rows, 64), weight),
            )


def with_gradients(function: Callable, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None):
    """Outputs and gradients of a fixed function of them, the inputs cast to `dtype` first."""
    inputs = [(x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for x in tensors]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=device).to(tensors[0].dtype).to(y) for y in outputs]
    return [y.detach() for y in outputs] + [*torch.autograd.grad(outputs, inputs, upstream)]


def largest_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """max |a - b| / max |b|, of the worst pair; NaN if anything is."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        if b.numel():
            errors.append(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)))
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


def compare(case: Case, dtype: torch.dtype) -> Iterator[Check]:
    """The kernels' outputs and gradients against float64's, and against their own in a second run."""
    got = with_gradients(case.function, case.tensors)
    again = with_gradients(case.function, case.tensors)
    with reference():
        expected = with_gradients(case.function, case.tensors, torch.float64)
    yield Check(case.op, short(dtype), case.shape, largest_error(got, expected), limit(case, dtype))
    different = sum(not torch.equal(a, b) for a, b in zip(got, again, strict=True))
    yield Check(f"{case.op} repeated", short(dtype), case.shape, different, 0, "tensors whose bits differ")


def limit(case: Case, dtype: torch.dtype) -> float:
    """linear_cross_entropy rounds its logits to `dtype` before the softmax, as every implementation on half dtypes."""
    return LIMITS[dtype] * (4 if case.op == "linear_cross_entropy" else 1)


def check_dropout(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[Check]:
    for B, T, C in shapes.blocks:
        x = torch.randn(B, T, C, device=device).to(dtype)
        mask = {
            "key": ops.dropout_key(3, 4, device),
            "sample_ids": torch.arange(B, device=device) + (1 << 33),
            "site": 5,
            "row_offset": 1000,
        }
        got = with_gradients(lambda x, mask=mask: ops.dropout(x, 0.3, **mask), (x,))
        with reference():
            expected = with_gradients(lambda x, mask=mask: ops.dropout(x, 0.3, **mask), (x,))
        different = sum(int((a != b).sum()) for a, b in zip(got, expected, strict=True))
        yield Check("dropout", short(dtype), f"[{B}, {T}, {C}]", different, 0, "elements that differ")


def decode_inputs(device, dtype, B: int, Tq: int, H: int, G: int, D: int, context: int) -> tuple[torch.Tensor, ...]:
    """decode_attention's arguments: rows of up to `context` positions before the queries, pages of 16 in any order."""
    pages = -(-(context + Tq) // 16)
    q, cache = torch.randn(B, Tq, H, G, D, device=device), torch.randn(2, B * pages, 16, H, D, device=device)
    table = torch.randperm(B * pages, device=device).view(B, pages).int()
    lengths = torch.arange(B, 0, -1, device=device) * context // B
    return q.to(dtype), *cache.to(dtype), table, lengths


def check_decode(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[Check]:
    if dtype not in backends.COMPILED["cuda"]["decode_attention"].dtypes:
        return
    for shape in shapes.decode:
        q, k, v, *where = decode_inputs(device, dtype, *shape)
        got, again = (ops.decode_attention(q, k, v, *where) for _ in range(2))
        with reference():
            expected = ops.decode_attention(q.double(), k.double(), v.double(), *where)
        yield Check("decode_attention", short(dtype), f"{list(shape)}", largest_error([got], [expected]), LIMITS[dtype])
        different = int(not torch.equal(got, again))
        yield Check("decode_attention repeated", short(dtype), f"{list(shape)}", different, 0, "the bits differ")


def optimizer_lists(device, dtype, sizes: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """params, grads (in `dtype`), exp_avg and exp_avg_sq of adamw_."""
    lists = [[torch.randn(n, device=device) for n in sizes] for _ in range(4)]
    lists[1] = [grad.to(dtype) for grad in lists[1]]
    lists[3] = [moment.square() for moment in lists[3]]
    return lists


def check_optimizer(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> Iterator[Check]:
    """A step with clipping and shadows, and the norm, of one list; the gradients are in `dtype`."""
    step = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)
    lists, scale = optimizer_lists(device, dtype, shapes.optimized), torch.tensor(0.5, device=device)
    results = []
    for kind in (None, None, torch.float64):
        params, grads, *moments = ([x.clone() if kind is None else x.to(kind) for x in each] for each in lists)
        shadows = [torch.empty_like(x, dtype=torch.bfloat16) for x in params]
        with reference() if kind else nullcontext():
            ops.adamw_(params, grads, *moments, shadows=shadows, grad_scale=scale, **step)
            norm = ops.grad_norm(grads)
        results.append([*params, *moments[0], *moments[1], norm.reshape(1)])
        rounded = sum(not torch.equal(shadow, x.to(torch.bfloat16)) for shadow, x in zip(shadows, params, strict=True))
        if kind is None:
            yield Check("adamw_ shadows", short(dtype), f"{len(shadows)} tensors", rounded, 0, "tensors not rounded")
    got, again, expected = results
    shape = f"{len(shapes.optimized)} tensors"
    yield Check("adamw_, grad_norm", short(dtype), shape, largest_error(got, expected), LIMITS[torch.float32])
    different = sum(not torch.equal(a, b) for a, b in zip(got, again, strict=True))
    yield Check("adamw_, grad_norm repeated", short(dtype), shape, different, 0, "tensors whose bits differ")


def check_opcheck(device: torch.device) -> Iterator[Check]:
    """torch.library.opcheck of every registered op that has kernels."""
    x, weight, row = (torch.randn(*shape, device=device) for shape in ((4, 64), (64,), (4,)))
    head, targets = torch.randn(9, 64, device=device), torch.tensor([1, 2, -100, 4], device=device)
    key, ids = ops.dropout_key(1, 2, device), torch.arange(2, device=device)
    arguments = {
        "layer_norm_fwd": (x, weight, weight, 1e-5, x.dtype),
        "layer_norm_bwd": (x, x, row, row, weight, weight),
        "residual_layer_norm_fwd": (x.bfloat16(), x, weight, None, 1e-5),
        "residual_layer_norm_bwd": (x.bfloat16(), x, x, row, row, weight, None),
        "bias_gelu_fwd": (x, weight),
        "bias_gelu_bwd": (x, x, weight),
        "cross_entropy_fwd": (x, targets, -100),
        "cross_entropy_bwd": (row, x, targets, row, -100),
        "linear_cross_entropy_fwd": (x, head, targets, None, 8, -100, False, False),
        "linear_cross_entropy_bwd": (row, x, head, targets, None, row, None, None, None, 8, -100, True, True),
        "dropout": (x.view(2, 2, 64), 0.2, key, ids, 1, 0),
        "decode_attention": decode_inputs(device, torch.bfloat16, 2, 3, 1, 2, 64, 70),
        "adamw_": (*optimizer_lists(device, torch.float32, (5, 70)), [], None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1),
        "grad_norm": ([x, row],),
    }
    for name, values in arguments.items():
        try:
            torch.library.opcheck(getattr(torch.ops.gptdist, name).default, values)
            yield Check(f"opcheck {name}", "float32", "", 0, 0)
        except Exception as error:
            yield Check(f"opcheck {name}", "float32", "", 1, 0, str(error).splitlines()[0])


def check_large(device: torch.device) -> Iterator[Check]:
    """The last rows of tensors of more than 2^31 elements, against the same rows alone."""
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < LARGE_BYTES:
        return
    width, last = 4096, 8
    x = torch.randn(LARGE_ELEMENTS // width, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, device=device)
    targets = torch.zeros(len(x), dtype=torch.int64, device=device)
    functions = {
        "bias_gelu": lambda x, t: ops.bias_gelu(x, weight),
        "layer_norm": lambda x, t: ops.layer_norm(x, weight),
        "cross_entropy": lambda x, t: ops.cross_entropy(x, t),
    }
    for name, function in functions.items():
        whole, alone = function(x, targets)[-last:], function(x[-last:].clone(), targets[-last:])
        different = int((whole != alone).sum())
        yield Check(f"{name} beyond 2^31", "bfloat16", f"{list(x.shape)}", different, 0, "elements that differ")


def check_backends(device: torch.device) -> Iterator[Check]:
    """The kernels run at all: a fallback to the reference would pass every comparison."""
    for op, kernel in backends.COMPILED["cuda"].items():
        choice = backends.choose(op, device, kernel.dtypes[-1])
        yield Check(f"backend of {op}", short(kernel.dtypes[-1]), "", choice.backend != "cuda", 0, choice.reason)


def correctness(device: torch.device, shapes: Shapes) -> Iterator[Check]:
    yield from check_backends(device)
    yield from check_opcheck(device)
    for dtype in DTYPES:
        for case in cases(device, dtype, shapes):
            yield from compare(case, dtype)
        yield from check_dropout(device, dtype, shapes)
        yield from check_decode(device, dtype, shapes)
        yield from check_optimizer(device, dtype, shapes)
    yield from check_large(device)
