// Which kernels of attention an instruction set has.

#include "attention.h"

namespace gptdist::cpu {

template <>
const AttentionKernels<float>& attention_kernels<float>(Isa isa) {
  return GPTDIST_CHOOSE(isa, kFp32);
}

template <>
const AttentionKernels<Bf16>& attention_kernels<Bf16>(Isa isa) {
#ifdef GPTDIST_X86
  if (isa == Isa::kAvx512Bf16) return kBf16Avx512Bf16;
#endif
  return GPTDIST_CHOOSE(isa, kBf16);
}

}  // namespace gptdist::cpu
