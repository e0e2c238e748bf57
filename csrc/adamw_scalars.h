// What a step of AdamW needs beside its tensors, computed in double and rounded once. For the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

namespace gptdist {

struct AdamWScalars {
  float decay;             // 1 - lr weight_decay
  float beta1_complement;  // 1 - beta1
  float beta2;
  float beta2_complement;  // 1 - beta2
  float root_correction;   // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;         // lr / (1 - beta1^step)
};

inline AdamWScalars adamw_scalars(double lr, double beta1, double beta2, double eps, double weight_decay,
                                   int64_t step) {
  const double correction1 = 1.0 - std::pow(beta1, double(step)), correction2 = 1.0 - std::pow(beta2, double(step));
  return {float(1.0 - lr * weight_decay), float(1.0 - beta1), float(beta2), float(1.0 - beta2),
          float(1.0 / std::sqrt(correction2)), float(eps), float(lr / correction1)};
}

}  // namespace gptdist
