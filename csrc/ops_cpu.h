// What the CPU ops share: the instruction set in use, argument checks, scratch memory, threads. Only ops*.cpp include it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/common.h"
#include "tensor_names.h"

namespace gptdist {

using cpu::Bf16;
using cpu::Isa;
using cpu::active_isa;
using cpu::kElementsPerThread;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t rows, channels;
};

inline Shape rows_and_channels(const Tensor& x) {
  const int64_t channels = x.size(x.dim() - 1);
  return {channels == 0 ? 0 : x.numel() / channels, channels};
}

inline int64_t block_count(Shape shape, int64_t rows_per_block) {
  return (shape.rows + rows_per_block - 1) / rows_per_block;
}

// Calls body(block_begin, block_end) on threads, blocks being rows_per_block rows each.
template <class Body>
void parallel_blocks(Shape shape, int64_t rows_per_block, const Body& body) {
  const int64_t block_elements = rows_per_block * shape.channels;
  const int64_t grain = block_elements >= kElementsPerThread ? 1 : kElementsPerThread / block_elements;
  torch::stable::parallel_for(0, block_count(shape, rows_per_block), grain, body);
}

// Bytes read of memory worth a thread's while: some 30 microseconds.
constexpr int64_t kBytesPerThread = 1 << 18;

inline int64_t threads_for_bytes(int64_t bytes) {
  return std::clamp(bytes / kBytesPerThread, int64_t(1), int64_t(torch::stable::get_num_threads()));
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

// One call of an op: what does not fit is an error that names the op, the tensor, what it is and what was wanted.
class CpuCall {
 public:
  explicit CpuCall(const char* op) : op_(op) {}

  bool is_bf16(const Tensor& t, const char* name) const {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op_, ": ", name, " is ", dtype_name(type),
                    ", expected float32 or bfloat16");
    return type == ScalarType::BFloat16;
  }

  void contiguous(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cpu(), op_, ": ", name, " is on another device, expected cpu");
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " is not contiguous, expected rows one after the other: copy it");
  }

  void same_shape(const Tensor& t, const char* name, const Tensor& like, const char* like_name) const {
    bool same = t.dim() == like.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
    STD_TORCH_CHECK(same, op_, ": ", name, " has shape ", shape_name(t), ", expected ", shape_name(like), " as ", like_name);
  }

  void same_type(const Tensor& t, const char* name, const Tensor& like, const char* like_name) const {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op_, ": ", name, " is ", dtype_name(t), ", expected ",
                    dtype_name(like), " as ", like_name);
  }

  // A contiguous vector of `elements`; `symbol` says what they count.
  template <class T>
  T* vector(const Tensor& t, const char* name, int64_t elements, const char* symbol) const {
    const ScalarType wanted = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Float;
    STD_TORCH_CHECK(t.scalar_type() == wanted, op_, ": ", name, " is ", dtype_name(t.scalar_type()), ", expected ",
                    dtype_name(wanted));
    STD_TORCH_CHECK(t.numel() == elements, op_, ": ", name, " has ", t.numel(), " elements, expected ", symbol, "=", elements);
    contiguous(t, name);
    return static_cast<T*>(t.data_ptr());
  }

 private:
  const char* op_;
};

}  // namespace gptdist
