// The vector kernels for AVX-512 with bf16 products: bf16 tensors only.

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
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics (its bug 105593)
#endif
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,prefer-vector-width=512")
#endif

#define GPTDIST_ISA 3
#include "simd_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // GPTDIST_X86
