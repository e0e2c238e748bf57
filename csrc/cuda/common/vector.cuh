// Element types, and vectors of elements that are loaded and stored by one instruction of 8 or 16 bytes per thread.
//
// A vector stays packed in registers until its elements are wanted as floats. Floats are rounded to nearest even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gptdist::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

constexpr int kVectorBytes = 16;  // the widest access that every target has
constexpr int kWarpSize = 32;

// Elements per vector where arrays of several types are walked together: a thread must hold the same columns of all of
// them, so the widest type fills 16 bytes and a narrower one 8. Neighbouring threads hold neighbouring vectors, which
// makes every access of a warp a run of whole 32-byte sectors. (16 bytes of the narrow type would mean 32 of the wide
// one: two accesses at a stride of 32 bytes, each touching twice the sectors it uses.)
template <class... Types>
__host__ __device__ constexpr int vector_elements() {
  int widest = 0;
  ((widest = int(sizeof(Types)) > widest ? int(sizeof(Types)) : widest), ...);
  return kVectorBytes / widest;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Fp16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (sizeof(T) == 2 && std::is_same_v<T, Bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// Two elements in one 32-bit word, the lower column in the lower half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <> __device__ __forceinline__ uint32_t pack<Fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T> __device__ __forceinline__ float2 unpack(uint32_t word);
template <> __device__ __forceinline__ float2 unpack<Bf16>(uint32_t word) {  // a bf16 is a float's upper half
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<Fp16>(uint32_t word) {
  const __half low = __ushort_as_half(uint16_t(word)), high = __ushort_as_half(uint16_t(word >> 16));
  return make_float2(__half2float(low), __half2float(high));
}

template <class T, int N>
struct Vector {
  static constexpr int kWords = N * int(sizeof(T)) / 4;
  static_assert(kWords == 2 || kWords == 4, "8 or 16 bytes");
  uint32_t words[kWords];

  static __device__ __forceinline__ Vector zero() {
    Vector v;
#pragma unroll
    for (int i = 0; i < kWords; ++i) v.words[i] = 0;
    return v;
  }

  // The elements at p, which must be aligned to the vector's size.
  static __device__ __forceinline__ Vector load(const T* p) {
    Vector v;
    if constexpr (kWords == 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(p);
      v.words[0] = w.x, v.words[1] = w.y, v.words[2] = w.z, v.words[3] = w.w;
    } else {
      const uint2 w = *reinterpret_cast<const uint2*>(p);
      v.words[0] = w.x, v.words[1] = w.y;
    }
    return v;
  }

  // __stwb is an ordinary store, but one that stays whole: nvcc 13.0 takes an assignment through uint4* apart into four
  // stores of 4 bytes where it cannot see the alignment for itself (cross_entropy's rows).
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 4) {
      __stwb(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      __stwb(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
    }
  }

  __device__ __forceinline__ void to_floats(float (&values)[N]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        values[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack<T>(words[i]);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
      }
    }
  }

  static __device__ __forceinline__ Vector from_floats(const float (&values)[N]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) v.words[i] = __float_as_uint(values[i]);
      else v.words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
    return v;
  }
};

// N floats from consecutive elements at p, in as many 16-byte loads as they fill (8 fp32: two).
template <int N, class T>
__device__ __forceinline__ void load_floats(const T* p, float (&values)[N]) {
  constexpr int kAtOnce = N * int(sizeof(T)) > kVectorBytes ? kVectorBytes / int(sizeof(T)) : N;
#pragma unroll
  for (int i = 0; i < N; i += kAtOnce) {
    float part[kAtOnce];
    Vector<T, kAtOnce>::load(p + i).to_floats(part);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) values[i + j] = part[j];
  }
}

}  // namespace gptdist::cuda
