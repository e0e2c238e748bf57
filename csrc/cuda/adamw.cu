// A step of AdamW on a list of tensors, in place.
//
//   g = grad_scale * grad,  m <- m + (1 - beta1)(g - m),  v <- beta2 v + (1 - beta2) g^2
//   p <- p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   shadow <- p, rounded to bf16 or fp16
//
// Memory, bytes an element: reads 12 and the gradient's 4 or 2, writes 12, and 2 for a shadow; beside that the table,
// 64 bytes a tensor, of which every block reads 8 a tensor, and all of its own.
//
// Launch: one for the whole list, a block of 256 threads for each chunk of 8192 elements (kAdamWChunk): 229 KB of
// traffic, beside which finding the tensor counts little, and 15,000 blocks for 124 million parameters. A thread has
// a vector of four elements of each array in flight, 16 bytes in fp32: 16 KB a block, 64 KB for the four blocks that a
// multiprocessor holds. (Two vectors take 90 registers, which leaves two blocks: no more bytes, and fewer warps.) The
// element types differ by tensor, and are asked once a block. A tensor that is not aligned, and the last elements of
// one that is no multiple of four, go one by one.
//
// Accuracy: fp32 arithmetic with IEEE roots and quotients; the scalars are computed in double and rounded once.
// eps = 2^-24: |error of m| <= 4 eps (|m| + |g|), of v 6 eps v, of p 4 eps |p|, 12 eps of the update, and what the
// error of m makes there. An IEEE root and quotient cost little: at 28 bytes an element an H100's memory feeds a
// multiprocessor 0.5 elements a clock, where it can issue 128 instructions of one lane.
//
// NaN and inf spread as in PyTorch.

#include "common/host.h"
#include "common/tensor_list.cuh"
#include "common/vector.cuh"
#include "launch.h"

namespace gptdist::cuda {
namespace {

constexpr int kVector = 4;

struct NoShadow {};

__device__ __forceinline__ void step_element(float& p, float& m, float& v, float g, const AdamWScalars& s) {
  m += s.beta1_complement * (g - m);
  v = s.beta2 * v + s.beta2_complement * (g * g);
  p = s.decay * p - s.step_size * (m / (sqrtf(v) * s.root_correction + s.eps));
}

// G: gradient. S: shadow. `first`: the chunk's first element.
template <class G, class S>
__device__ __forceinline__ void step_chunk(const AdamWTensor& t, int64_t first, float grad_scale,
                                           const AdamWScalars& s) {
  constexpr bool kShadow = !std::is_same_v<S, NoShadow>;
  float *param = t.param + first, *exp_avg = t.exp_avg + first, *exp_avg_sq = t.exp_avg_sq + first;
  const G* grad = static_cast<const G*>(t.grad) + first;
  S* shadow = static_cast<S*>(t.shadow) + first;
  const int32_t elements = int32_t(t.elements - first < kAdamWChunk ? t.elements - first : kAdamWChunk);
  const bool aligned = aligned_to(param, 16) && aligned_to(exp_avg, 16) && aligned_to(exp_avg_sq, 16) &&
                       aligned_to(grad, kVector * sizeof(G)) && (!kShadow || aligned_to(shadow, kVector * sizeof(S)));
  const int32_t vectors = aligned ? elements / kVector : 0;

  for (int32_t i = threadIdx.x; i < vectors; i += kAdamWThreads) {
    float p[kVector], m[kVector], v[kVector], g[kVector];
    load_floats(param + i * kVector, p);
    load_floats(exp_avg + i * kVector, m);
    load_floats(exp_avg_sq + i * kVector, v);
    load_floats(grad + i * kVector, g);
#pragma unroll
    for (int j = 0; j < kVector; ++j) step_element(p[j], m[j], v[j], g[j] * grad_scale, s);
    Vector<float, kVector>::from_floats(p).store(param + i * kVector);
    Vector<float, kVector>::from_floats(m).store(exp_avg + i * kVector);
    Vector<float, kVector>::from_floats(v).store(exp_avg_sq + i * kVector);
    if constexpr (kShadow) Vector<S, kVector>::from_floats(p).store(shadow + i * kVector);
  }
  for (int32_t i = vectors * kVector + threadIdx.x; i < elements; i += kAdamWThreads) {
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    step_element(p, m, v, to_float(grad[i]) * grad_scale, s);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (kShadow) shadow[i] = from_float<S>(p);
  }
}

template <class G>
__device__ __forceinline__ void step_shadowed(const AdamWTensor& t, int64_t first, float grad_scale,
                                              const AdamWScalars& s) {
  if (t.shadow == nullptr) {
    step_chunk<G, NoShadow>(t, first, grad_scale, s);
  } else if (t.shadow_dtype == Dtype::kBf16) {
    step_chunk<G, Bf16>(t, first, grad_scale, s);
  } else {
    step_chunk<G, Fp16>(t, first, grad_scale, s);
  }
}

}  // namespace

__global__ void __launch_bounds__(kAdamWThreads, kAdamWBlocks) adamw_kernel(const __grid_constant__ AdamW args) {
  const int32_t i = tensor_of_chunk(args.first_chunks, args.count, blockIdx.x);
  const AdamWTensor t = args.tensors[i];
  const int64_t first = (blockIdx.x - args.first_chunks[i]) * kAdamWChunk;
  const float grad_scale = args.grad_scale != nullptr ? *args.grad_scale : 1.0f;
  switch (t.grad_dtype) {
    case Dtype::kFp32: return step_shadowed<float>(t, first, grad_scale, args.scalars);
    case Dtype::kBf16: return step_shadowed<Bf16>(t, first, grad_scale, args.scalars);
    case Dtype::kFp16: return step_shadowed<Fp16>(t, first, grad_scale, args.scalars);
  }
}

// Launcher.

Error adamw(const AdamW& args, Stream stream) {
  if (args.chunks == 0) return nullptr;
  const LaunchPlan plan = plan_adamw(args);
  if (plan.grid[0] == 0) return error("adamw_: %lld chunks, more than a grid holds", (long long)args.chunks);
  return launch(adamw_kernel, plan, args, stream);
}

}  // namespace gptdist::cuda
