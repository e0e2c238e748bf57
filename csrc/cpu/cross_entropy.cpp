// cross_entropy on a CPU.
//
//   m = max z,  lse = m + log(sum exp(z - m)),  loss = lse - z[target]
//   dz = dloss (exp(z - lse) - onehot(target))
//
// Memory, n = rows * vocabulary logits: forward reads n; backward reads n and writes n; the gradient, which is both for a
// dloss of 1, reads n and writes n. A row is passed over two or three times and stays in the second-level cache between
// them: 100 KB in bf16 with GPT-2's vocabulary, and its exponentials in fp32 (200 KB), which the gradient keeps rather
// than computes again. The exponential, some 20 operations, bounds the speed, not memory.
//
// As torch.logsumexp has it: lse is inf where a logit is inf, -inf where all are -inf, NaN where one is NaN.
//
// Launch: one call handles whole rows on one thread; ops_cpu_cross_entropy.cpp gives threads ranges of rows.

#include "cross_entropy.h"

#include "vector.h"

#include <cmath>

namespace gptdist::cpu {
namespace {

// exp(x) for x <= 88: within 2 ulp down to -87 and 0 below, where exp would be less than 1.7e-38; NaN for NaN.
GPTDIST_INLINE float fast_exp(float x) {
  constexpr float kLeast = -87.0f;
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves n + 127, 2^n's exponent, in the low bits
  const float bounded = x < kLeast ? kLeast : x;
  const float shifted = bounded * 1.44269504088896341f + kRound;
  const float p = exp_of_rest(bounded, shifted - kRound);
  const float power = bits_to_float(float_to_bits(shifted) << 23);
  return x < kLeast ? 0.0f : p * power;
}

// The largest logit; NaN are passed over.
template <class T>
GPTDIST_INLINE float row_maximum(const T* z, int64_t vocabulary) {
  float most[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = -INFINITY;
  for_lanes(vocabulary, [&](int64_t i, int64_t lane) GPTDIST_LAMBDA {
    const float value = load(z + i);
    most[lane] = value > most[lane] ? value : most[lane];
  });
  for (int64_t lane = 1; lane < kLanes; ++lane) most[0] = most[lane] > most[0] ? most[lane] : most[0];
  return most[0];
}

GPTDIST_INLINE bool is_infinite(float x) { return std::fabs(x) == INFINITY; }

// The log-sum-exp of a row with an infinite maximum: that maximum, unless a NaN was passed over.
template <class T>
GPTDIST_INLINE float infinite_log_sum_exp(const T* z, float maximum, int64_t vocabulary) {
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (std::isnan(load(z + i))) return NAN;
  }
  return maximum;
}

template <class T>
GPTDIST_INLINE float row_log_sum_exp(const T* z, int64_t vocabulary) {
  const float maximum = row_maximum(z, vocabulary);
  if (is_infinite(maximum)) return infinite_log_sum_exp(z, maximum, vocabulary);
  Lanes lanes;
  for_lanes(vocabulary, [&](int64_t i, int64_t lane) GPTDIST_LAMBDA { lanes.sum[lane] += fast_exp(load(z + i) - maximum); });
  return maximum + std::log(lanes.total());
}

template <class T>
GPTDIST_INLINE void zero_row(T* dz, int64_t vocabulary) {
  for (int64_t i = 0; i < vocabulary; ++i) store(dz + i, 0.0f);
}

// dz may be z. There is one pointer for both in that case: two that may alias would need a check that fails.
template <class T>
GPTDIST_INLINE void gradient_of_row(const T* z, float lse, float dloss, int64_t target, T* dz, int64_t vocabulary) {
  const float at_target = dloss * (fast_exp(load(z + target) - lse) - 1.0f);
  if (z == dz) {
    for (int64_t i = 0; i < vocabulary; ++i) store(dz + i, dloss * fast_exp(load(dz + i) - lse));
  } else {
    T* __restrict__ out = dz;
    for (int64_t i = 0; i < vocabulary; ++i) store(out + i, dloss * fast_exp(load(z + i) - lse));
  }
  store(dz + target, at_target);
}

template <class T>
GPTDIST_INLINE void forward_rows(const CrossEntropyForward<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* z = a.logits + row * a.stride;
    const int64_t target = a.targets[row];
    a.lse[row] = row_log_sum_exp(z, a.vocabulary);
    a.loss[row] = target == a.ignore_index ? 0.0f : a.lse[row] - load(z + target);
  }
}

template <class T>
GPTDIST_INLINE void backward_rows(const CrossEntropyBackward<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* z = a.logits + row * a.stride;
    T* dz = a.dlogits + row * a.stride;
    const int64_t target = a.targets[row];
    if (target == a.ignore_index) {
      zero_row(dz, a.vocabulary);
    } else {
      gradient_of_row(z, a.lse[row], a.dloss[row], target, dz, a.vocabulary);
    }
  }
}

