// Which kernels of few_rows_linear an instruction set has.

#include "few_rows_linear.h"

namespace gptdist::cpu {

template <>
const FewRowsLinearKernels<float>& few_rows_linear_kernels<float>(Isa isa) {
  return GPTDIST_CHOOSE(isa, kLinearFp32);
}

template <>
const FewRowsLinearKernels<Bf16>& few_rows_linear_kernels<Bf16>(Isa isa) {
#ifdef GPTDIST_X86
  if (isa == Isa::kAvx512Bf16) return kLinearBf16Avx512Bf16;
#endif
  return GPTDIST_CHOOSE(isa, kLinearBf16);
}

}  // namespace gptdist::cpu
