// The vector kernels for every processor: vectors of four floats.

#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "attention.h"
#include "bias_gelu.h"
#include "dropout.h"
#include "few_rows_linear.h"

#define GPTDIST_ISA 0
#include "simd_kernels.h"

namespace gptdist::cpu {

constexpr AttentionKernels<float> kFp32Portable = Kernels<float, float>::table();
constexpr AttentionKernels<Bf16> kBf16Portable = Kernels<Bf16, float>::table();
constexpr FewRowsLinearKernels<float> kLinearFp32Portable = LinearKernels<float, float>::table();
constexpr FewRowsLinearKernels<Bf16> kLinearBf16Portable = LinearKernels<Bf16, float>::table();
constexpr GeluKernels<float> kGeluFp32Portable = Gelu<float>::table();
constexpr GeluKernels<Bf16> kGeluBf16Portable = Gelu<Bf16>::table();
constexpr DropoutKernel<float> kDropoutFp32Portable = dropout_rows<float>;
constexpr DropoutKernel<Bf16> kDropoutBf16Portable = dropout_rows<Bf16>;

}  // namespace gptdist::cpu
