// layer_norm and residual_layer_norm on a CPU.
//
//   s = x (+ residual),  mean = sum s / C,  rstd = (sum (s - mean)^2 / C + eps)^(-1/2),  xhat = (s - mean) rstd
//   y  = xhat weight + bias
//   dx = rstd (g - sum g / C - xhat sum(g xhat) / C) (+ ds),  g = dy weight
//   dweight = sum over rows of dy xhat,  dbias = sum over rows of dy
//
// Memory, n = rows * C elements: forward reads n (with a residual 2n) and writes n (2n); backward reads 2n (with ds 3n),
// writes n, and 8 C ceil(rows / kNormRowsPerPartial) bytes of partial sums twice. A row is passed over three times, from
// the first-level cache: what is read again is not counted. All arithmetic is fp32; s is rounded to its dtype before it
// is normalised, as its reader sees it.
//
// Launch: one call handles whole rows on one thread; ops_cpu_norm.cpp gives threads ranges of rows, of
// kNormRowsPerPartial-row blocks in the backward.

#include "layer_norm.h"

#include "vector.h"

#include <cmath>

namespace gptdist::cpu {
namespace {

template <class S>
GPTDIST_INLINE float row_mean(const S* s, int64_t width) {
  Lanes lanes;
  for_lanes(width, [&](int64_t c, int64_t lane) GPTDIST_LAMBDA { lanes.sum[lane] += load(s + c); });
  return lanes.total() / float(width);
}

template <class S>
GPTDIST_INLINE float row_variance(const S* s, float mean, int64_t width) {
  Lanes lanes;
  for_lanes(width, [&](int64_t c, int64_t lane) GPTDIST_LAMBDA {
    const float d = load(s + c) - mean;
    lanes.sum[lane] += d * d;
  });
  return lanes.total() / float(width);
}

template <bool kBias, class S, class Y>
GPTDIST_INLINE void normalise_row(const S* s, float mean, float rstd, const float* weight, const float* bias,
                                  Y* __restrict__ y, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    store(y + c, (load(s + c) - mean) * rstd * weight[c] + (kBias ? bias[c] : 0.0f));
  }
}

template <class X, class S>
GPTDIST_INLINE void add_row(const X* x, const S* residual, S* __restrict__ sum, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(sum + c, load(x + c) + load(residual + c));
}

template <class S, class Y>
GPTDIST_INLINE void forward_row(const S* s, const float* weight, const float* bias, Y* y, float* mean, float* rstd,
                                int64_t width, float eps) {
  *mean = row_mean(s, width);
  *rstd = 1.0f / std::sqrt(row_variance(s, *mean, width) + eps);
  if (bias != nullptr) {
    normalise_row<true>(s, *mean, *rstd, weight, bias, y, width);
  } else {
    normalise_row<false>(s, *mean, *rstd, weight, bias, y, width);
  }
}

template <class X, class S, class Y>
GPTDIST_INLINE void forward_rows(const NormForward<X, S, Y>& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.width;
    if (a.residual != nullptr) {
      add_row(a.x + at, a.residual + at, a.sum + at, a.width);
      forward_row(a.sum + at, a.weight, a.bias, a.y + at, a.mean + row, a.rstd + row, a.width, a.eps);
    } else {
      forward_row(a.x + at, a.weight, a.bias, a.y + at, a.mean + row, a.rstd + row, a.width, a.eps);
    }
  }
}

// Adds to dweight and dbias, and returns the means over the row of g and g xhat.
struct Means {
  float g, g_xhat;
};

template <class Y, class S>
GPTDIST_INLINE Means reduce_row(const Y* dy, const S* s, float mean, float rstd, const float* weight,
                                float* __restrict__ dweight, float* __restrict__ dbias, int64_t width) {
  Lanes g_lanes, gx_lanes;
  for_lanes(width, [&](int64_t c, int64_t lane) GPTDIST_LAMBDA {
    const float d = load(dy + c);
    const float dx = d * ((load(s + c) - mean) * rstd);
    dweight[c] += dx;
    dbias[c] += d;
    g_lanes.sum[lane] += d * weight[c];
    gx_lanes.sum[lane] += dx * weight[c];
  });
  return {g_lanes.total() / float(width), gx_lanes.total() / float(width)};
}

template <bool kSum, class Y, class S>
GPTDIST_INLINE void gradient_row(const Y* dy, const S* ds, const S* s, float mean, float rstd, const float* weight,
                                 Means means, S* __restrict__ dx, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    const float xhat = (load(s + c) - mean) * rstd;
    const float g = load(dy + c) * weight[c];
    store(dx + c, rstd * (g - means.g - xhat * means.g_xhat) + (kSum ? load(ds + c) : 0.0f));
  }
}

template <class Y, class S>
GPTDIST_INLINE void backward_rows(const NormBackward<Y, S>& a) {
  std::memset(a.dweight, 0, a.width * sizeof(float));
  std::memset(a.dbias, 0, a.width * sizeof(float));
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * a.width;
    const float mean = a.mean[row], rstd = a.rstd[row];
    const Means means = reduce_row(a.dy + at, a.s + at, mean, rstd, a.weight, a.dweight, a.dbias, a.width);
    if (a.ds != nullptr) {
      gradient_row<true>(a.dy + at, a.ds + at, a.s + at, mean, rstd, a.weight, means, a.dx + at, a.width);
    } else {
      gradient_row<false>(a.dy + at, a.ds, a.s + at, mean, rstd, a.weight, means, a.dx + at, a.width);
    }
  }
}

GPTDIST_FOR_EACH_ISA(forward_rows)
GPTDIST_FOR_EACH_ISA(backward_rows)

}  // namespace

void norm_forward(const NormForward<float, float, float>& args, Isa isa) { forward_rows_at(args, isa); }
void norm_forward(const NormForward<Bf16, Bf16, Bf16>& args, Isa isa) { forward_rows_at(args, isa); }
void norm_forward(const NormForward<Bf16, float, Bf16>& args, Isa isa) { forward_rows_at(args, isa); }
void norm_forward(const NormForward<float, float, Bf16>& args, Isa isa) { forward_rows_at(args, isa); }
void norm_backward(const NormBackward<float, float>& args, Isa isa) { backward_rows_at(args, isa); }
void norm_backward(const NormBackward<Bf16, Bf16>& args, Isa isa) { backward_rows_at(args, isa); }
void norm_backward(const NormBackward<Bf16, float>& args, Isa isa) { backward_rows_at(args, isa); }

}  // namespace gptdist::cpu
