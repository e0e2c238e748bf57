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
