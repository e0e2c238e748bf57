// bias_gelu on a CPU: what ops.cpp calls. Mathematics and memory traffic: bias_gelu_kernel.h.
#pragma once

#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// Rows that share one partial sum of the bias gradient. A constant, so that the sum's order (and its bits) does not
// depend on the number of threads. 64 rows of 3072 fp32 channels are read from memory for one 12 KiB partial.
constexpr int64_t kRowsPerPartial = 64;

// y = gelu(x + bias) for `rows` rows.
template <class T>
struct Forward {
  const T* x;         // [rows, channels], channels contiguous
  const float* bias;  // [channels] fp32, or nullptr
  T* y;               // [rows, channels], overwritten
  int64_t rows, channels;
};

// dx = dy * gelu'(x + bias); partial = sum of dx over these rows.
template <class T>
struct Backward {
  const T* dy;        // [rows, channels]
  const T* x;         // [rows, channels]
  const float* bias;  // [channels] fp32, or nullptr
  T* dx;              // [rows, channels], overwritten
  float* partial;     // [channels] fp32, overwritten; nullptr where no bias gradient is wanted
  int64_t rows, channels;
};

template <class T>
struct GeluKernels {
  void (*forward)(const Forward<T>& args);
  void (*backward)(const Backward<T>& args);
};

// For each instruction set, in simd_*.cpp.
extern const GeluKernels<float> kGeluFp32Portable, kGeluFp32Avx2, kGeluFp32Avx512;
extern const GeluKernels<Bf16> kGeluBf16Portable, kGeluBf16Avx2, kGeluBf16Avx512;

void bias_gelu_forward(const Forward<float>& args, Isa isa);
void bias_gelu_forward(const Forward<Bf16>& args, Isa isa);
void bias_gelu_backward(const Backward<float>& args, Isa isa);
void bias_gelu_backward(const Backward<Bf16>& args, Isa isa);

// dbias[begin..end) = sum over partials, in ascending order.
void fold_partials(const float* partials,  // [count, channels] fp32
                   int64_t count, int64_t channels, int64_t begin, int64_t end,
                   float* dbias);  // [channels], overwritten

}  // namespace gptdist::cpu
