// Sums of squares on a CPU: what ops_cpu_optim.cpp calls. How they are summed: grad_norm.cpp.
#pragma once

#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// Elements of one call. A constant, so that the bits of the sum do not depend on the number of threads.
constexpr int64_t kNormChunk = 1 << 16;

double sum_of_squares(const void* x, Dtype dtype, int64_t elements, Isa isa);

}  // namespace gptdist::cpu
