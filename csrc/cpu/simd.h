// Vectors of kLanes floats for the instruction set of the file that includes this one (simd_*.cpp), which sets
// GPTDIST_ISA and the compiler's target first. Arithmetic is the compilers' vector extension: one source for every
// processor. Intrinsics stand only where it has no word for an instruction.
//
// Everything is in an unnamed namespace: each instruction set has its own copy, and the linker never mixes them.

#include <cstdint>
#include <cstring>

#define GPTDIST_INLINE inline __attribute__((always_inline))
#define GPTDIST_LAMBDA __attribute__((always_inline))

namespace gptdist::cpu {
namespace {

constexpr int kLanes = GPTDIST_ISA >= 2 ? 16 : GPTDIST_ISA == 1 ? 8 : 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class Vector>
GPTDIST_INLINE Vector load_as(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
GPTDIST_INLINE void store_as(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

GPTDIST_INLINE Words widen(Halves x) {  // GCC 12 does it in five instructions where the processor has one
#if GPTDIST_ISA >= 2
  return Words(_mm512_cvtepu16_epi32(__m256i(x)));
#elif GPTDIST_ISA == 1
  return Words(_mm256_cvtepu16_epi32(__m128i(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}

GPTDIST_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
GPTDIST_INLINE Floats load(const Bf16* from) { return Floats(widen(load_as<Halves>(from)) << 16); }

GPTDIST_INLINE void store(float* to, Floats value) { store_as(to, value); }
GPTDIST_INLINE void store(Bf16* to, Floats value) {  // round to nearest even; NaN stays NaN
  const Words bits = Words(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words chosen = value == value ? rounded : Words{} + 0x7fc0u;
  store_as(to, __builtin_convertvector(chosen, Halves));
}

GPTDIST_INLINE Floats broadcast(float value) { return Floats{} + value; }

GPTDIST_INLINE Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// a > b ? a : b, which is b where either is NaN
GPTDIST_INLINE Floats larger(Floats a, Floats b) {
#if GPTDIST_ISA >= 2
  return Floats(_mm512_max_ps(__m512(a), __m512(b)));
#elif GPTDIST_ISA == 1
  return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

// All lanes by halves: the upper ones join the lower ones until one is left.
template <int kCount, class Vector, class Join>
GPTDIST_INLINE float fold(Vector x, const Join& join) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr size_t kBytes = kCount / 2 * sizeof(float);
    typedef float Half __attribute__((vector_size(kBytes)));
    Half low, high;
    std::memcpy(&low, &x, kBytes);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + kBytes, kBytes);
    return fold<kCount / 2>(join(low, high), join);
  }
}

GPTDIST_INLINE float sum(Floats x) {
  return fold<kLanes>(x, [](auto a, auto b) GPTDIST_LAMBDA { return a + b; });
}

GPTDIST_INLINE float largest(Floats x) {
  return fold<kLanes>(x, [](auto a, auto b) GPTDIST_LAMBDA { return a > b ? a : b; });
}

// 2^x for x < 128, to a relative error of 1.7e-7; exactly 1 at 0, 0 below -126.5, NaN for NaN.
// x = n + r, |r| <= 1/2: a minimax polynomial in r, times the float whose exponent is n.
GPTDIST_INLINE Floats exp2(Floats x) {
  // 1.5 * 2^23 leaves the nearest integer in the low bits; 127 is the bias of exponents.
  constexpr float kRound = 12582912.0f + 127.0f;
  x = larger(broadcast(-127.0f), x);
  const Floats shifted = x + kRound;
  const Floats r = x - (shifted - kRound);
  Floats p = r * 1.32647273e-3f + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  return p * Floats(Words(shifted) << 23);
}

}  // namespace
}  // namespace gptdist::cpu
