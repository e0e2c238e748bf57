// Which tensor of a list a block works on. The table of a list is described in kernels.h.
#pragma once

#include <cstdint>

namespace gptdist::cuda {

// The last tensor whose first chunk is not beyond `chunk`. All threads of the block must call; each looks at every
// blockDim.x-th tensor: one load for all lists of up to 256, where a binary search would wait for eight.
__device__ __forceinline__ int32_t tensor_of_chunk(const int64_t* first_chunks, int32_t count, int64_t chunk) {
  int32_t begun = 0;
  for (int32_t first = 0; first < count; first += blockDim.x) {
    const int32_t i = first + threadIdx.x;
    begun += __syncthreads_count(i < count && first_chunks[i] <= chunk);
  }
  return begun - 1;
}

__device__ __forceinline__ bool aligned_to(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace gptdist::cuda
