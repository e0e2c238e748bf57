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

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // GPTDIST_X86
