// What the CPU ops share: the instruction set in use, argument checks, threads. Only ops*.cpp include it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

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
