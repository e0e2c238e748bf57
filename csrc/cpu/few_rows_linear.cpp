// Which kernels of few_rows_linear an instruction set has.

#include "few_rows_linear.h"

namespace gptdist::cpu {

template <>
const FewRowsLinearKernels<float>& few_rows_linear_kernels<float>([[maybe_unused]] Isa isa) {
#ifdef GPTDIST_X86
  if (isa >= Isa::kAvx512) return kLinearFp32Avx512;
  if (isa == Isa::kAvx2) return kLinearFp32Avx2;
#endif
  return kLinearFp32Portable;
}

template <>
const FewRowsLinearKernels<Bf16>& few_rows_linear_kernels<Bf16>([[maybe_unused]] Isa isa) {
#ifdef GPTDIST_X86
  if (isa == Isa::kAvx512Bf16) return kLinearBf16Avx512Bf16;
  if (isa == Isa::kAvx512) return kLinearBf16Avx512;
  if (isa == Isa::kAvx2) return kLinearBf16Avx2;
#endif
  return kLinearBf16Portable;
}

}  // namespace gptdist::cpu
