// 16-bit floating point on the host: f16 and bf16 values, conversions with one rounding, and sums that round once.
//
// Arithmetic on 16-bit values is done in double and rounded once: an inexact double is first rounded to odd (its last
// bit set), after which any narrower rounding of it equals the rounding of the exact value (Boldo & Melquiond, 2008).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptxvm {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

enum class Rounding : uint8_t { kNearest, kZero, kDown, kUp, kNearestAway };

struct F16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

// Half-way cases and directions, for a magnitude whose dropped part is `rest` of `2 * half`.
inline bool rounds_up(Rounding mode, bool negative, uint64_t rest, uint64_t half, bool odd) {
  switch (mode) {
    case Rounding::kNearest:
      return rest > half || (rest == half && odd);
    case Rounding::kNearestAway:
      return rest >= half;
    case Rounding::kZero:
      return false;
    case Rounding::kDown:
      return negative && rest != 0;
    case Rounding::kUp:
      return !negative && rest != 0;
  }
  return false;
}

inline double to_double(Bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float to_float(Bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline double to_double(F16 x) { return to_float(x); }

// A double to a format of `kMantissa` stored mantissa bits and `kExponent` exponent bits, rounded once; a NaN becomes
// the canonical one (all ones but the sign).
template <int kMantissa, int kExponent>
inline uint32_t narrow(double value, Rounding mode) {
  const uint64_t bits = bits_as<uint64_t>(value);
  const bool negative = bits >> 63;
  constexpr int kSignAt = kMantissa + kExponent;
  const uint32_t sign = negative ? 1u << kSignAt : 0;
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kInfinity = uint32_t((1 << kExponent) - 1) << kMantissa;
  if (std::isnan(value)) return (1u << kSignAt) - 1;
  if (std::isinf(value)) return sign | kInfinity;
  int exponent = int(bits >> 52 & 2047) - 1023;
  uint64_t mantissa = bits & ((1ull << 52) - 1);
  if ((bits >> 52 & 2047) == 0) {
    if (mantissa == 0) return sign;
    exponent = -1022;  // far below anything these formats hold: only its being non-zero matters
  } else {
    mantissa |= 1ull << 52;
  }
  int drop = 52 - kMantissa;
  int stored = exponent + kBias;
  if (stored <= 0) {  // subnormal in the narrow format
    drop += 1 - stored;
    stored = 0;
  }
  if (drop > 63) drop = 63;
  uint64_t kept = mantissa >> drop;
  const uint64_t rest = mantissa & ((1ull << drop) - 1), half = 1ull << (drop - 1);
  if (stored > 0) kept -= 1ull << kMantissa;  // the leading one is implied
  uint64_t result = (uint64_t(stored) << kMantissa) + kept;
  if (stored >= (1 << kExponent) - 1) {  // too large before rounding
    result = kInfinity;
    if (mode == Rounding::kZero || (mode == Rounding::kDown && !negative) || (mode == Rounding::kUp && negative))
      result = kInfinity - 1;
    return sign | uint32_t(result);
  }
  if (rounds_up(mode, negative, rest, half, kept & 1)) result += 1;
  return sign | uint32_t(result);
}

inline F16 to_f16(double value, Rounding mode = Rounding::kNearest) { return {uint16_t(narrow<10, 5>(value, mode))}; }

inline Bf16 to_bf16(double value, Rounding mode = Rounding::kNearest) { return {uint16_t(narrow<7, 8>(value, mode))}; }

inline float to_f32(double value, Rounding mode) { return bits_as<float>(narrow<23, 8>(value, mode)); }

// The common case, without branches: vectorises.
inline uint16_t bf16_nearest(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

// a + b, its last bit set where the sum is not exact.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double b_part = sum - a, error = (a - (sum - b_part)) + (b - b_part);
  if (error == 0) return sum;
  const uint64_t bits = bits_as<uint64_t>(sum);
  if (bits & 1) return sum;
  const bool away = (error > 0) == (sum > 0);
  return bits_as<double>(away ? bits + 1 : bits - 1);
}

inline double quiet_nan() { return bits_as<double>(0x7ff8000000000000ull); }
inline float canonical_nan() { return bits_as<float>(0x7fffffffu); }

}  // namespace ptxvm
