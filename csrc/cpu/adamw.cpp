// A step of AdamW on a CPU, in place.
//
//   g = grad_scale * grad,  m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2
//   p <- p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   shadow <- p, rounded to bf16 or fp16
//
// Memory, bytes an element: reads 12 and the gradient's 4 or 2, writes 12, and 2 for a shadow (whose lines a processor
// reads before it writes them). All arithmetic is fp32; the scalars are computed in double.
//
// Launch: one call is a chunk of a tensor on one thread; ops_cpu_optim.cpp gives threads ranges of chunks.

#include "adamw.h"

#include <cmath>

#include "vector.h"

namespace gptdist::cpu {
namespace {

struct NoShadow {};

GPTDIST_INLINE void store(NoShadow*, float) {}

// G: gradient. S: shadow.
template <class G, class S>
GPTDIST_INLINE void step_elements(const AdamWChunk& c, const AdamWScalars& s, float grad_scale) {
  using cpu::store;
  float* param = c.param;
  float* exp_avg = c.exp_avg;
  float* exp_avg_sq = c.exp_avg_sq;
  const G* grad = static_cast<const G*>(c.grad);
  S* shadow = static_cast<S*>(c.shadow);
  GPTDIST_INDEPENDENT
  for (int64_t i = 0; i < c.elements; ++i) {
    const float g = load(grad + i) * grad_scale;
    const float m = exp_avg[i] + s.beta1_complement * (g - exp_avg[i]);
    const float v = s.beta2 * exp_avg_sq[i] + s.beta2_complement * (g * g);
    const float p = s.decay * param[i] - s.step_size * (m / (std::sqrt(v) * s.root_correction + s.eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = p;
    store(shadow + i, p);
  }
}

template <class G>
GPTDIST_INLINE void step_shadowed(const AdamWChunk& c, const AdamWScalars& s, float grad_scale) {
  if (c.shadow == nullptr) return step_elements<G, NoShadow>(c, s, grad_scale);
  if (c.shadow_dtype == Dtype::kBf16) return step_elements<G, Bf16>(c, s, grad_scale);
  step_elements<G, Fp16>(c, s, grad_scale);
}

struct Step {
  const AdamWChunk& chunk;
  const AdamWScalars& scalars;
  float grad_scale;
};

template <class Args>
GPTDIST_INLINE void step(const Args& a) {
  switch (a.chunk.grad_dtype) {
    case Dtype::kFp32: return step_shadowed<float>(a.chunk, a.scalars, a.grad_scale);
    case Dtype::kBf16: return step_shadowed<Bf16>(a.chunk, a.scalars, a.grad_scale);
    case Dtype::kFp16: return step_shadowed<Fp16>(a.chunk, a.scalars, a.grad_scale);
  }
}

GPTDIST_FOR_EACH_ISA(step)

}  // namespace

void adamw(const AdamWChunk& chunk, const AdamWScalars& scalars, float grad_scale, Isa isa) {
  step_at(Step{chunk, scalars, grad_scale}, isa);
}

}  // namespace gptdist::cpu
