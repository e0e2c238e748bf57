// Which kernels of attention an instruction set has.

#include "attention.h"

namespace gptdist::cpu {

template <>
const AttentionKernels<float>& attention_kernels<float>([[maybe_unused]] Isa isa) {
#ifdef GPTDIST_X86
  if (isa >= Isa::kAvx512) return kFp32Avx512;
  if (isa == Isa::kAvx2) return kFp32Avx2;
#endif
  return kFp32Portable;
}

template <>
const AttentionKernels<Bf16>& attention_kernels<Bf16>([[maybe_unused]] Isa isa) {
#ifdef GPTDIST_X86
  if (isa == Isa::kAvx512Bf16) return kBf16Avx512Bf16;
  if (isa == Isa::kAvx512) return kBf16Avx512;
  if (isa == Isa::kAvx2) return kBf16Avx2;
#endif
  return kBf16Portable;
}

}  // namespace gptdist::cpu
