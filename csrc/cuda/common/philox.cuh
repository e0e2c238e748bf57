// Philox4x32-7, bit for bit that of gptdist/ops/random.py, which states the layout of counters and keys.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

namespace gptdist::cuda {

constexpr int kPhiloxRounds = 7;

// Four random words. One call serves four neighbouring columns.
__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(counter.x) * 0xD2511F53u;  // one wide multiplication gives both words
    const uint64_t product1 = uint64_t(counter.z) * 0xCD9E8D57u;
    counter = make_uint4(uint32_t(product1 >> 32) ^ counter.y ^ key.x, uint32_t(product1),
                         uint32_t(product0 >> 32) ^ counter.w ^ key.y, uint32_t(product0));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

__device__ __forceinline__ uint2 philox_key(int64_t key) {
  return make_uint2(uint32_t(key), uint32_t(uint64_t(key) >> 32));
}

}  // namespace gptdist::cuda
