// Dropout by position on a CPU: what ops_cpu_dropout.cpp calls. Mathematics and memory traffic: dropout.cpp.
#pragma once

#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// y = keep ? x * scale : 0 for rows [begin, end) of the batch * positions rows.
template <class T>
struct Dropout {
  const T* x;                 // [batch, positions, channels]
  T* y;                       // the same, overwritten
  const int64_t* sample_ids;  // [batch]
  int64_t positions, channels;
  uint64_t key;
  uint32_t threshold, site, row_offset;
  float scale;
  int64_t begin, end;
};

void dropout(const Dropout<float>& args, Isa isa);
void dropout(const Dropout<Bf16>& args, Isa isa);

}  // namespace gptdist::cpu
