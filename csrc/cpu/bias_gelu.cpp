// bias_gelu on a CPU: the choice of a kernel (bias_gelu_kernel.h), and the sum of the bias gradient.

#include "bias_gelu.h"

namespace gptdist::cpu {
namespace {

const GeluKernels<float>& kernels(Isa isa, float) { return GPTDIST_CHOOSE(isa, kGeluFp32); }
const GeluKernels<Bf16>& kernels(Isa isa, Bf16) { return GPTDIST_CHOOSE(isa, kGeluBf16); }

}  // namespace

void bias_gelu_forward(const Forward<float>& args, Isa isa) { kernels(isa, float{}).forward(args); }
void bias_gelu_forward(const Forward<Bf16>& args, Isa isa) { kernels(isa, Bf16{}).forward(args); }
void bias_gelu_backward(const Backward<float>& args, Isa isa) { kernels(isa, float{}).backward(args); }
void bias_gelu_backward(const Backward<Bf16>& args, Isa isa) { kernels(isa, Bf16{}).backward(args); }

void fold_partials(const float* partials, int64_t count, int64_t channels, int64_t begin, int64_t end, float* dbias) {
  for (int64_t c = begin; c < end; ++c) dbias[c] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = begin; c < end; ++c) dbias[c] += partials[i * channels + c];
  }
}

}  // namespace gptdist::cpu
