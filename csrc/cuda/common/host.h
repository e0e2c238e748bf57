// What the launchers share on the host: error sentences with values, and keys to switch on element types by.
#pragma once

#include <cstdint>
#include <cstdio>

#include "../kernels.h"

namespace gptdist::cuda {

// A sentence made as printf makes it; valid until the thread's next error.
template <class... Values>
Error error(const char* format, Values... values) {
  thread_local char sentence[256];
  std::snprintf(sentence, sizeof sentence, format, values...);
  return sentence;
}

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::kFp32 ? "fp32" : dtype == Dtype::kBf16 ? "bf16" : dtype == Dtype::kFp16 ? "fp16" : "unknown";
}

// One number for a combination of element types.
constexpr int32_t types(Dtype a, Dtype b, Dtype c = Dtype::kFp32) {
  return int32_t(a) * 100 + int32_t(b) * 10 + int32_t(c);
}

}  // namespace gptdist::cuda
