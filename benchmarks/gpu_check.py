"""The CUDA kernels on a GPU: are they right, and how fast beside PyTorch's own? gpu_check.sh builds them and runs this.

    python -m benchmarks.gpu_check --output benchmarks/results

Correctness: every op, forward and backward, against the PyTorch reference in float64, over dtypes and over shapes
around the kernels' tiles; the error is the largest difference over the largest value. Dropout must drop the very same
elements. Two runs must give the same bits, and opcheck must pass.

Times: CUDA events around the kernel and around PyTorch, in alternation; medians. GB/s are of the bytes that the
operation must move (csrc/README.md), and their share is of what a copy reaches in the same run. Writes gpu_check.md and
gpu_check.json. Exit code 1 if a check fails, 3 without a GPU.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from gptdist import ops
from gptdist.ops import backends

EXIT_FAILED, EXIT_NO_DEVICE = 1, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error over largest value: sums over thousands of fp32 products, or two roundings of the outputs.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LARGE_ELEMENTS = (1 << 31) + (1 << 16)  # offsets of 31 bits do not reach the end
LARGE_BYTES = 16 << 30  # free memory that the check of large tensors wants


@dataclass(frozen=True)
class Shapes:
    """What the checks go over: rows with each width, rows with each vocabulary, (B, T, C) of dropout, and of
    decode_attention (B, Tq, Hkv, G, D, longest context).
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


@dataclass(frozen=True)
class Timing:
    """Medians of one op. bytes: what it must move, 0 where that is not what bounds it."""

    name: str
    dtype: str
    shape: str
    bytes: int
    kernel_ms: float
    torch_ms: float


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


# correctness


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
            yield Case("residual_layer_norm", name, ops.residual_layer_norm, (x, x, weight))
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
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(tensors[0].dtype).to(y) for y in outputs]
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
        error = largest_error([got], [expected])
        yield Check("decode_attention", short(dtype), f"{list(shape)}", error, LIMITS[dtype])
        different = int(not torch.equal(got, again))
        yield Check("decode_attention repeated", short(dtype), f"{list(shape)}", different, 0, "the bits differ")


