// The one place that launches kernels. Every launcher computes a LaunchPlan and calls this; a test forbids any other way.
#pragma once

#include <cuda_runtime.h>

#include "launch_plan.h"

namespace gptdist::cuda {

// Launch `kernel(args)` as planned. Kernels take one struct by value.
template <class Args>
Error launch(void (*kernel)(Args), const LaunchPlan& plan, const Args& args, Stream stream) {
  if (plan.shared_bytes > 48 * 1024) {  // more than the default needs asking for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(plan.grid[0], plan.grid[1], plan.grid[2]),
      dim3(plan.block[0], plan.block[1], plan.block[2]), arguments, plan.shared_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gptdist::cuda
