// What attention and decode_attention share on the CPU: argument checks, scratch memory, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>
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

// Scratch memory that stays with its thread: allocated once, and again where a larger task comes.
inline std::byte* scratch(size_t bytes) {
  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };
  static thread_local std::unique_ptr<std::byte, Free> block;
  static thread_local size_t held = 0;
  if (bytes > held) {
    block.reset();
    held = 0;
    block.reset(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
    if (!block) throw std::bad_alloc();
    held = bytes;
  }
  return block.get();
}

// Multiplications worth a thread's while: some 30 microseconds.
constexpr double kProductsPerThread = 1 << 21;

inline int64_t threads_for(double products) {
  return std::clamp(int64_t(products / kProductsPerThread), int64_t(1), int64_t(torch::stable::get_num_threads()));
}

// Calls run(i) for every task. Threads take the next one when they are done, so the longest should come first; each
// task owns what it writes.
template <class Run>
void run_tasks(int64_t tasks, int64_t threads, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
