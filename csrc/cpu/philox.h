// Philox4x32-7 on a CPU, bit for bit that of gptdist/ops/random.py, which states the layout of counters and keys. Included
// by simd_kernels.h after simd.h.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// Lanes are calls, each of which serves four neighbouring columns. Counters are dealt to the lanes so that the transposition
// of 4 x 4 words inside each 128 bits, which processors do in one instruction a step, leaves columns in their order.

namespace gptdist::cpu {
namespace {

constexpr int kColumnsAtOnce = 4 * kLanes;

// The words of the products' 64 bits.
GPTDIST_INLINE void multiply(Words a, uint32_t factor, Words& high, Words& low) {
#if GPTDIST_ISA >= 2
  const __m512i x = __m512i(a), y = _mm512_set1_epi32(int32_t(factor));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  low = Words(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
  high = Words(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif GPTDIST_ISA == 1
  const __m256i x = __m256i(a), y = _mm256_set1_epi32(int32_t(factor));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  low = Words(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high = Words(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
  typedef uint64_t Wide __attribute__((vector_size(16)));  // SSE2's and NEON's products are of every other word
  const Wide mask = Wide{} + 0xffffffffu, even = (Wide(a) & mask) * uint64_t(factor), odd = (Wide(a) >> 32) * uint64_t(factor);
  low = Words((even & mask) | (odd << 32));
  high = Words((even >> 32) | (odd & ~mask));
#endif
}

// In each 128 bits of two vectors: words from[0..3] of the eight that a's and b's four make.
template <int k0, int k1, int k2, int k3>
GPTDIST_INLINE Words pick(Words a, Words b) {
  const auto place = [](int from, int block) constexpr { return 4 * block + from % 4 + (from < 4 ? 0 : kLanes); };
#define GPTDIST_BLOCK(block) place(k0, block), place(k1, block), place(k2, block), place(k3, block)
#if GPTDIST_ISA >= 2
  return __builtin_shufflevector(a, b, GPTDIST_BLOCK(0), GPTDIST_BLOCK(1), GPTDIST_BLOCK(2), GPTDIST_BLOCK(3));
#elif GPTDIST_ISA == 1
  return __builtin_shufflevector(a, b, GPTDIST_BLOCK(0), GPTDIST_BLOCK(1));
#else
  return __builtin_shufflevector(a, b, GPTDIST_BLOCK(0));
#endif
#undef GPTDIST_BLOCK
}

// Words of kColumnsAtOnce columns from 4 * quad: words[m][lane] is that of column 4 * quad + m * kLanes + lane.
GPTDIST_INLINE void random_words(uint32_t quad, uint32_t row, uint32_t sample, uint32_t site_and_head, uint64_t key,
                                 Words (&words)[4]) {
  const Words lane = Words(lane_numbers());
  Words c0 = (lane % 4) * uint32_t(kLanes / 4) + lane / 4 + quad, c1 = Words{} + row, c2 = Words{} + sample;
  Words c3 = Words{} + site_and_head;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Words low01 = pick<0, 4, 1, 5>(c0, c1), high01 = pick<2, 6, 3, 7>(c0, c1);
  const Words low23 = pick<0, 4, 1, 5>(c2, c3), high23 = pick<2, 6, 3, 7>(c2, c3);
  words[0] = pick<0, 1, 4, 5>(low01, low23);
  words[1] = pick<2, 3, 6, 7>(low01, low23);
  words[2] = pick<0, 1, 4, 5>(high01, high23);
  words[3] = pick<2, 3, 6, 7>(high01, high23);
}

}  // namespace
}  // namespace gptdist::cpu
