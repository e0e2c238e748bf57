// A CUDA runtime without CUDA, for tests: it remembers which kernels the objects of csrc/cuda register, and hands every
// launch to a callback (tests/cuda_vm.py), which runs it on the PTX machine.
#pragma once

#include <cstdint>

namespace gptdist::fake_cudart {

// Memory that the current op's kernels may touch.
struct Region {
  const void* address;
  int64_t bytes;
  int32_t writable;
  const char* label;  // the tensor's name in ops_cuda.cpp
};

void forget_regions();
void add_region(const void* address, int64_t bytes, bool writable, const char* label);

}  // namespace gptdist::fake_cudart

// What tests/cuda_vm.py calls through ctypes.
extern "C" {

// kernel: mangled name; grid, block: three numbers each; arguments: as for cudaLaunchKernel. Returns 0 unless it failed.
using GptdistLaunch = int (*)(const char* kernel, const uint32_t* grid, const uint32_t* block, uint64_t shared_bytes,
                              void** arguments);
void gptdist_vm_set_launch(GptdistLaunch callback);
// Stores where the regions are; returns how many there are.
int64_t gptdist_vm_regions(const gptdist::fake_cudart::Region** regions);
}
