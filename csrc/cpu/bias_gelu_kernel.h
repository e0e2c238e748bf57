// bias_gelu: y = gelu(x + b), tanh approximation. Included by simd_kernels.h.
//
//   h = x + b,  u = sqrt(2/pi) (h + 0.044715 h^3),  e = exp(-2u),  s = 1 / (1 + e)     [s = (1 + tanh u) / 2]
//   y  = h s
//   dx = dy (s + h s (e s) 2 u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 h^2)              [e s = 1 - s, uncancelled]
//   db = sum over rows of dx
//
// Memory, n = rows * channels elements of 4 (fp32) or 2 (bf16) bytes: forward reads n and writes n; backward reads 2n,
// writes n, and 4 bytes * channels * ceil(rows / kRowsPerPartial) of partial sums twice. All arithmetic is fp32: some 20
// instructions and a division for a vector forward, 30 backward.
//
// Launch: one call handles whole rows on one thread; ops.cpp gives threads ranges of kRowsPerPartial-row blocks.

namespace gptdist::cpu {
namespace {

constexpr float kCubic = 0.044715f;
constexpr float kTwiceSqrt2OverPi = 1.5957691216057308f;
constexpr float kInBase2 = 2.302208198144325f;  // the same in units of ln 2: e = 2^(-kInBase2 (h + kCubic h^3))

// Channels per tile: x, dy, dx, bias and partial of a tile (12 KiB in fp32) stay in a 32 KiB first-level cache
// while the rows pass.
constexpr int64_t kGeluTile = 1024;

// e = exp(-2u), at most 2^126, where gelu's factors have long settled.
GPTDIST_INLINE Floats gelu_exp(Floats h, Floats squared) {
  return exp2(-larger(broadcast(-126.0f), h * (squared * (kInBase2 * kCubic) + kInBase2)));
}

GPTDIST_INLINE Floats gelu(Floats h) { return h / (1.0f + gelu_exp(h, h * h)); }

GPTDIST_INLINE Floats gelu_slope(Floats h) {
  const Floats squared = h * h, e = gelu_exp(h, squared), s = 1.0f / (1.0f + e);
  return s + h * s * (e * s) * (squared * (3.0f * kCubic * kTwiceSqrt2OverPi) + kTwiceSqrt2OverPi);
}

template <class T, bool kBias>
struct GeluForwardStep {
  GPTDIST_INLINE void operator()(const T* x, const float* bias, T* y) const {
    store(y, gelu(kBias ? load(x) + load(bias) : load(x)));
  }
};

template <class T, bool kBias>
void gelu_forward_rows(const Forward<T>& a) {
  const int64_t left = a.channels % kLanes, whole = a.channels - left;
  const GeluForwardStep<T, kBias> step;
  float bias[kLanes] = {};
  if (kBias) std::memcpy(bias, a.bias + whole, left * sizeof(float));
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = a.x + row * a.channels;
    T* y = a.y + row * a.channels;
    for (int64_t c = 0; c < whole; c += kLanes) step(x + c, kBias ? a.bias + c : nullptr, y + c);
    if (left > 0) {
      T values[kLanes] = {};
      std::memcpy(values, x + whole, left * sizeof(T));
      step(values, bias, values);
      std::memcpy(y + whole, values, left * sizeof(T));
    }
  }
}

// dx, and their addition to `sum`.
template <class T, bool kBias>
struct GeluBackwardStep {
  GPTDIST_INLINE void operator()(const T* dy, const T* x, const float* bias, T* dx, float* sum) const {
    const Floats g = load(dy) * gelu_slope(kBias ? load(x) + load(bias) : load(x));
    store(dx, g);
    store(sum, load(sum) + g);
  }
};

template <class T, bool kBias>
void gelu_backward_tile(const Backward<T>& a, int64_t begin, int64_t end) {
  const int64_t left = (end - begin) % kLanes, whole = end - begin - left;
  const GeluBackwardStep<T, kBias> step;
  float sum[kGeluTile] = {}, bias[kLanes] = {};
  if (kBias) std::memcpy(bias, a.bias + begin + whole, left * sizeof(float));
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.channels + begin;
    for (int64_t c = 0; c < whole; c += kLanes) {
      step(a.dy + at + c, a.x + at + c, kBias ? a.bias + begin + c : nullptr, a.dx + at + c, sum + c);
    }
    if (left > 0) {  // `sum` has room for a whole vector: the tile is a multiple of kLanes
      T dy[kLanes] = {}, x[kLanes] = {};
      std::memcpy(dy, a.dy + at + whole, left * sizeof(T));
      std::memcpy(x, a.x + at + whole, left * sizeof(T));
      step(dy, x, bias, dy, sum + whole);
      std::memcpy(a.dx + at + whole, dy, left * sizeof(T));
    }
  }
  if (a.partial != nullptr) std::memcpy(a.partial + begin, sum, (end - begin) * sizeof(float));
}

template <class T>
struct Gelu {
  static void forward(const Forward<T>& a) {
    a.bias != nullptr ? gelu_forward_rows<T, true>(a) : gelu_forward_rows<T, false>(a);
  }

  static void backward(const Backward<T>& a) {
    for (int64_t begin = 0; begin < a.channels; begin += kGeluTile) {
      const int64_t end = begin + kGeluTile < a.channels ? begin + kGeluTile : a.channels;
      a.bias != nullptr ? gelu_backward_tile<T, true>(a, begin, end) : gelu_backward_tile<T, false>(a, begin, end);
    }
  }

  static constexpr GeluKernels<T> table() { return {forward, backward}; }
};

}  // namespace
}  // namespace gptdist::cpu