def check_opcheck(device: torch.device) -> Iterator[Check]:
    """torch.library.opcheck of every registered op that has kernels."""
    x, weight, row = (torch.randn(*shape, device=device) for shape in ((4, 64), (64,), (4,)))
    head, targets = torch.randn(9, 64, device=device), torch.tensor([1, 2, -100, 4], device=device)
    key, ids = ops.dropout_key(1, 2, device), torch.arange(2, device=device)
    arguments = {
        "layer_norm_fwd": (x, weight, weight, 1e-5),
        "layer_norm_bwd": (x, x, row, row, weight, weight),
        "residual_layer_norm_fwd": (x.bfloat16(), x, weight, None, 1e-5),
        "residual_layer_norm_bwd": (x.bfloat16(), x, x, row, row, weight, None),
        "bias_gelu_fwd": (x, weight),
        "bias_gelu_bwd": (x, x, weight),
        "cross_entropy_fwd": (x, targets, -100),
        "cross_entropy_bwd": (row, x, targets, row, -100),
        "linear_cross_entropy_fwd": (x, head, targets, 8, -100),
        "linear_cross_entropy_bwd": (row, x, head, targets, row, 8, -100, True, True),
        "dropout": (x.view(2, 2, 64), 0.2, key, ids, 1, 0),
        "decode_attention": decode_inputs(device, torch.bfloat16, 2, 3, 1, 2, 64, 70),
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
    for op in backends.COMPILED["cuda"]:
        choice = backends.choose(op, device, torch.bfloat16)
        yield Check(f"backend of {op}", "bfloat16", "", choice.backend != "cuda", 0, choice.reason)


def correctness(device: torch.device, shapes: Shapes) -> list[Check]:
    checks = [*check_backends(device), *check_opcheck(device), *check_large(device)]
    for dtype in DTYPES:
        for case in cases(device, dtype, shapes):
            checks += compare(case, dtype)
        checks += check_dropout(device, dtype, shapes)
        checks += check_decode(device, dtype, shapes)
    return checks


# times


def paired_ms(first: Callable, second: Callable, device: torch.device, repeats: int) -> tuple[float, float]:
    """Median milliseconds of two functions, called alternately after a warm-up of each."""
    for function in (first, second) * 3:
        function()
    marks = []
    for _ in range(repeats):
        marks.append([now(device)])
        for function in (first, second):
            function()
            marks[-1].append(now(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times = [(between(a, b), between(b, c)) for a, b, c in marks]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def now(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def copy_bandwidth(device: torch.device, count: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy of `count` bytes."""
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    time_ms, _ = paired_ms(lambda: target.copy_(source), lambda: None, device, repeats)
    return 2 * source.nbytes / (time_ms / 1e3)


def norm_timings(device, dtype, rows: int, width: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    """(name, bytes, kernel, PyTorch)."""
    kernels = backends.cuda_kernels()
    x, residual, dy = (torch.randn(rows, width, device=device).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    _, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, 1e-5)
    statistics_of_torch = torch.native_layer_norm(x, (width,), weight, bias, 1e-5)[1:]

    def torch_backward(s):
        return torch.ops.aten.native_layer_norm_backward(
            dy, s, (width,), *statistics_of_torch, weight, bias, [True] * 3
        )

    def torch_residual():
        s = x + residual
        return F.layer_norm(s, (width,), weight, bias), s

    n = x.nbytes
    yield (
        "layer_norm forward",
        2 * n,
        lambda: kernels.layer_norm_fwd(x, weight, bias, 1e-5),
        lambda: F.layer_norm(x, (width,), weight, bias),
    )
    yield (
        "layer_norm backward",
        3 * n,
        lambda: kernels.layer_norm_bwd(dy, x, mean, rstd, weight, True),
        lambda: torch_backward(x),
    )
    yield (
        "residual_layer_norm forward",
        4 * n,
        lambda: kernels.residual_layer_norm_fwd(x, residual, weight, bias, 1e-5),
        torch_residual,
    )
    yield (
        "residual_layer_norm backward",
        4 * n,
        lambda: kernels.residual_layer_norm_bwd(dy, residual, x, mean, rstd, weight, True),
        lambda: torch_backward(x)[0] + residual,
    )


def gelu_timings(device, dtype, rows: int, width: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    kernels = backends.cuda_kernels()
    x, dy = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(width, device=device).to(dtype)
    h = x + bias  # PyTorch keeps it from its forward

    def torch_backward():
        dh = torch.ops.aten.gelu_backward(dy, h, approximate="tanh")
        return dh, dh.sum(0)

    n = x.nbytes
    yield (
        "bias_gelu forward",
        2 * n,
        lambda: kernels.bias_gelu_fwd(x, bias),
        lambda: F.gelu(x + bias, approximate="tanh"),
    )
    yield "bias_gelu backward", 3 * n, lambda: kernels.bias_gelu_bwd(dy, x, bias), torch_backward


def entropy_timings(device, dtype, rows: int, vocabulary: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    kernels = backends.cuda_kernels()
    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    dloss = torch.ones(rows, device=device)
    _, lse = kernels.cross_entropy_fwd(logits, targets, -100)
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="none")
    n = logits.nbytes
    yield (
        "cross_entropy forward",
        n,
        lambda: kernels.cross_entropy_fwd(logits, targets, -100),
        lambda: F.cross_entropy(logits, targets, reduction="none"),
    )
    yield (
        "cross_entropy backward",
        2 * n,
        lambda: kernels.cross_entropy_bwd(dloss, logits, targets, lse, -100),
        lambda: torch.autograd.grad(loss, leaf, dloss.to(loss.dtype), retain_graph=True),
    )


def linear_entropy_timings(device, dtype, rows: int, vocabulary: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    """Forward and backward; matrix products bound it, so no bytes."""
    hidden = torch.randn(rows, 768, device=device).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, 768, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def step(losses):
        return torch.autograd.grad(losses.mean(), (hidden, weight))

    yield (
        "linear_cross_entropy, both",
        0,
        lambda: step(ops.linear_cross_entropy(hidden, weight, targets)),
        lambda: step(F.cross_entropy(F.linear(hidden, weight), targets, reduction="none").float()),
    )


def dropout_timings(device, dtype, rows: int, width: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    kernels = backends.cuda_kernels()
    x = torch.randn(1, rows, width, device=device).to(dtype)
    key, ids = ops.dropout_key(1, 2, device).reshape(1), torch.zeros(1, dtype=torch.int64, device=device)
    yield (
        "dropout",
        2 * x.nbytes,
        lambda: kernels.dropout(x, 0.1, key, ids, 0, 0),
        lambda: F.dropout(x, 0.1, training=True),
    )


def decode_timings(device, dtype, rows: int, context: int) -> Iterator[tuple[str, int, Callable, Callable]]:
    """One query for each of 12 heads; PyTorch's keys and values lie in one piece."""
    if dtype not in backends.COMPILED["cuda"]["decode_attention"].dtypes:
        return
    kernels = backends.cuda_kernels()
    arguments = decode_inputs(device, dtype, rows, 1, 12, 1, 64, context - 1)
    arguments[-1].fill_(context - 1)
    q, k, v = (torch.randn(rows, 12, n, 64, device=device).to(dtype) for n in (1, context, context))
    yield (
        "decode_attention",
        k.nbytes + v.nbytes,
        lambda: kernels.decode_attention(*arguments),
        lambda: F.scaled_dot_product_attention(q, k, v),
    )


# Tensors of 50 MB and more (bf16), so that they do not stay in the second-level cache (50 MB on an H100).
TIMED = (
    (norm_timings, ((32768, 768), (16384, 2048), (8192, 8192))),
    (gelu_timings, ((16384, 3072), (8192, 8192))),
    (entropy_timings, ((8192, 50257), (8192, 50304))),
    (linear_entropy_timings, ((8192, 50257),)),
    (dropout_timings, ((32768, 1024),)),
    (decode_timings, ((16, 1024), (1, 32768), (64, 4096))),
)


def timings(device: torch.device, repeats: int, timed=TIMED, dtypes=(torch.bfloat16, torch.float32)) -> list[Timing]:
    found = []
    for dtype in dtypes:
        for make, sizes in timed:
            for rows, columns in sizes:
                try:
                    for name, count, kernel, torch_function in make(device, dtype, rows, columns):
                        times = paired_ms(kernel, torch_function, device, repeats)
                        found.append(Timing(name, short(dtype), f"[{rows}, {columns}]", count, *times))
                except torch.OutOfMemoryError:  # of a small GPU: the row is left out
                    print(f"gpu_check: no memory for {make.__name__} [{rows}, {columns}]", file=sys.stderr)
    return found


# the report


def environment(device: torch.device) -> dict:
    gpu = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        runtime, driver = backends.cuda_versions()
        gpu |= {"driver_cuda": backends.version(driver), "library_cuda": backends.version(runtime)}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"python -m benchmarks.gpu_check {shlex.join(sys.argv[1:])}".strip(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "platform": platform.platform(),
    }


def markdown(found: dict, checks: list[Check], times: list[Timing], copy: float) -> str:
    """The report: failures first, then the worst error of each op, then times."""
    failed = [check for check in checks if not check.ok]
    gpu = found["gpu"]
    lines = [
        "# CUDA kernels on a GPU",
        "",
        f"{found['date']}, `{found['command']}`",
        "",
        f"GPU: {gpu.get('name', 'none')}, compute capability {gpu.get('capability', '-')}, driver for CUDA "
        f"{gpu.get('driver_cuda', '-')}. Library: CUDA {gpu.get('library_cuda', '-')}. torch {found['torch']}, CUDA "
        f"{found['torch_cuda']}. {found['platform']}.",
        "",
        f"## Correctness: {len(checks) - len(failed)} of {len(checks)} checks passed",
        "",
    ]
    for check in failed:
        where = " ".join(part for part in (check.name, check.dtype, check.shape) if part)
        lines.append(f"- FAILED {where}: {check.error:.3g}, allowed {check.limit:.3g} {check.detail}".rstrip())
    lines += ["", "| check | dtype | cases | worst | allowed |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.name, check.dtype), []).append(check)
    for (name, dtype), group in groups.items():
        worst = max(group, key=lambda check: (check.error != check.error, check.error / (check.limit or 1)))
        lines.append(f"| {name} | {dtype} | {len(group)} | {worst.error:.2g} | {worst.limit:.2g} |")
    lines += ["", "## Times", ""]
    if times:
        lines += [
            f"A copy reaches {copy / 1e9:.0f} GB/s, read and written. Medians.",
            "",
            "| op | dtype | shape | kernel us | PyTorch us | times faster | GB/s | share of copy |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for t in times:
        rate = t.bytes / (t.kernel_ms / 1e3)
        share = f"{rate / 1e9:.0f} | {rate / copy:.0%}" if t.bytes else "- | -"
        lines.append(
            f"| {t.name} | {t.dtype} | {t.shape} | {t.kernel_ms * 1e3:.1f} | {t.torch_ms * 1e3:.1f} "
            f"| {t.torch_ms / t.kernel_ms:.2f} | {share} |"
        )
    return "\n".join(lines) + "\n"


def write(folder: Path, found: dict, checks: list[Check], times: list[Timing], copy: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_check.md").write_text(markdown(found, checks, times, copy))
    data = found | {
        "copy_bytes_per_s": copy,
        "checks": [asdict(check) | {"ok": check.ok} for check in checks],
        "times": [asdict(timing) for timing in times],
    }
    (folder / "gpu_check.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=51)
    args = parser.parse_args()
    problem = backends.cuda_device_problem()
    if problem:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return EXIT_NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    checks = correctness(device, Shapes())
    failed = [check for check in checks if not check.ok]
    write(args.output, environment(device), checks, [], 0.0)  # what is known so far, should the rest not come to an end
    copy = copy_bandwidth(device, 1 << 29, args.repeats)
    times = timings(device, args.repeats)
    write(args.output, environment(device), checks, times, copy)
    print((args.output / "gpu_check.md").read_text())
    return EXIT_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
