// Philox4x32-7 on a CPU, bit for bit that of gptdist/ops/random.py, which states the layout of counters and keys.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// In an unnamed namespace: each instruction set that includes it has its own copy.
#pragma once

#include <cstdint>

namespace gptdist::cpu {
namespace {

// Counters c0[i] .. c3[i] of kCalls calls, which become their output words; the calls are the lanes of vectors.
template <int kCalls>
inline __attribute__((always_inline)) void philox4x32(uint32_t (&c0)[kCalls], uint32_t (&c1)[kCalls],
                                                      uint32_t (&c2)[kCalls], uint32_t (&c3)[kCalls], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t product0 = uint64_t(c0[i]) * 0xD2511F53u, product1 = uint64_t(c2[i]) * 0xCD9E8D57u;
      c0[i] = uint32_t(product1 >> 32) ^ c1[i] ^ k0;
      c1[i] = uint32_t(product1);
      c2[i] = uint32_t(product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = uint32_t(product0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace gptdist::cpu
