// Reductions over the 32 lanes of a warp. All lanes must call; all get the same bits, as each step adds the same pairs
// in both partners.
#pragma once

#include "vector.cuh"

namespace gptdist::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class Sum>  // float or double
__device__ __forceinline__ Sum warp_sum(Sum x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ __forceinline__ float2 warp_sum(float2 x) { return make_float2(warp_sum(x.x), warp_sum(x.y)); }

__device__ __forceinline__ float warp_max(float x) {  // ignores NaN
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

// The sum over a block of up to 32 whole warps, the same bits in all its threads. `scratch` has 32 elements and must
// not be in use by an earlier reduction that a thread may still be reading.
template <class Sum>  // float, float2 or double
__device__ __forceinline__ Sum block_sum(Sum x, Sum* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : Sum{});
}

}  // namespace gptdist::cuda
