"""PTX that was not written for the machine: CUDA through nvcc, and the style of other compilers."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ptx_text import HEADER, _ptxvm, buffer

SOURCE = r"""
#include <cuda_bf16.h>

extern "C" __global__ void collatz(const unsigned* x, unsigned* steps, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned v = x[i], count = 0;
  while (v != 1) {
    if (v % 2) v = 3 * v + 1; else v /= 2;
    ++count;
  }
  steps[i] = count;
}

extern "C" __global__ void sum_rows(const float* x, float* sums, int width) {
  __shared__ float parts[32];
  float s = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) s += x[(long long)blockIdx.x * width + i];
  for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(~0u, s, m);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
    for (int m = 16; m; m >>= 1) s += __shfl_down_sync(~0u, s, m);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
  }
}

extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins, int n) {
  __shared__ unsigned local[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) if (local[i]) atomicAdd(&bins[i], local[i]);
}

extern "C" __global__ void matmul(const float* a, const float* b, float* c, int n) {
  __shared__ float ta[16][16], tb[16][17];
  int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    ta[threadIdx.y][threadIdx.x] = row < n && k + threadIdx.x < n ? a[row * n + k + threadIdx.x] : 0;
    tb[threadIdx.y][threadIdx.x] = column < n && k + threadIdx.y < n ? b[(k + threadIdx.y) * n + column] : 0;
    __syncthreads();
    for (int i = 0; i < 16; ++i) sum += ta[threadIdx.y][i] * tb[i][threadIdx.x];
    __syncthreads();
  }
  if (row < n && column < n) c[row * n + column] = sum;
}

extern "C" __global__ void matmul_race(const float* a, const float* b, float* c, int n) {
  // The second barrier is missing.
  __shared__ float ta[16][16], tb[16][17];
  int row = threadIdx.y, column = threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    ta[row][column] = a[row * n + k + column];
    tb[row][column] = b[(k + row) * n + column];
    __syncthreads();
    for (int i = 0; i < 16; ++i) sum += ta[row][i] * tb[i][column];
  }
  c[row * n + column] = sum;
}

__device__ unsigned pack(__nv_bfloat16 x, __nv_bfloat16 y) { __nv_bfloat162 p(x, y);
return *reinterpret_cast<unsigned*>(&p); }

extern "C" __global__ void gemm_mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int n, int k) {
  // a [16, k], b [n, k]
  int lane = threadIdx.x, g = lane / 4, t = lane % 4, column = blockIdx.x * 8;
  float s[4] = {0, 0, 0, 0};
  for (int i = 0; i < k; i += 16) {
    const __nv_bfloat16 *pa = a + g * k + i + 2 * t, *pb = b + (column + g) * k + i + 2 * t;
    unsigned a0 = pack(pa[0], pa[1]), a1 = pack(pa[8 * k], pa[8 * k + 1]), a2 = pack(pa[8], pa[9]),
    a3 = pack(pa[8 * k + 8], pa[8 * k + 9]);
    unsigned b0 = pack(pb[0], pb[1]), b1 = pack(pb[8], pb[9]);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  for (int e = 0; e < 4; ++e) c[(g + 8 * (e / 2)) * n + column + 2 * t + e % 2] = s[e];
}

__constant__ float weights[4] = {1, 2, 3, 4};
__device__ __noinline__ float poly(float x, int degree) { float y = 0; for (int i = 0; i <= degree;
++i) y = y * x + weights[i & 3]; return y; }

extern "C" __global__ void functions(const float* x, float* y, int n, double scale, long long modulus) {
  // The math library.
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i], table[8];
  for (int j = 0; j < 8; ++j) table[(j * (n + 1)) & 7] = v + j;
   // an index that the compiler does not know: local memory
  switch (i % 5) {
    case 0: v = expf(v) + logf(fabsf(v) + 1); break;
    case 1: v = tanhf(v) / sqrtf(fabsf(v) + 1); break;
    case 2: v = powf(fabsf(v), 1.5f) + erff(v); break;
    case 3: v = sinf(v) + cosf(v); break;
    default: v = poly(v, i % 4) + table[i & 7]; break;
  }
  y[i] = float(v * scale) + float((long long)i * 7919 % modulus) + (i / 3) % 7;
}
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> object:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH (pip's nvidia-cuda-nvcc can supply it)")
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "samples.cu").write_text(SOURCE)
    subprocess.run(
        ["nvcc", "-O3", "-arch=compute_80", "-ptx", "samples.cu", "-o", "samples.ptx"],
        cwd=folder,
        check=True,
        timeout=120,
        capture_output=True,
    )
    return _ptxvm.Module(Path(folder / "samples.ptx").read_text())


def run(module, kernel, grid, block, layout, *values, **options):
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    packed = struct.pack(layout, *(v.ctypes.data if isinstance(v, np.ndarray) else v for v in values))
    options = {"global_races": True} | options
    return module.launch(
        kernel, grid, block, packed, buffers=[buffer(a, f"argument {i}") for i, a in enumerate(arrays)], **options
    )


