// Definitions of what nvcc's objects and csrc/cuda/launch.h want from libcudart: see fake_cudart.h. Linked into
// gptdist/_vm.so only. All are hidden (-fvisibility=hidden), and so serve no other library of the process.

#include "ptxvm/fake_cudart.h"

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

namespace {

using gptdist::fake_cudart::Region;

constexpr size_t kDefaultShared = 48 * 1024, kMostShared = 227 * 1024;  // dynamic bytes; the most is sm_90's

struct Kernel {
  std::string name;  // mangled
  size_t shared_limit = kDefaultShared;
};

// Objects register from their static constructors: these exist at the first use.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> map;
  return map;
}

std::vector<Region>& regions() {
  static std::vector<Region> list;
  return list;
}

GptdistLaunch launch_callback = nullptr;

}  // namespace

namespace gptdist::fake_cudart {

void forget_regions() { regions().clear(); }

void add_region(const void* address, int64_t bytes, bool writable, const char* label) {
  for (Region& region : regions()) {
    if (region.address == address && region.bytes == bytes) {  // read and overwritten in place
      region.writable |= writable;
      return;
    }
  }
  regions().push_back({address, bytes, writable, label});
}

}  // namespace gptdist::fake_cudart

extern "C" {

__attribute__((visibility("default"))) void gptdist_vm_set_launch(GptdistLaunch callback) { launch_callback = callback; }

__attribute__((visibility("default"))) int64_t gptdist_vm_regions(const Region** list) {
  *list = regions().data();
  return int64_t(regions().size());
}

// What the objects call from their static constructors and destructors. The binary itself is not needed: the tests take
// the PTX out of _C_cuda.so, which holds the same objects.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  kernels()[host_function].name = device_name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }

// Launches other than by cudaLaunchKernel (kernel<<<...>>>): csrc/cuda has none.

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { return cudaErrorNotSupported; }

// The runtime's interface.

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > kMostShared) return cudaErrorInvalidValue;
  found->second.shared_limit = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  const uint32_t grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > found->second.shared_limit) return cudaErrorInvalidValue;
  if (launch_callback == nullptr) return cudaErrorNoDevice;
  const int failed = launch_callback(found->second.name.c_str(), grid_size, block_size, shared_bytes, arguments);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected (the test device is not running)";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "an error of the test device";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
}
