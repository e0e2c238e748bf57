// What all CPU ops share on the outside: instruction sets, element types, what a thread's work should be.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define GPTDIST_X86 1
#endif

namespace gptdist::cpu {

// Instruction sets, ascending. A level runs only where the processor has it.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline Isa best_isa() {
#ifdef GPTDIST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// Of the tables nameAvx512, nameAvx2 and namePortable that of the highest level up to `isa`.
#ifdef GPTDIST_X86
#define GPTDIST_CHOOSE(isa, name) \
  ((isa) >= Isa::kAvx512 ? name##Avx512 : (isa) == Isa::kAvx2 ? name##Avx2 : name##Portable)
#else
#define GPTDIST_CHOOSE(isa, name) ((void)(isa), name##Portable)
#endif

// The instruction set in use.
inline std::atomic<Isa>& active_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// bfloat16 and float16 as their 16 bits; the kernels need no class for them.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

enum class Dtype : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

// Elements worth a thread's while: below about 30 microseconds of work, waking a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 16;

}  // namespace gptdist::cpu