def test_divergent_loops(cuda):
    x, steps = np.arange(1, 301, dtype=np.uint32), np.zeros(300, np.uint32)
    run(cuda, "collatz", (3, 1, 1), (128, 1, 1), "QQi", x, steps, 300)

    def length(n):
        return 0 if n == 1 else 1 + length(3 * n + 1 if n % 2 else n // 2)

    assert steps.tolist() == [length(n) for n in range(1, 301)]


def test_reductions_and_atomics(cuda):
    x, sums = np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32), np.zeros(5, np.float32)
    run(cuda, "sum_rows", (5, 1, 1), (256, 1, 1), "QQi", x, sums, 1000)
    np.testing.assert_allclose(sums, x.astype(np.float64).sum(1), rtol=1e-4, atol=1e-4)
    data, bins = np.random.default_rng(1).integers(0, 256, 3000).astype(np.uint8), np.zeros(256, np.uint32)
    run(cuda, "histogram", (3, 1, 1), (128, 1, 1), "QQi", data, bins, 3000)
    np.testing.assert_array_equal(bins, np.bincount(data, minlength=256))


def test_tiled_matmul(cuda):
    n = 40
    a, b = (np.random.default_rng(i).standard_normal((n, n)).astype(np.float32) for i in range(2))
    c = np.zeros((n, n), np.float32)
    run(cuda, "matmul", (3, 3, 1), (16, 16, 1), "QQQi", a, b, c, n)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)


def test_a_missing_barrier_is_found_whatever_the_schedule(cuda):
    a, b, c = (np.ones((32, 32), np.float32) for _ in range(3))
    for seed in range(3):
        with pytest.raises(_ptxvm.Fault, match="races with"):
            run(cuda, "matmul_race", (1, 1, 1), (16, 16, 1), "QQQi", a, b, c, 32, seed=seed)


