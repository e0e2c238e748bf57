// What attention and decode_attention share on the CPU: argument checks, threads.
#pragma once

#include <algorithm>
#include <climits>
#include <string>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "ops_cpu.h"

namespace gptdist {

// What an op refuses: an error names the op, the tensor, what it is and what was wanted.
struct Refusal {
  const char* op;

  // `symbols` name the sizes in `wanted`.
  void shape(const Tensor& x, const char* name, const std::vector<int64_t>& wanted, const char* symbols) const {
    bool same = x.dim() == int64_t(wanted.size());
    for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == wanted[i];
    std::string text;
    for (int64_t size : wanted) text += (text.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_name(x), ", expected ", symbols, " = (", text, ")");
  }

  void type(const Tensor& x, const char* name, ScalarType wanted, const char* wanted_name) const {
    STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " is on another device, expected cpu");
    STD_TORCH_CHECK(x.scalar_type() == wanted, op, ": ", name, " has another dtype than the expected ", wanted_name);
  }

  void float_type(const Tensor& x, const char* name) const {
    const ScalarType found = x.scalar_type();
    STD_TORCH_CHECK(found == ScalarType::Float || found == ScalarType::BFloat16, op, ": ", name,
                    " has another dtype than the expected float32 or bfloat16");
  }

  void head_dim(const Tensor& x, const char* name) const {
    const int64_t D = x.size(4);
    STD_TORCH_CHECK(D > 0 && D <= cpu::kMaxHeadDim && D % cpu::kHeadDimStep == 0, op, ": ", name, " has D=", D,
                    ", expected a multiple of ", cpu::kHeadDimStep, " up to ", cpu::kMaxHeadDim);
  }

  // The data of a contiguous tensor.
  template <class T>
  T* contiguous(const Tensor& x, const char* name, ScalarType wanted, const char* wanted_name) const {
    type(x, name, wanted, wanted_name);
    STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " is not contiguous: copy it");
    return static_cast<T*>(x.data_ptr());
  }

  // The data of a tensor whose last dimension alone must be contiguous.
  template <class T>
  T* rows(const Tensor& x, const char* name) const {
    const int64_t last = x.dim() - 1;
    STD_TORCH_CHECK(x.stride(last) == 1, op, ": the last dimension of ", name, " has stride ", x.stride(last),
                    ", expected 1: copy it");
    return static_cast<T*>(x.data_ptr());
  }

  template <class T>
  cpu::Heads<T> heads(const Tensor& x, const char* name) const {
    return {rows<T>(x, name), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  }
};

// Multiplications worth a thread's while: some 30 microseconds.
constexpr double kProductsPerThread = 1 << 21;

inline int64_t threads_for(double products) {
  return std::clamp(int64_t(products / kProductsPerThread), int64_t(1), int64_t(torch::stable::get_num_threads()));
}

// Spans of a sequence, the last one first: it sees the most keys.
struct Spans {
  int64_t positions, length;

  int64_t count() const { return ceil_div(positions, length); }
  cpu::Span operator[](int64_t i) const {
    const int64_t begin = (count() - 1 - i) * length;
    return {begin, std::min(begin + length, positions)};
  }
};

// Positions of a task of the forward: 256, for which a tile of keys is packed once; fewer where threads would idle.
// Its bits do not depend on it.
inline Spans forward_spans(const cpu::AttentionShape& shape, int64_t threads) {
  const int64_t pairs = shape.batch * shape.kv_heads;
  int64_t length = 4 * cpu::kTileQueries;
  while (length > cpu::kTileQueries && pairs * ceil_div(shape.positions, length) < 4 * threads) length /= 2;
  return {shape.positions, length};
}

}  // namespace gptdist
