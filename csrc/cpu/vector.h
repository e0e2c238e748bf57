// What the CPU kernels share: one scalar source, plain C++ without branches or library calls in its loops, that compilers
// turn into vector code. It is compiled three times through target attributes; the level is chosen at run time.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

#define GPTDIST_INLINE inline __attribute__((always_inline))
#define GPTDIST_LAMBDA __attribute__((always_inline))

// Before a loop whose turns touch each other's memory nowhere. (__restrict__ does not survive inlining in GCC 12.)
#ifdef __clang__
#define GPTDIST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GPTDIST_INDEPENDENT _Pragma("GCC ivdep")
#endif

// GPTDIST_FOR_EACH_ISA(kernel), after `template <class Args> GPTDIST_INLINE void kernel(const Args&)`, defines
// kernel_at(args, isa), which runs the kernel compiled for that instruction set.
#ifdef GPTDIST_X86
#define GPTDIST_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define GPTDIST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"), min_vector_width(512)))
#else  // GCC prefers 256-bit vectors unless told
#define GPTDIST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#define GPTDIST_FOR_EACH_ISA(kernel)                                                 \
  template <class Args> GPTDIST_AVX2 void kernel##_avx2(const Args& a) { kernel(a); }     \
  template <class Args> GPTDIST_AVX512 void kernel##_avx512(const Args& a) { kernel(a); } \
  template <class Args> void kernel##_at(const Args& a, Isa isa) {                   \
    if (isa >= Isa::kAvx512) return kernel##_avx512(a);                              \
    if (isa == Isa::kAvx2) return kernel##_avx2(a);                                  \
    kernel(a);                                                                       \
  }
#else
#define GPTDIST_FOR_EACH_ISA(kernel) \
  template <class Args> void kernel##_at(const Args& a, Isa) { kernel(a); }
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
  const uint32_t magnitude = uint32_t(p->bits & 0x7fffu) << 13;  // at its place in a float, but for the exponent's bias
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

// exp(x) / 2^n for the integer n nearest to x / ln2: of r = x - n ln2, |r| <= ln2 / 2, a polynomial of degree 6 (Cephes
// expf). The kernels find n and multiply by 2^n each in its way.
GPTDIST_INLINE float exp_of_rest(float x, float n) {
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// A sum over i in [0, n) of term(i) in kLanes partial sums (four AVX-512 registers), then those in pairs: the order that
// vector code wants, fixed by n alone.
constexpr int64_t kLanes = 64;

struct Lanes {
  float sum[kLanes] = {};

  GPTDIST_INLINE float total() {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    return sum[0];
  }
};

// Calls body(i, lane) for i in [0, n), lane = i mod kLanes: a vector loop and a tail.
template <class Body>
GPTDIST_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) body(i + lane, lane);
  }
  for (int64_t lane = 0; lane < n - i; ++lane) body(i + lane, lane);
}

}  // namespace gptdist::cpu
