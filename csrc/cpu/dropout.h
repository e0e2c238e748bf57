// Dropout by position on a CPU: what ops_cpu_dropout.cpp calls. Mathematics and memory traffic: dropout_kernel.h.
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

template <class T>
using DropoutKernel = void (*)(const Dropout<T>& args);

// For each instruction set, in simd_*.cpp.
extern const DropoutKernel<float> kDropoutFp32Portable, kDropoutFp32Avx2, kDropoutFp32Avx512;
extern const DropoutKernel<Bf16> kDropoutBf16Portable, kDropoutBf16Avx2, kDropoutBf16Avx512;

template <class T>
DropoutKernel<T> dropout_kernel(Isa isa);

template <>
inline DropoutKernel<float> dropout_kernel<float>(Isa isa) {
  return GPTDIST_CHOOSE(isa, kDropoutFp32);
}

template <>
inline DropoutKernel<Bf16> dropout_kernel<Bf16>(Isa isa) {
  return GPTDIST_CHOOSE(isa, kDropoutBf16);
}

}  // namespace gptdist::cpu
