// The sum of squares of a chunk of a tensor on a CPU.
//
// Reads every element once. kNormLanes sums in fp32 take the elements in turn, kPiece / kNormLanes each; then they are added
// to sums in fp64, and those to each other in ascending order. A norm's relative error is at most 16 roundings of
// fp32, and in practice one: those of the pieces are of either sign.
//
// Launch: one call is a chunk on one thread; ops_cpu_optim.cpp adds the chunks' sums in ascending order.

#include "grad_norm.h"

#include "vector.h"

namespace gptdist::cpu {
namespace {

constexpr int kNormLanes = 32;  // two vectors of AVX-512
constexpr int64_t kPiece = 1024;

template <class T>
GPTDIST_INLINE double sum_elements(const T* x, int64_t elements) {
  double sums[kNormLanes] = {};
  for (int64_t begin = 0; begin < elements; begin += kPiece) {
    const int64_t end = begin + kPiece < elements ? begin + kPiece : elements;
    float piece[kNormLanes] = {};
    int64_t i = begin;
    for (; i + kNormLanes <= end; i += kNormLanes) {
      for (int lane = 0; lane < kNormLanes; ++lane) piece[lane] += load(x + i + lane) * load(x + i + lane);
    }
    for (int lane = 0; i < end; ++i, ++lane) piece[lane] += load(x + i) * load(x + i);
    for (int lane = 0; lane < kNormLanes; ++lane) sums[lane] += double(piece[lane]);
  }
  double sum = 0.0;
  for (const double lane : sums) sum += lane;
  return sum;
}

struct Chunk {
  const void* x;
  Dtype dtype;
  int64_t elements;
  double* sum;  // overwritten
};

template <class Args>
GPTDIST_INLINE void sum_chunk(const Args& a) {
  switch (a.dtype) {
    case Dtype::kFp32: *a.sum = sum_elements(static_cast<const float*>(a.x), a.elements); break;
    case Dtype::kBf16: *a.sum = sum_elements(static_cast<const Bf16*>(a.x), a.elements); break;
    case Dtype::kFp16: *a.sum = sum_elements(static_cast<const Fp16*>(a.x), a.elements); break;
  }
}

GPTDIST_FOR_EACH_ISA(sum_chunk)

}  // namespace

double sum_of_squares(const void* x, Dtype dtype, int64_t elements, Isa isa) {
  double sum = 0.0;
  sum_chunk_at(Chunk{x, dtype, elements, &sum}, isa);
  return sum;
}

}  // namespace gptdist::cpu
