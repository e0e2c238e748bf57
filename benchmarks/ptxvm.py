"""Speed of the PTX machine: warp instructions and mma per second on one core.

    python -m benchmarks.ptxvm

Kernels are compiled by nvcc. Times are of the process's CPU, so that a busy neighbour disturbs less; medians over
rounds. `checks` is the default launch, `races off` is without the race detector.
"""

import argparse
import platform
import shlex
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from gptdist import doctor
from gptdist.errors import MissingError

SOURCE = r"""
#include <cuda_bf16.h>
extern "C" __global__ void axpy(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2.f * x[i] + y[i];
}
extern "C" __global__ void rows(const float* x, float* y, int width) {  // a softmax of each row, a warp a row
  const float* row = x + (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * width;
  float m = -1e30f, s = 0;
  for (int i = threadIdx.x % 32; i < width; i += 32) m = fmaxf(m, row[i]);
  for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
  for (int i = threadIdx.x % 32; i < width; i += 32) s += __expf(row[i] - m);
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  for (int i = threadIdx.x % 32; i < width; i += 32) y[row - x + i] = __expf(row[i] - m) / s;
}
extern "C" __global__ void tiles(const float* a, const float* b, float* c, int n) {  // 16x16 tiles in shared memory
  __shared__ float ta[16][16], tb[16][16];
  int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    ta[threadIdx.y][threadIdx.x] = a[row * n + k + threadIdx.x];
    tb[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + column];
    __syncthreads();
    for (int i = 0; i < 16; ++i) sum += ta[threadIdx.y][i] * tb[i][threadIdx.x];
    __syncthreads();
  }
  c[row * n + column] = sum;
}
// ldmatrix and mma in the proportion of attention: 64 x 64 of a product a warp, depth by depth from shared memory.
extern "C" __global__ void tensor(const uint4* a, float* c, int depth) {
  __shared__ __align__(128) uint4 tile[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) tile[i] = a[i];
  __syncthreads();
  unsigned base = (unsigned)__cvta_generic_to_shared(tile), lane = threadIdx.x % 32;
  float s[4][8][4] = {};
  for (int k = 0; k < depth; ++k) {
    unsigned x[4][4], y[8][2], at = base + (lane % 16) * 128 + (((lane / 16) ^ (lane % 8) ^ (k % 4 * 2)) << 4);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                   : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3]) : "r"(at + i * 2048));
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                   : "=r"(y[j][0]), "=r"(y[j][1]), "=r"(y[j + 1][0]), "=r"(y[j + 1][1]) : "r"(at + 8192 + j * 1024));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(s[i][j][0]), "+f"(s[i][j][1]), "+f"(s[i][j][2]), "+f"(s[i][j][3])
                     : "r"(x[i][0]), "r"(x[i][1]), "r"(x[i][2]), "r"(x[i][3]), "r"(y[j][0]), "r"(y[j][1]));
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) sum += s[i / 32][i / 4 % 8][i % 4];
  c[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""


def compile_kernels() -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.cu").write_text(SOURCE)
        try:
            subprocess.run(["nvcc", "-O3", "-arch=compute_80", "-ptx", "k.cu", "-o", "k.ptx"], cwd=folder, check=True)
        except FileNotFoundError:
            raise MissingError("nvcc is not on PATH (pip's nvidia-cuda-nvcc can supply it)") from None
        return (Path(folder) / "k.ptx").read_text()


def kernels():
    """(name, grid, block, parameter layout, values) of each."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    n = 1 << 19
    yield "axpy", (n // 256, 1, 1), (256, 1, 1), "QQi", (floats(n), floats(n), n)
    yield "rows", (64, 1, 1), (128, 1, 1), "QQi", (floats(256, 2048), floats(256, 2048), 2048)
    yield "tiles", (8, 8, 1), (16, 16, 1), "QQQi", (floats(128, 128), floats(128, 128), floats(128, 128), 128)
    yield "tensor", (4, 1, 1), (128, 1, 1), "QQi", (np.zeros(4096, np.float32), floats(512), 32)


def launch_s(module, name, grid, block, layout, values, races: bool) -> tuple[float, dict]:
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    buffers = [(a.ctypes.data, a.nbytes, True, f"argument {i}") for i, a in enumerate(arrays)]
    params = struct.pack(layout, *(v.ctypes.data if isinstance(v, np.ndarray) else v for v in values))
    start = time.process_time()
    counters = module.launch(name, grid, block, params, buffers=buffers, races=races)
    return time.process_time() - start, counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    try:
        from gptdist import _ptxvm
    except ImportError as error:
        raise MissingError(f"gptdist._ptxvm is not built: {error}") from None

    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"command   python -m benchmarks.ptxvm {shlex.join(sys.argv[1:])}".rstrip())
    print(f"hardware  {doctor.collect()['cpu']['model']}, one core, {platform.system()} {platform.machine()}")
    print(f"\nmedians of {args.rounds} rounds, CPU time\n")
    print(
        "| kernel | warp instructions | mma | M instr/s, checks | M instr/s, races off | M mma/s, "
        "checks | M mma/s, races off |"
    )
    print("|---|---|---|---|---|---|---|")
    module = _ptxvm.Module(compile_kernels())
    for name, *setup in kernels():
        times = {True: [], False: []}
        for _ in range(args.rounds):
            for races, list_s in times.items():
                seconds, counters = launch_s(module, name, *setup, races)
                list_s.append(seconds)
        checked, unchecked = (statistics.median(times[races]) for races in (True, False))
        instructions, mma = counters["instructions"], counters["mma"]
        rates = [f"{instructions / s / 1e6:.1f}" for s in (checked, unchecked)]
        rates += [f"{mma / s / 1e6:.2f}" if mma else "" for s in (checked, unchecked)]
        print(f"| {name} | {instructions} | {mma or ''} | {' | '.join(rates)} |")


if __name__ == "__main__":
    main()
