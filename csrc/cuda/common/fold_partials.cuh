// Column sums of partial sums: the second half of every parameter gradient.
//
//   sum[column] = sum over p of partials[p, column]
//
// Reads partials once, writes the sums. A block has 32 columns x kFoldGroups groups; group g adds partials g,
// g + kFoldGroups, ... in ascending order, and the groups are added in ascending order: no atomics, the same bits every
// time. Sixteen groups leave 14 loads to a thread at 216 partials, where one thread per column would wait for 216.
#pragma once

#include "../launch.h"
#include "../launch_plan.h"

namespace gptdist::cuda {

struct FoldPartials {
  const float* partials;  // [count, halves, width]
  float* sums[2];         // [width] for each half that is wanted, overwritten; or nullptr
  int32_t count, halves, width;
};

static __global__ void __launch_bounds__(kFoldColumns * kFoldGroups)
fold_partials_kernel(const __grid_constant__ FoldPartials args) {
  __shared__ float groups[kFoldGroups][kFoldColumns];
  const int32_t column = blockIdx.x * kFoldColumns + threadIdx.x, half = blockIdx.y;
  float* sums = half == 0 ? args.sums[0] : args.sums[1];
  const bool inside = column < args.width && sums != nullptr;
  float sum = 0.0f;
  if (inside) {
    const int64_t stride = int64_t(args.halves) * args.width;
    const float* column_partials = args.partials + int64_t(half) * args.width + column;
#pragma unroll 4
    for (int32_t p = threadIdx.y; p < args.count; p += kFoldGroups) sum += column_partials[p * stride];
  }
  groups[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int g = 1; g < kFoldGroups; ++g) sum += groups[g][threadIdx.x];
  sums[column] = sum;
}

inline Error fold_partials(const FoldPartials& args, Stream stream) {
  return launch(fold_partials_kernel, plan_fold_partials(args.halves, args.width), args, stream);
}

}  // namespace gptdist::cuda
