// bias_gelu on a CPU: y = gelu(x + b), tanh approximation.
//
//   h = x + b,  u = sqrt(2/pi) (h + 0.044715 h^3),  e = exp(-2u),  s = 1 / (1 + e)     [s = (1 + tanh u) / 2]
//   y  = h s
//   dx = dy (s + h s (e s) 2 u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 h^2)              [e s = 1 - s, uncancelled]
//   db = sum over rows of dx
//
// Memory, n = rows * channels elements of 4 (fp32) or 2 (bf16) bytes: forward reads n and writes n; backward reads 2n,
// writes n, and 4 bytes * channels * ceil(rows / kRowsPerPartial) of partial sums twice. All arithmetic is fp32.
//
// Launch: one call handles whole rows on one thread; ops.cpp gives threads ranges of kRowsPerPartial-row blocks.

#include "bias_gelu.h"

#include "vector.h"

namespace gptdist::cpu {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// Channels per tile: x, dy, dx, bias and partial of a tile (12 KiB in fp32) stay in a 32 KiB first-level cache
// while the rows pass.
constexpr int64_t kTile = 1024;

// x with its magnitude cut to 87, beyond which exp leaves a float's range and gelu's factors have long settled; NaN
// becomes 87. Written without a comparison: GCC 12 turns one into branches that each end in a division, and ran at less
// than half the speed ([16, 3072] fp32, AVX-512: 53 us against 24).
GPTDIST_INLINE float clamp_magnitude(float x) {
  constexpr int32_t kLimit = 0x42ae0000;  // 87.0f
  const uint32_t bits = float_to_bits(x);
  const int32_t excess = int32_t(bits & 0x7fffffffu) - kLimit;
  const int32_t cut = kLimit + (excess & (excess >> 31));  // min(magnitude, kLimit)
  return bits_to_float((bits & 0x80000000u) | uint32_t(cut));
}

// exp(x) to 2 ulp.
GPTDIST_INLINE float fast_exp(float x) {
  x = clamp_magnitude(x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float p = exp_of_rest(x, shifted - kRound);
  const uint32_t exponent = float_to_bits(shifted) << 23;  // n mod 512; the sign of 1.5 * 2^23 shifts out
  return bits_to_float(float_to_bits(p) + exponent);
}

GPTDIST_INLINE float gelu(float h) {
  const float u = kSqrt2OverPi * (h + kCubic * h * h * h);
  return h / (1.0f + fast_exp(-2.0f * u));
}

GPTDIST_INLINE float gelu_slope(float h) {
  const float u = kSqrt2OverPi * (h + kCubic * h * h * h);
  const float e = fast_exp(-2.0f * u);
  const float s = 1.0f / (1.0f + e);
  const float u_slope = kSqrt2OverPi * (1.0f + 3.0f * kCubic * h * h);
  return s + h * s * (e * s) * 2.0f * u_slope;
}

template <class T, bool kBias>
GPTDIST_INLINE void forward_rows(const Forward<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.channels;
    T* __restrict__ y = a.y + row * a.channels;
    for (int64_t c = 0; c < a.channels; ++c) {
      store(y + c, gelu(load(x + c) + (kBias ? a.bias[c] : 0.0f)));
    }
  }
}

template <class T, bool kBias>
GPTDIST_INLINE void backward_tile(const Backward<T>& a, int64_t begin, int64_t end) {
  float sum[kTile] = {};
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.channels + begin;
    const T* dy = a.dy + row * a.channels + begin;
    const float* bias = kBias ? a.bias + begin : nullptr;
    T* __restrict__ dx = a.dx + row * a.channels + begin;
    for (int64_t c = 0; c < end - begin; ++c) {
      const float g = load(dy + c) * gelu_slope(load(x + c) + (kBias ? bias[c] : 0.0f));
      store(dx + c, g);
      sum[c] += g;
    }
  }
  if (a.partial != nullptr) std::memcpy(a.partial + begin, sum, (end - begin) * sizeof(float));
}

template <class T>
GPTDIST_INLINE void forward(const Forward<T>& a) {
  a.bias != nullptr ? forward_rows<T, true>(a) : forward_rows<T, false>(a);
}

template <class T>
GPTDIST_INLINE void backward(const Backward<T>& a) {
  for (int64_t begin = 0; begin < a.channels; begin += kTile) {
    const int64_t end = begin + kTile < a.channels ? begin + kTile : a.channels;
    a.bias != nullptr ? backward_tile<T, true>(a, begin, end) : backward_tile<T, false>(a, begin, end);
  }
}

GPTDIST_FOR_EACH_ISA(forward)
GPTDIST_FOR_EACH_ISA(backward)

}  // namespace

void bias_gelu_forward(const Forward<float>& args, Isa isa) { forward_at(args, isa); }
void bias_gelu_forward(const Forward<Bf16>& args, Isa isa) { forward_at(args, isa); }
void bias_gelu_backward(const Backward<float>& args, Isa isa) { backward_at(args, isa); }
void bias_gelu_backward(const Backward<Bf16>& args, Isa isa) { backward_at(args, isa); }

void fold_partials(const float* partials, int64_t count, int64_t channels, int64_t begin, int64_t end, float* dbias) {
  for (int64_t c = begin; c < end; ++c) dbias[c] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = begin; c < end; ++c) dbias[c] += partials[i * channels + c];
  }
}

}  // namespace gptdist::cpu
