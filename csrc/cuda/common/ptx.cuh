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

}  // namespace gptdist::cuda
