// The vector kernels for AVX2 and FMA.

#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "bias_gelu.h"
#include "dropout.h"
#include "few_rows_linear.h"

#ifdef GPTDIST_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define GPTDIST_ISA 1
#include "simd_kernels.h"

namespace gptdist::cpu {

constexpr AttentionKernels<float> kFp32Avx2 = Kernels<float, float>::table();
constexpr AttentionKernels<Bf16> kBf16Avx2 = Kernels<Bf16, float>::table();
constexpr FewRowsLinearKernels<float> kLinearFp32Avx2 = LinearKernels<float, float>::table();
constexpr FewRowsLinearKernels<Bf16> kLinearBf16Avx2 = LinearKernels<Bf16, float>::table();
constexpr GeluKernels<float> kGeluFp32Avx2 = Gelu<float>::table();
constexpr GeluKernels<Bf16> kGeluBf16Avx2 = Gelu<Bf16>::table();
constexpr DropoutKernel<float> kDropoutFp32Avx2 = dropout_rows<float>;
constexpr DropoutKernel<Bf16> kDropoutBf16Avx2 = dropout_rows<Bf16>;

}  // namespace gptdist::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // GPTDIST_X86
