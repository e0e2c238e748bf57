"""What each CUDA kernel moves, counted on the PTX machine (tests/cuda_vm.py) at one shape.

`least` is what the kernel must read and write: each of its tensors once. Sectors are 32 bytes of global memory, of
which a warp's access touches at least as many as its bytes need; wavefronts are passes through shared memory, of which
it needs at least one for each 128 bytes.

To add an op: its launches in `cases`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call of a compiled op. least: bytes read and written by each kernel that it launches, in their order."""

    shape: str
    call: Callable
    least: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Traffic:
    """Counted for one launch, beside the least that it could be."""

    kernel: str
    shape: str
    read: int
    least_read: int
    written: int
    least_written: int
    sectors: int
    least_sectors: int
    wavefronts: int
    least_wavefronts: int


def total(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def norm_cases(kernels, rows: int, width: int) -> Iterator[Case]:
    x, residual, dy = (torch.randn(rows, width).to(BF16) for _ in range(3))
    weight, bias = torch.randn(width), torch.randn(width)
    statistics, parameters = 8 * rows, total(weight, bias)
    _, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, 1e-5)
    shape = f"[{rows}, {width}]"
    yield Case(
        f"{shape}, residual",
        lambda: kernels.residual_layer_norm_fwd(x, residual, weight, bias, 1e-5),
        (("layer_norm_forward", total(x, residual) + parameters, 2 * x.nbytes + statistics),),
    )
    partials = 2 * width * 4 * -(-rows // 8)
    yield Case(
        f"{shape}, residual",
        lambda: kernels.residual_layer_norm_bwd(dy, residual, x, mean, rstd, weight, True),
        (
            ("layer_norm_backward", total(dy, residual, x, weight) + statistics, x.nbytes + partials),
            ("fold_partials", partials, parameters),
        ),
    )


def gelu_cases(kernels, rows: int, width: int) -> Iterator[Case]:
    x, dy, bias = torch.randn(rows, width).to(BF16), torch.randn(rows, width).to(BF16), torch.randn(width)
    shape, partials = f"[{rows}, {width}]", width * 4 * -(-rows // 16)
    least = (("bias_gelu_forward", total(x, bias), x.nbytes),)
    yield Case(shape, lambda: kernels.bias_gelu_fwd(x, bias), least)
    least = (("bias_gelu_backward", total(x, dy, bias), x.nbytes + partials), ("fold_partials", partials, bias.nbytes))
    yield Case(shape, lambda: kernels.bias_gelu_bwd(dy, x, bias), least)


def entropy_cases(kernels, rows: int, vocabulary: int) -> Iterator[Case]:
    logits, targets = torch.randn(rows, vocabulary).to(BF16), torch.randint(vocabulary, (rows,))
    _, lse = kernels.cross_entropy_fwd(logits, targets, -100)
    dloss, shape = torch.ones(rows), f"[{rows}, {vocabulary}]"
    least = (("cross_entropy_forward", total(logits, targets), 8 * rows),)
    yield Case(shape, lambda: kernels.cross_entropy_fwd(logits, targets, -100), least)
    least = (("cross_entropy_backward", total(logits, targets, lse, dloss), logits.nbytes),)
    yield Case(shape, lambda: kernels.cross_entropy_bwd(dloss, logits, targets, lse, -100), least)


def dropout_cases(kernels, B: int, T: int, C: int) -> Iterator[Case]:
    x, key, ids = torch.randn(B, T, C).to(BF16), torch.ones(1, dtype=torch.int64), torch.arange(B)
    least = (("dropout", total(x, key, ids), x.nbytes),)
    yield Case(f"[{B}, {T}, {C}]", lambda: kernels.dropout(x, 0.1, key, ids, 0, 0), least)


def attention_cases(kernels, T: int, H: int, D: int) -> Iterator[Case]:
    """Causal, a query head a kv head, D channels each."""
    qkv, dout = torch.randn(1, T, H, 3, D).to(BF16), torch.randn(1, T, H, 1, D).to(BF16)
    none = (None, 0.0, None, None, 0, 0)
    out, lse = kernels.attention_fwd(qkv, True, *none)
    statistics, n = 2 * lse.nbytes, out.nbytes
    yield Case(
        f"T={T} H={H} D={D}",
        lambda: kernels.attention_fwd(qkv, True, *none),
        (("attention_forward", 3 * n, n + lse.nbytes),),
    )
    yield Case(
        f"T={T} H={H} D={D}",
        lambda: kernels.attention_bwd(dout, qkv, out, lse, True, *none),
        (
            ("attention_statistics", 2 * n + lse.nbytes, statistics),
            ("attention_dkv", 4 * n + statistics, 2 * n),
            ("attention_dq", 4 * n + statistics, n),
        ),
    )


def cases(kernels) -> Iterator[Case]:
    yield from norm_cases(kernels, 512, 768)
    yield from gelu_cases(kernels, 256, 3072)
    yield from entropy_cases(kernels, 16, 50304)
    yield from dropout_cases(kernels, 2, 128, 768)
    for D in (64, 128):
        yield from attention_cases(kernels, 1024, 2, D)


def counted(device) -> Iterator[Traffic]:
    """Every launch of `cases` on tests.cuda_vm's device."""
    torch.manual_seed(0)
    with device.run(races=False):
        todo = list(cases(torch.ops.gptdist_vm))
    for case in todo:
        with device.run(races=False) as log:
            case.call()
        for (kernel, read, written), launch in zip(case.least, log.launches, strict=True):
            if f"{kernel}_kernel" not in launch.name:
                raise RuntimeError(f"{case.shape}: {launch.name} was launched, expected {kernel}")
            yield of_launch(kernel, case.shape, read, written, launch.counters)


def of_launch(kernel: str, shape: str, read: int, written: int, counters: dict) -> Traffic:
    kinds = ("load", "store", "async")
    return Traffic(
        kernel=kernel,
        shape=shape,
        read=counters["load_bytes"] + counters["async_bytes"],
        least_read=read,
        written=counters["store_bytes"],
        least_written=written,
        sectors=sum(counters[f"{kind}_sectors"] for kind in kinds),
        least_sectors=sum(counters[f"{kind}_sectors_ideal"] for kind in kinds),
        wavefronts=counters["shared_wavefronts"],
        least_wavefronts=counters["shared_wavefronts_ideal"],
    )
