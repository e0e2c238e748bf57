// few_rows_linear on a CPU: what ops_cpu_linear.cpp calls. Mathematics and memory traffic: few_rows_linear_kernel.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

constexpr int64_t kMaxFewRows = 8;

template <class T>
struct FewRowsLinear {
  const T* x;       // [rows, inputs]
  const T* weight;  // [outputs, inputs]
  const T* bias;    // [outputs], or nullptr
  T* y;             // [rows, outputs], overwritten
  int64_t rows, inputs, outputs;
};

// The kernels of an instruction set: x is packed once into memory of so many bytes, from a multiple of 64, and threads
// compute outputs [begin, end) from it.
template <class T>
struct FewRowsLinearKernels {
  size_t (*packed_bytes)(int64_t rows, int64_t inputs);
  void (*pack)(const FewRowsLinear<T>& args, std::byte* packed);
  void (*outputs)(const FewRowsLinear<T>& args, const std::byte* packed, int64_t begin, int64_t end);
};

template <class T>
const FewRowsLinearKernels<T>& few_rows_linear_kernels(Isa isa);

// One table for each instruction set, in simd_*.cpp. fp32 has no use for bf16 products.
extern const FewRowsLinearKernels<float> kLinearFp32Portable, kLinearFp32Avx2, kLinearFp32Avx512;
extern const FewRowsLinearKernels<Bf16> kLinearBf16Portable, kLinearBf16Avx2, kLinearBf16Avx512, kLinearBf16Avx512Bf16;

}  // namespace gptdist::cpu
