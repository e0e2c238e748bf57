// What ops_cuda.cpp needs of a device, on a machine without one: tensors are on the CPU, kernels run on the PTX machine.
// The counterpart of cuda_device.h. Meta tensors get here too, so that a mix of devices can be tested.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "cuda/kernels.h"
#include "ptxvm/fake_cudart.h"

#define GPTDIST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptdist_vm, CompositeExplicitAutograd, m)
#define GPTDIST_ANY_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptdist_vm, CompositeExplicitAutograd, m)

extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);

namespace gptdist {

inline bool on_device(const torch::stable::Tensor& x) { return x.is_cpu(); }

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) { fake_cudart::forget_regions(); }
  cuda::Stream stream() const { return nullptr; }
};

inline torch::stable::Tensor host_table(int64_t words) {
  return torch::stable::empty({words}, torch::headeronly::ScalarType::Long);
}
inline torch::stable::Tensor upload(const torch::stable::Tensor& table, const torch::stable::Tensor&) { return table; }

inline void note_access(const void* address, int64_t bytes, bool writable, const char* label) {
  fake_cudart::add_region(address, bytes, writable, label);
}

}  // namespace gptdist
