// AdamW on a CPU: what ops_cpu_optim.cpp calls. Mathematics and memory traffic: adamw.cpp.
#pragma once

#include <cstdint>

#include "../adamw_scalars.h"
#include "common.h"

namespace gptdist::cpu {

// Elements of one call. A constant, and every element by itself: no bits depend on the number of threads.
constexpr int64_t kAdamWChunk = 1 << 14;

struct AdamWChunk {
  float* param;        // [elements], stepped in place
  const void* grad;    // [elements] of grad_dtype
  float* exp_avg;      // [elements], updated in place
  float* exp_avg_sq;   // [elements], updated in place
  void* shadow;        // [elements] of shadow_dtype, overwritten with the new params; or nullptr
  int64_t elements;
  Dtype grad_dtype;
  Dtype shadow_dtype;  // bf16 or fp16
};

void adamw(const AdamWChunk& chunk, const AdamWScalars& scalars, float grad_scale, Isa isa);

}  // namespace gptdist::cpu
