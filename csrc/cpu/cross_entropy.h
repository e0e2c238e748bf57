// cross_entropy on a CPU: what ops_cpu_cross_entropy.cpp calls. Mathematics and memory traffic: cross_entropy.cpp.
#pragma once

#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// loss = lse - logits[target], 0 where the target is ignored, for `rows` rows. Targets lie in [0, vocabulary).
template <class T>
struct CrossEntropyForward {
  const T* logits;         // [rows, vocabulary], rows `stride` elements apart
  const int64_t* targets;  // [rows]
  float* loss;             // [rows], overwritten
  float* lse;              // [rows], overwritten: the logits' log-sum-exp
  int64_t rows, vocabulary, stride, ignore_index;
};

// dlogits = dloss (softmax(logits) - onehot(target)), 0 where the target is ignored.
template <class T>
struct CrossEntropyBackward {
  const float* dloss;      // [rows]
  const T* logits;         // [rows, vocabulary], rows `stride` elements apart
  const int64_t* targets;  // [rows]
  const float* lse;        // [rows]
  T* dlogits;              // [rows, vocabulary], rows `stride` elements apart, overwritten; may be `logits`
  int64_t rows, vocabulary, stride, ignore_index;
};

// Both at once, for a dloss of 1.
template <class T>
struct CrossEntropyGradient {
  T* logits;               // [rows, vocabulary], rows `stride` elements apart, overwritten with their gradient
  const int64_t* targets;  // [rows]
  float* loss;             // [rows], overwritten
  float* lse;              // [rows], overwritten
  float* scratch;          // [vocabulary], overwritten
  int64_t rows, vocabulary, stride, ignore_index;
};

// out = (x + addend) scale for `count` elements.
template <class T>
struct ScaledSum {
  const T* x;
  const float* addend;  // or nullptr: 0
  float* out;           // overwritten; may be `addend`
  int64_t count;
  float scale;
};

void cross_entropy_forward(const CrossEntropyForward<float>& args, Isa isa);
void cross_entropy_forward(const CrossEntropyForward<Bf16>& args, Isa isa);
void cross_entropy_backward(const CrossEntropyBackward<float>& args, Isa isa);
void cross_entropy_backward(const CrossEntropyBackward<Bf16>& args, Isa isa);
void cross_entropy_gradient(const CrossEntropyGradient<float>& args, Isa isa);
void cross_entropy_gradient(const CrossEntropyGradient<Bf16>& args, Isa isa);
void scaled_sum(const ScaledSum<float>& args, Isa isa);
void scaled_sum(const ScaledSum<Bf16>& args, Isa isa);

}  // namespace gptdist::cpu
