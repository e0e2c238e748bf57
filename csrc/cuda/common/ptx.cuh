// Instructions that CUDA C++ has no intrinsic for.
#pragma once

namespace gptdist::cuda {

// 2^x. Relative error at most 2^-22; results below 2^-126 become 0. 2^-inf = 0, 2^inf = inf, NaN stays NaN.
// exp2f costs two instructions more, for results below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x. At most 1 ulp off; results below 2^-126 become 0. 1 / inf = 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x). Absolute error at most 2^-22 near 1, relative elsewhere; subnormal x counts as 0.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// blockIdx.x and threadIdx.x, read once more: what is computed from them is computed where it stands. Otherwise the
// compiler keeps values from a kernel's beginning for its end, and spills them if the loop between needs the registers.
__device__ __forceinline__ uint32_t reread_block() {
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

__device__ __forceinline__ uint32_t reread_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace gptdist::cuda
