// The vector kernels for AVX-512 (-DGPTDIST_ISA=2) and AVX-512 with bf16 products (3), in place of simd_avx512.cpp and
// simd_avx512_bf16.cpp, on a processor that has neither: the compiler lowers vectors of 16 floats to what there is, and
// the intrinsics are written out here, as Intel's Intrinsics Guide defines them. For tests/test_cpu_sanitize.py.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include <immintrin.h>

#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/dropout.h"
#include "cpu/few_rows_linear.h"

namespace emulated {

template <class To, class From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct U32 { uint32_t lane[16]; };
struct U64 { uint64_t lane[8]; };
struct F32 { float lane[16]; };
struct U16 { uint16_t lane[32]; };
struct HalfU16 { uint16_t lane[16]; };

template <class Lanes, class Vector, class Lane>  // lane(i) for each i, as Vector
Vector each(const Lane& lane) {
  Lanes to;
  constexpr int count = sizeof to.lane / sizeof to.lane[0];
  for (int i = 0; i < count; ++i) to.lane[i] = lane(i);
  return as<Vector>(to);
}

inline __m512i loadu(const void* from) {
  __m512i x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void storeu(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
inline __m512i set1(int32_t x) {
  return each<U32, __m512i>([&](int) { return uint32_t(x); });
}

inline __m512i widen_u16(__m256i x) {
  const auto a = as<HalfU16>(x);
  return each<U32, __m512i>([&](int i) { return a.lane[i]; });
}

inline __m512 max_ps(__m512 x, __m512 y) {
  const auto a = as<F32>(x), b = as<F32>(y);
  return each<F32, __m512>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

inline __m512i mul_epu32(__m512i x, __m512i y) {
  const auto a = as<U64>(x), b = as<U64>(y);
  return each<U64, __m512i>([&](int i) { return (a.lane[i] & 0xffffffffu) * (b.lane[i] & 0xffffffffu); });
}
inline __m512i slli_epi64(__m512i x, unsigned by) {
  const auto a = as<U64>(x);
  return each<U64, __m512i>([&](int i) { return a.lane[i] << by; });
}
inline __m512i srli_epi64(__m512i x, unsigned by) {
  const auto a = as<U64>(x);
  return each<U64, __m512i>([&](int i) { return a.lane[i] >> by; });
}
inline __m512i mask_blend_epi32(uint16_t mask, __m512i x, __m512i y) {
  const auto a = as<U32>(x), b = as<U32>(y);
  return each<U32, __m512i>([&](int i) { return mask >> i & 1 ? b.lane[i] : a.lane[i]; });
}

// In each block of 128 bits the lower or upper halves of x and y, interleaved.
template <class Lanes>
__m512i unpack(__m512i x, __m512i y, bool upper) {
  const auto a = as<Lanes>(x), b = as<Lanes>(y);
  constexpr int block = 16 / sizeof a.lane[0];
  return each<Lanes, __m512i>([&](int i) {
    const int from = i / block * block + i % block / 2 + (upper ? block / 2 : 0);
    return i % 2 ? b.lane[from] : a.lane[from];
  });
}

// Blocks of 128 bits: two of x, then two of y, each chosen by two bits.
inline __m512i shuffle_i32x4(__m512i x, __m512i y, int choice) {
  const auto a = as<U32>(x), b = as<U32>(y);
  return each<U32, __m512i>([&](int i) {
    const int from = (choice >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? a.lane[from] : b.lane[from];
  });
}

// The bf16 instructions take subnormal numbers as zero and give zero for them.
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float widen_bf16(uint16_t x) { return flushed(as<float>(uint32_t(x) << 16)); }
inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return uint16_t(as<uint32_t>(x) >> 16 | 0x40);
  const uint32_t bits = as<uint32_t>(flushed(x));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __m256i cvtneps_pbh(__m512 x) {
  const auto a = as<F32>(x);
  return each<HalfU16, __m256i>([&](int i) { return to_bf16(a.lane[i]); });
}
inline __m512i cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const auto a = as<F32>(lower), b = as<F32>(upper);
  return each<U16, __m512i>([&](int i) { return to_bf16(i < 16 ? a.lane[i] : b.lane[i - 16]); });
}
template <class Pairs>
__m512 dpbf16_ps(__m512 sum, Pairs x, Pairs y) {
  const auto c = as<F32>(sum);
  const auto a = as<U16>(x), b = as<U16>(y);
  return each<F32, __m512>([&](int i) {
    const auto term = [&](int k, float to) { return std::fma(widen_bf16(a.lane[k]), widen_bf16(b.lane[k]), to); };
    return flushed(term(2 * i, flushed(term(2 * i + 1, flushed(c.lane[i])))));
  });
}

}  // namespace emulated

#define _mm512_loadu_si512(from) emulated::loadu(from)
#define _mm512_storeu_si512(to, x) emulated::storeu(to, x)
#define _mm512_set1_epi32(x) emulated::set1(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen_u16(x)
#define _mm512_max_ps(x, y) emulated::max_ps(x, y)
#define _mm512_mul_epu32(x, y) emulated::mul_epu32(x, y)
#undef _mm512_slli_epi64
#define _mm512_slli_epi64(x, by) emulated::slli_epi64(x, by)
#undef _mm512_srli_epi64
#define _mm512_srli_epi64(x, by) emulated::srli_epi64(x, by)
#define _mm512_mask_blend_epi32(mask, x, y) emulated::mask_blend_epi32(mask, x, y)
#define _mm512_unpacklo_epi32(x, y) emulated::unpack<emulated::U32>(x, y, false)
#define _mm512_unpackhi_epi32(x, y) emulated::unpack<emulated::U32>(x, y, true)
#define _mm512_unpacklo_epi64(x, y) emulated::unpack<emulated::U64>(x, y, false)
#define _mm512_unpackhi_epi64(x, y) emulated::unpack<emulated::U64>(x, y, true)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(x, y, choice) emulated::shuffle_i32x4(x, y, choice)
#define _mm512_cvtneps_pbh(x) emulated::cvtneps_pbh(x)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated::cvtne2ps_pbh(upper, lower)
#define _mm512_dpbf16_ps(sum, x, y) emulated::dpbf16_ps(sum, x, y)

#include "cpu/simd_kernels.h"
