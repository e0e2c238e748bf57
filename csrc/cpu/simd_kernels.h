// The kernels of one instruction set and their tables. Each simd_*.cpp sets GPTDIST_ISA and the compiler's target, and
// includes this file.

#include "simd.h"
#include "philox.h"
#include "attention_tiles.h"
#include "attention_operands.h"
#include "attention_forward.h"
#include "attention_backward.h"
#include "decode_attention.h"
#include "few_rows_linear_kernel.h"
#include "dropout_kernel.h"
#include "bias_gelu_kernel.h"

namespace gptdist::cpu {
namespace {

// Kernels of their own for D = 64 and 128, whose loops know their length. AVX-512 alone is worth the code.
constexpr bool kSpecialised = GPTDIST_ISA >= 2;

// Unit: what T is computed in.
template <class T, class Unit>
struct Kernels {
  static void forward(const AttentionForward<T>& args, const ForwardTask& task, std::byte* scratch) {
    if constexpr (kSpecialised) {
      if (args.shape.head_dim == 64) return forward_task<64, Unit>(args, task, scratch);
      if (args.shape.head_dim == 128) return forward_task<128, Unit>(args, task, scratch);
    }
    forward_task<0, Unit>(args, task, scratch);
  }

  static void delta(const AttentionBackward<T>& args, int64_t b, int64_t h, Span queries) {
    delta_rows(args, b, h, queries);
  }

  static void backward(const AttentionBackward<T>& args, const BackwardTask& task, std::byte* scratch) {
    if constexpr (kSpecialised) {
      if (args.shape.head_dim == 64) return backward_task<64, Unit>(args, task, scratch);
      if (args.shape.head_dim == 128) return backward_task<128, Unit>(args, task, scratch);
    }
    backward_task<0, Unit>(args, task, scratch);
  }

  static void decode(const DecodeAttention<T>& args, const ForwardTask& task, std::byte* scratch) {
    forward_task<0, Unit>(args, task, scratch);
  }

  static void decode_part(const DecodeAttention<T>& args, int64_t b, int64_t h, Span keys, float* parts) {
    decode_segment(args, b, h, keys, parts);
  }

  static void decode_sum(const DecodeAttention<T>& args, int64_t b, int64_t h, const float* parts, int64_t count,
                         int64_t stride) {
    sum_parts(args, b, h, parts, count, stride);
  }

  static size_t forward_scratch(const AttentionShape& shape, int64_t queries) {
    Cutter cut(nullptr);
    ForwardScratch<Unit>(cut, shape.group, queries, shape.head_dim);
    return cut.used();
  }

  static size_t backward_scratch(const AttentionShape& shape, int64_t queries) {
    Cutter cut(nullptr);
    BackwardScratch<Unit>(cut, shape.group, queries, shape.head_dim);
    return cut.used();
  }

  static constexpr AttentionKernels<T> table() {
    return {forward, delta, backward, decode, decode_part, decode_sum, forward_scratch, backward_scratch};
  }
};

}  // namespace

#if GPTDIST_ISA == 3  // AVX-512 with products of bf16, and for nothing else
constexpr AttentionKernels<Bf16> kBf16Avx512Bf16 = Kernels<Bf16, Pair>::table();
constexpr FewRowsLinearKernels<Bf16> kLinearBf16Avx512Bf16 = LinearKernels<Bf16, Pair>::table();
#else
#if GPTDIST_ISA == 2
#define GPTDIST_TABLE(name) name##Avx512
#elif GPTDIST_ISA == 1
#define GPTDIST_TABLE(name) name##Avx2
#else
#define GPTDIST_TABLE(name) name##Portable
#endif
constexpr AttentionKernels<float> GPTDIST_TABLE(kFp32) = Kernels<float, float>::table();
constexpr AttentionKernels<Bf16> GPTDIST_TABLE(kBf16) = Kernels<Bf16, float>::table();
constexpr FewRowsLinearKernels<float> GPTDIST_TABLE(kLinearFp32) = LinearKernels<float, float>::table();
constexpr FewRowsLinearKernels<Bf16> GPTDIST_TABLE(kLinearBf16) = LinearKernels<Bf16, float>::table();
constexpr GeluKernels<float> GPTDIST_TABLE(kGeluFp32) = Gelu<float>::table();
constexpr GeluKernels<Bf16> GPTDIST_TABLE(kGeluBf16) = Gelu<Bf16>::table();
constexpr DropoutKernel<float> GPTDIST_TABLE(kDropoutFp32) = dropout_rows<float>;
constexpr DropoutKernel<Bf16> GPTDIST_TABLE(kDropoutBf16) = dropout_rows<Bf16>;
#endif

}  // namespace gptdist::cpu
