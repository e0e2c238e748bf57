// layer_norm and residual_layer_norm on a CPU: what ops_cpu_norm.cpp calls. Mathematics and memory traffic:
// layer_norm.cpp.
#pragma once

#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// Rows that share one partial sum of the parameters' gradients. A constant, so that the sums' order (and their bits) do
// not depend on the number of threads. 32 rows of 768 fp32 channels, read twice over, are 16 times their partial sums.
constexpr int64_t kNormRowsPerPartial = 32;

// y = (s - mean) rstd weight + bias for `rows` rows; s = x + residual, or x.
template <class X, class S, class Y>
struct NormForward {
  const X* x;           // [rows, width], width contiguous
  const S* residual;    // [rows, width], or nullptr: then S is X
  const float* weight;  // [width]
  const float* bias;    // [width], or nullptr
  Y* y;                 // [rows, width], overwritten
  S* sum;               // [rows, width], overwritten with s; nullptr without a residual
  float* mean;          // [rows], overwritten
  float* rstd;          // [rows], overwritten
  int64_t rows, width;
  float eps;
};

// Gradients for `rows` rows, at most kNormRowsPerPartial.
template <class Y, class S>
struct NormBackward {
  const Y* dy;          // [rows, width]
  const S* ds;          // [rows, width]: the gradient of s, which joins dx; or nullptr
  const S* s;           // [rows, width]
  const float* mean;    // [rows]
  const float* rstd;    // [rows]
  const float* weight;  // [width]
  S* dx;                // [rows, width], overwritten
  float* dweight;       // [width], overwritten with these rows' sum
  float* dbias;         // [width], likewise
  int64_t rows, width;
};

void norm_forward(const NormForward<float, float, float>& args, Isa isa);
void norm_forward(const NormForward<Bf16, Bf16, Bf16>& args, Isa isa);
void norm_forward(const NormForward<Bf16, float, Bf16>& args, Isa isa);
void norm_forward(const NormForward<float, float, Bf16>& args, Isa isa);
void norm_backward(const NormBackward<float, float>& args, Isa isa);
void norm_backward(const NormBackward<Bf16, Bf16>& args, Isa isa);
void norm_backward(const NormBackward<Bf16, float>& args, Isa isa);

}  // namespace gptdist::cpu
