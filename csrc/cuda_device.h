// What ops_cuda.cpp needs of a CUDA device. The test device has its own version of this file: ptxvm/test_device.h.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "cuda/kernels.h"

// Where the ops are registered: those of tensors, and those without.
#define GPTDIST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CUDA, m)
#define GPTDIST_ANY_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CompositeExplicitAutograd, m)

// Declared here, not taken from the toolkit's headers: no compiler but nvcc needs to find those.
extern "C" int cudaSetDevice(int device);
extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);

namespace gptdist {

inline bool on_device(const torch::stable::Tensor& x) { return x.is_cuda(); }

// The current stream of a device. torch's CUDA part may be absent, and the library still loads: it is looked up here.
inline cuda::Stream current_stream(int32_t device_index) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // in no scope that we would search
    return reinterpret_cast<Function>(dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA streams: aoti_torch_get_current_cuda_stream is missing");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device_index, &stream) == 0, "torch has no current stream for device ", device_index);
  return stream;
}

// Makes a tensor's device the current one while it lives, for torch's copy of the CUDA runtime and for this library's.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(cudaSetDevice(index_) == 0, "CUDA device ", index_, " cannot be used (see gptdist doctor)");
  }
  cuda::Stream stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Host memory for `words` int64, from which upload() copies: pinned, so that the copy is queued as a kernel is.
inline torch::stable::Tensor host_table(int64_t words) {
  return torch::stable::empty({words}, torch::headeronly::ScalarType::Long, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU), /*pin_memory=*/true);
}

// The table on the device of `like`, from here on in the order of its current stream. The host does not wait.
inline torch::stable::Tensor upload(const torch::stable::Tensor& table, const torch::stable::Tensor& like) {
  torch::stable::Tensor copy =
      torch::stable::new_empty(like, {table.numel()}, torch::headeronly::ScalarType::Long);
  return torch::stable::copy_(copy, table, /*non_blocking=*/true);
}

// What a kernel may touch: only the test device wants to know.
inline void note_access(const void*, int64_t, bool, const char*) {}

}  // namespace gptdist
