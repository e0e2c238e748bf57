"""Compiled kernels against PyTorch, and the share of the machine's copy bandwidth that they reach.

    python -m benchmarks.kernels

Each row: the kernel and PyTorch in alternation, so that both meet the same disturbances; medians. Bytes are those that
the operation must move (csrc/README.md), not those that an implementation moves.
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime

import torch
import torch.nn.functional as F

from gptdist import doctor
from gptdist.errors import MissingError
from gptdist.ops import backends


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(first, second, repeats: int) -> tuple[float, float]:
    """Median seconds of two functions, called alternately after a warm-up of each."""
    for function in (first, second) * 3:
        function()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def copy_bandwidth(elements: int, dtype: torch.dtype, repeats: int) -> float:
    """Bytes per second, read and written, of a copy of as many elements as the kernel reads."""
    source = torch.ones(elements, dtype=dtype)
    target = torch.empty_like(source)
    target.copy_(source)
    time_s = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats))
    return 2 * source.nbytes / time_s


def bias_gelu_rows(rows: int, channels: int, dtype: torch.dtype, repeats: int):
    """(name, bytes, kernel's seconds, PyTorch's seconds) of forward and backward."""
    x, dy = torch.randn(rows, channels).to(dtype), torch.randn(rows, channels).to(dtype)
    bias = torch.randn(channels)
    like_x = bias.to(dtype)

    def torch_forward():
        return F.gelu(x + like_x, approximate="tanh")

    # PyTorch keeps h = x + b from its forward; its backward is the slope and the sum over rows.
    h = x + like_x

    def torch_backward():
        dh = torch.ops.aten.gelu_backward(dy, h, approximate="tanh")
        return dh, dh.sum(0)

    kernels = torch.ops.gptdist_c
    yield "forward", 2 * x.nbytes, *paired(lambda: kernels.bias_gelu_fwd(x, bias), torch_forward, repeats)
    yield "backward", 3 * x.nbytes, *paired(lambda: kernels.bias_gelu_bwd(dy, x, bias), torch_backward, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=51)
    args = parser.parse_args()
    if backends.library_problem():
        raise MissingError(f"the C++ library is not there: {backends.library_problem()}")

    found = doctor.collect()
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"command   python -m benchmarks.kernels {shlex.join(sys.argv[1:])}".rstrip())
    print(f"hardware  {found['cpu']['model']}, {found['cpu']['torch_threads']} threads, {platform.platform()}")
    print(f"software  torch {torch.__version__}, {found['library']['cpu_kernels']} kernels")
    print(f"\nbias_gelu [{args.rows}, {args.channels}], medians of {args.repeats} pairs; GB/s are of necessary bytes\n")
    print("| dtype | pass | kernel ms | PyTorch ms | times faster | GB/s | share of copy |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        copy = copy_bandwidth(args.rows * args.channels, dtype, args.repeats)
        name = str(dtype).removeprefix("torch.")
        for step, count, kernel_s, torch_s in bias_gelu_rows(args.rows, args.channels, dtype, args.repeats):
            rate = count / kernel_s
            print(
                f"| {name} | {step} | {kernel_s * 1e3:.3f} | {torch_s * 1e3:.3f} | {torch_s / kernel_s:.2f} "
                f"| {rate / 1e9:.1f} | {rate / copy:.0%} |"
            )
        print(f"| {name} | copy | | | | {copy / 1e9:.1f} | 100% |")


if __name__ == "__main__":
    main()
