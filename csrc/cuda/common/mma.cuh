// Feeding the tensor cores: copies that land in shared memory on their own, ldmatrix, mma.sync.
//
// Shared memory is addressed by 32-bit numbers (shared_base() + offset). A generic pointer would take two registers and
// 64-bit arithmetic, and would hide from the compiler that an offset fits in an instruction.
//
// mma.sync m16n8k16 computes C (16x8, fp32) += A (16x16) B (16x8), 16-bit A and B. Lane l holds, with g = l / 4 and
// t2 = 2 (l % 4), two neighbouring elements in each register:
//
//        A: columns t2, t2+1   t2+8, t2+9         B: column g             C: columns t2, t2+1
//   row g         a[0]            a[2]      row t2, t2+1    b0       row g       c[0], c[1]
//   row g + 8     a[1]            a[3]      row t2+8, t2+9  b1       row g + 8   c[2], c[3]
//
// Two C fragments side by side, rounded to 16 bits, are an A fragment: a product becomes the next product's operand
// without leaving its registers (fragment_of).
//
// ldmatrix.x4 reads four 8x8 matrices: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes), and receives in
// register m the pair (row g, columns t2, t2+1) of matrix m; with .trans (column g, rows t2, t2+1).
#pragma once

#include <cstdint>

#include "vector.cuh"

namespace gptdist::cuda {

// Where dynamic shared memory begins. Aligned to a row of the widest tile, so that a row's number and the place in the
// row are different bits of an address.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(256) uint8_t dynamic_shared[];
  return uint32_t(__cvta_generic_to_shared(dynamic_shared));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The A fragment that two neighbouring C fragments make.
template <class T>
__device__ __forceinline__ void fragment_of(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// cp.async. What `inside` excludes is not read: its bytes in shared memory become zero.

__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}

template <int kBytes>  // 4 or 8
__device__ __forceinline__ void copy_async_small(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               ::"r"(to), "l"(from), "n"(kBytes), "r"(inside ? kBytes : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// This thread's copies have landed, but for those of the last kPending groups; the others' have after the barrier that
// follows.
template <int kPending = 0>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ int2 load_shared_int2(uint32_t address) {
  int2 v;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word));
}

__device__ __forceinline__ void store_shared_float2(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y));
}

}  // namespace gptdist::cuda
