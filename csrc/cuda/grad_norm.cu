// The L2 norm of a list of tensors: norm = sqrt(sum of x^2 over all elements).
//
// Memory: reads every element once; 8 bytes for each chunk are written and read again, and 16 bytes of table a tensor.
//
// Launch: a block of 256 threads for each chunk of 16384 elements (kNormChunk), all tensors in one launch; a thread
// has four vectors of 16 bytes in flight. A second kernel of one block adds the chunks' sums: 7600 for 124 million
// elements, 60 KB. No atomics: the same bits in every run, and on any GPU.
//
// Accuracy: the squares of the 16 (fp32) or 32 elements that a thread has in flight are added in fp32, everything else
// in fp64. |error| <= 17 eps |norm| with eps = 2^-24, and in practice one rounding: the pieces' errors do not add up.
// An addition in fp64 for 16 elements is nothing even to GPUs that have two fp64 units for 128 of fp32. A tensor that
// is not aligned to 16 bytes, and a ragged end, are added one by one. NaN and inf spread; squares overflow beyond
// 1.8e19, as in PyTorch.

#include "common/host.h"
#include "common/reduce.cuh"
#include "common/tensor_list.cuh"
#include "common/vector.cuh"
#include "launch.h"

namespace gptdist::cuda {
namespace {

// This thread's share of the chunk that begins at `first`.
template <class T>
__device__ __forceinline__ double sum_chunk(const NormTensor& t, int64_t first) {
  constexpr int kVector = vector_elements<T>();
  const T* x = static_cast<const T*>(t.x) + first;
  const int32_t elements = int32_t(t.elements - first < kNormChunk ? t.elements - first : kNormChunk);
  const int32_t vectors = aligned_to(x, kVectorBytes) ? elements / kVector : 0;
  double sum = 0.0;
  for (int32_t i = threadIdx.x; i < vectors; i += kNormVectors * kNormThreads) {
    Vector<T, kVector> loaded[kNormVectors];
#pragma unroll
    for (int k = 0; k < kNormVectors; ++k) {
      const int32_t at = i + k * kNormThreads;
      loaded[k] = at < vectors ? Vector<T, kVector>::load(x + at * kVector) : Vector<T, kVector>::zero();
    }
    float piece = 0.0f;
#pragma unroll
    for (int k = 0; k < kNormVectors; ++k) {
      float values[kVector];
      loaded[k].to_floats(values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) piece += values[j] * values[j];
    }
    sum += double(piece);
  }
  for (int32_t i = vectors * kVector + threadIdx.x; i < elements; i += kNormThreads) {
    sum += double(to_float(x[i]) * to_float(x[i]));
  }
  return sum;
}

}  // namespace

__global__ void __launch_bounds__(kNormThreads) grad_norm_kernel(const __grid_constant__ GradNorm args) {
  __shared__ double scratch[kWarpSize];
  const int32_t i = tensor_of_chunk(args.first_chunks, args.count, blockIdx.x);
  const NormTensor t = args.tensors[i];
  const int64_t first = (blockIdx.x - args.first_chunks[i]) * kNormChunk;
  const double share = t.dtype == Dtype::kFp32   ? sum_chunk<float>(t, first)
                       : t.dtype == Dtype::kBf16 ? sum_chunk<Bf16>(t, first)
                                                 : sum_chunk<Fp16>(t, first);
  const double sum = block_sum(share, scratch);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kNormFoldThreads) grad_norm_fold_kernel(const __grid_constant__ GradNorm args) {
  __shared__ double scratch[kWarpSize];
  double share = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < args.chunks; i += kNormFoldThreads) share += args.partials[i];
  const double sum = block_sum(share, scratch);
  if (threadIdx.x == 0) *args.norm = float(sqrt(sum));
}

// Launcher.

Error grad_norm(const GradNorm& args, Stream stream) {
  const LaunchPlan plan = plan_grad_norm(args);
  if (plan.grid[0] == 0) {
    return error("grad_norm: %lld chunks, expected 1 to as many as a grid holds", (long long)args.chunks);
  }
  if (const Error failure = launch(grad_norm_kernel, plan, args, stream)) return failure;
  return launch(grad_norm_fold_kernel, plan_grad_norm_fold(args), args, stream);
}

}  // namespace gptdist::cuda
