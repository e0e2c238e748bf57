// What CPU kernels are written with: one scalar source, compiled for each instruction set through target attributes.
// Loads and stores have neither branches nor library calls, so that compilers vectorise the loops around them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

#define GPTDIST_INLINE inline __attribute__((always_inline))

// Before a loop whose turns touch each other's memory nowhere. (__restrict__ does not survive inlining in GCC 12.)
#ifdef __clang__
#define GPTDIST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GPTDIST_INDEPENDENT _Pragma("GCC ivdep")
#endif

#ifdef GPTDIST_X86
#define GPTDIST_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define GPTDIST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512)))
#else  // GCC prefers 256-bit vectors unless told
#define GPTDIST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

namespace gptdist::cpu {

GPTDIST_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GPTDIST_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

GPTDIST_INLINE float load(const float* p) { return *p; }
GPTDIST_INLINE float load(const Bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }

GPTDIST_INLINE float load(const Fp16* p) {
  const uint32_t magnitude = uint32_t(p->bits & 0x7fffu) << 13;  // in a float's place, but for the exponent's bias
  const uint32_t value = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // subnormals become normal
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;       // inf and NaN keep the highest exponent
  return bits_to_float(value | special | uint32_t(p->bits & 0x8000u) << 16);
}

// Stores round to nearest even; NaN stays NaN.

GPTDIST_INLINE void store(float* p, float value) { *p = value; }

GPTDIST_INLINE void store(Bf16* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = uint16_t(is_nan ? 0x7fc0u : rounded);
}

GPTDIST_INLINE void store(Fp16* p, float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: 0.5 has the unit in the last place of fp16's subnormals, so that the addition rounds to it.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // from 65536
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  p->bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

}  // namespace gptdist::cpu