def test_tensor_core_gemm(cuda):
    n, k = 32, 64
    a, b = (
        torch.randn(16, k, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16(),
    )
    words = [t.view(torch.int16).numpy() for t in (a, b)]
    c = np.zeros((16, n), np.float32)
    counters = run(cuda, "gemm_mma", (n // 8, 1, 1), (32, 1, 1), "QQQii", *words, c, n, k)
    np.testing.assert_allclose(c, (a.double() @ b.double().T).numpy(), rtol=1e-5, atol=1e-4)
    assert counters["mma"] == n // 8 * k // 16


def test_the_math_library_calls_and_local_arrays(cuda):
    n = 512
    x = np.linspace(-4, 4, n, dtype=np.float32)
    y = np.zeros(n, np.float32)
    run(cuda, "functions", (4, 1, 1), (128, 1, 1), "QQixxxxdq", x, y, n, 2.0, 101)
    v, i = torch.from_numpy(x.astype(np.float64)), torch.arange(n)
    weights = torch.tensor([1.0, 2, 3, 4]).double()
    poly = torch.stack([sum(weights[j] * v ** (degree - j) for j in range(degree + 1)) for degree in range(4)])[
        i % 4, i
    ]
    cases = [
        v.exp() + (v.abs() + 1).log(),
        v.tanh() / (v.abs() + 1).sqrt(),
        v.abs() ** 1.5 + v.erf(),
        v.sin() + v.cos(),
    ]
    got = torch.from_numpy(y.astype(np.float64))
    tail = (i * 7919 % 101) + i // 3 % 7
    for case, want in enumerate([*cases, poly + v + i % 8]):
        rows = i % 5 == case
        torch.testing.assert_close(got[rows], (want * 2 + tail)[rows], rtol=1e-5, atol=1e-4)


SOFTMAX = (
    HEADER.replace("8.0", "8.4")
    + r"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry softmax_kernel(
	.param .u64 .ptr .global .align 1 softmax_kernel_param_0,
	.param .u64 .ptr .global .align 1 softmax_kernel_param_1,
	.param .u32 softmax_kernel_param_2
)
.reqntid 128, 1, 1
{
	.reg .pred 	%p<10>;
	.reg .b32 	%r<40>;
	.reg .f32 	%f<40>;
	.reg .b64 	%rd<10>;
	.loc	1 5 0
$L__func_begin0:
	ld.param.u64 	%rd1, [softmax_kernel_param_0];
	ld.param.u64 	%rd2, [softmax_kernel_param_1];
$L__tmp0:
	ld.param.u32 	%r1, [softmax_kernel_param_2];
	// begin inline asm
	mov.u32 %r2, %ctaid.x;
	// end inline asm
	mov.u32 	%r3, %tid.x;
	shl.b32 	%r4, %r3, 2;
	mul.lo.s32 	%r5, %r2, %r1;
	setp.lt.s32 	%p1, %r4, %r1;
	mul.wide.s32 	%rd3, %r5, 4;
	add.s64 	%rd4, %rd1, %rd3;
	mul.wide.u32 	%rd5, %r4, 4;
	add.s64 	%rd6, %rd4, %rd5;
	mov.b32 	%r6, -8388608;
	// begin inline asm
	mov.u32 %r10, %r6;
	mov.u32 %r11, %r6;
	mov.u32 %r12, %r6;
	mov.u32 %r13, %r6;
	@%p1 ld.global.L1::evict_last.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd6 + 0 ];
	// end inline asm
	mov.b32 	%f1, %r10;
	mov.b32 	%f2, %r11;
	mov.b32 	%f3, %r12;
	mov.b32 	%f4, %r13;
	max.f32 	%f5, %f1, %f2;
	max.f32 	%f6, %f3, %f4;
	max.f32 	%f7, %f5, %f6;
	mov.b32 	%r14, %f7;
	shfl.sync.bfly.b32	%r15, %r14, 16, 31, -1;
	mov.b32 	%f8, %r15;
	max.f32 	%f7, %f7, %f8;
	mov.b32 	%r14, %f7;
	shfl.sync.bfly.b32	%r15, %r14, 8, 31, -1;
	mov.b32 	%f8, %r15;
	max.f32 	%f7, %f7, %f8;
	mov.b32 	%r14, %f7;
	shfl.sync.bfly.b32	%r15, %r14, 4, 31, -1;
	mov.b32 	%f8, %r15;
	max.f32 	%f7, %f7, %f8;
	mov.b32 	%r14, %f7;
	shfl.sync.bfly.b32	%r15|%p9, %r14, 2, 31, -1;
	mov.b32 	%f8, %r15;
	max.f32 	%f7, %f7, %f8;
	mov.b32 	%r14, %f7;
	shfl.sync.bfly.b32	%r15, %r14, 1, 31, -1;
	mov.b32 	%f8, %r15;
	max.f32 	%f7, %f7, %f8;
	and.b32 	%r16, %r3, 31;
	setp.eq.s32 	%p2, %r16, 0;
	shr.u32 	%r17, %r3, 3;
	and.b32 	%r18, %r17, 12;
	mov.u32 	%r19, global_smem;
	add.s32 	%r20, %r19, %r18;
	mov.b32 	%r21, %f7;
	@%p2 st.shared.b32 [ %r20 + 0 ], %r21;
	bar.sync 	0;
	setp.lt.s32 	%p3, %r3, 4;
	shl.b32 	%r22, %r3, 2;
	add.s32 	%r23, %r19, %r22;
	mov.b32 	%r24, 0;
	@%p3 ld.shared.b32 %r24, [ %r23 + 0 ];
	mov.b32 	%f9, %r24;
	shfl.sync.bfly.b32	%r25, %r24, 2, 31, -1;
	mov.b32 	%f10, %r25;
	max.f32 	%f9, %f9, %f10;
	mov.b32 	%r24, %f9;
	shfl.sync.bfly.b32	%r25, %r24, 1, 31, -1;
	mov.b32 	%f10, %r25;
	max.f32 	%f9, %f9, %f10;
	setp.eq.s32 	%p4, %r3, 0;
	mov.b32 	%r26, %f9;
	@%p4 st.shared.b32 [ %r23 + 0 ], %r26;
	bar.sync 	0;
	ld.shared.f32 	%f11, [global_smem];
	sub.f32 	%f12, %f1, %f11;
	mul.f32 	%f13, %f12, 0f3FB8AA3B;
	ex2.approx.f32 	%f14, %f13;
	sub.f32 	%f15, %f2, %f11;
	mul.f32 	%f16, %f15, 0f3FB8AA3B;
	ex2.approx.f32 	%f17, %f16;
	sub.f32 	%f18, %f3, %f11;
	mul.f32 	%f19, %f18, 0f3FB8AA3B;
	ex2.approx.f32 	%f20, %f19;
	sub.f32 	%f21, %f4, %f11;
	mul.f32 	%f22, %f21, 0f3FB8AA3B;
	ex2.approx.f32 	%f23, %f22;
	add.s64 	%rd7, %rd2, %rd3;
	add.s64 	%rd8, %rd7, %rd5;
	mov.b32 	%r30, %f14;
	mov.b32 	%r31, %f17;
	mov.b32 	%r32, %f20;
	mov.b32 	%r33, %f23;
	mov.b64 	%rd9, {%r30, %r31};
	mov.b64 	{%r30, %r31}, %rd9;
	// begin inline asm
	@%p1 st.global.v4.b32 [ %rd8 + 0 ], { %r30, %r31, %r32, %r33 };
	// end inline asm
	ret;
$L__tmp1:
$L__func_end0:
}
	.file	1 "softmax.py"
	.section	.debug_abbrev
	{
.b8 1
.b8 17
	}
	.section	.debug_macinfo	{	}
"""
)


def test_the_style_of_triton():
    """exp(x - max of the row): predicated vector loads, butterflies, dynamic shared memory, debug lines."""
    module = _ptxvm.Module(SOFTMAX)
    assert module.kernel("softmax_kernel").max_threads == 128
    width = 300
    x, y = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32), np.zeros((3, width), np.float32)
    x = x - x.min() + 1  # an absent lane's maximum is 0 in this kernel
    run(module, "softmax_kernel", (3, 1, 1), (128, 1, 1), "QQi", x, y, width, shared_bytes=16)
    np.testing.assert_allclose(y, np.exp(x - x.max(1, keepdims=True)), rtol=1e-5)
