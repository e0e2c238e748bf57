// attention for every processor: vectors of four floats.

#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "attention.h"

#define GPTDIST_ISA 0
#include "attention_isa.h"

namespace gptdist::cpu {

constexpr AttentionKernels<float> kFp32Portable = Kernels<float, float>::table();
constexpr AttentionKernels<Bf16> kBf16Portable = Kernels<Bf16, float>::table();

}  // namespace gptdist::cpu