// Overwrites z with softmax(z) - onehot(target), and returns z's log-sum-exp.
template <class T>
GPTDIST_INLINE float gradient_row(T* z, int64_t target, float* __restrict__ e, int64_t vocabulary) {
  const float maximum = row_maximum(z, vocabulary);
  if (is_infinite(maximum)) {
    const float lse = infinite_log_sum_exp(z, maximum, vocabulary);
    gradient_of_row(z, lse, 1.0f, target, z, vocabulary);
    return lse;
  }
  Lanes lanes;
  for_lanes(vocabulary, [&](int64_t i, int64_t lane) GPTDIST_LAMBDA {
    e[i] = fast_exp(load(z + i) - maximum);
    lanes.sum[lane] += e[i];
  });
  const float sum = lanes.total(), scale = 1.0f / sum;
  T* __restrict__ dz = z;
  for (int64_t i = 0; i < vocabulary; ++i) store(dz + i, e[i] * scale);
  store(dz + target, e[target] * scale - 1.0f);
  return maximum + std::log(sum);
}

template <class T>
GPTDIST_INLINE void gradient_rows(const CrossEntropyGradient<T>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    T* z = a.logits + row * a.stride;
    const int64_t target = a.targets[row];
    if (target == a.ignore_index) {
      a.loss[row] = 0.0f;
      a.lse[row] = row_log_sum_exp(z, a.vocabulary);
      zero_row(z, a.vocabulary);
    } else {
      const float picked = load(z + target);
      a.lse[row] = gradient_row(z, target, a.scratch, a.vocabulary);
      a.loss[row] = a.lse[row] - picked;
    }
  }
}

template <class T>
GPTDIST_INLINE void sum_elements(const ScaledSum<T>& a) {
  if (a.addend == nullptr) {
    float* __restrict__ out = a.out;
    for (int64_t i = 0; i < a.count; ++i) out[i] = load(a.x + i) * a.scale;
  } else if (a.addend == a.out) {
    float* __restrict__ out = a.out;
    for (int64_t i = 0; i < a.count; ++i) out[i] = (load(a.x + i) + out[i]) * a.scale;
  } else {
    float* __restrict__ out = a.out;
    for (int64_t i = 0; i < a.count; ++i) out[i] = (load(a.x + i) + a.addend[i]) * a.scale;
  }
}

GPTDIST_FOR_EACH_ISA(forward_rows)
GPTDIST_FOR_EACH_ISA(backward_rows)
GPTDIST_FOR_EACH_ISA(gradient_rows)
GPTDIST_FOR_EACH_ISA(sum_elements)

}  // namespace

void cross_entropy_forward(const CrossEntropyForward<float>& args, Isa isa) { forward_rows_at(args, isa); }
void cross_entropy_forward(const CrossEntropyForward<Bf16>& args, Isa isa) { forward_rows_at(args, isa); }
void cross_entropy_backward(const CrossEntropyBackward<float>& args, Isa isa) { backward_rows_at(args, isa); }
void cross_entropy_backward(const CrossEntropyBackward<Bf16>& args, Isa isa) { backward_rows_at(args, isa); }
void cross_entropy_gradient(const CrossEntropyGradient<float>& args, Isa isa) { gradient_rows_at(args, isa); }
void cross_entropy_gradient(const CrossEntropyGradient<Bf16>& args, Isa isa) { gradient_rows_at(args, isa); }
void scaled_sum(const ScaledSum<float>& args, Isa isa) { sum_elements_at(args, isa); }
void scaled_sum(const ScaledSum<Bf16>& args, Isa isa) { sum_elements_at(args, isa); }

}  // namespace gptdist::cpu
