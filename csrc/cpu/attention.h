// attention on a CPU: what ops_cpu_attention.cpp calls. Mathematics: attention_forward.h and attention_backward.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace gptdist::cpu {

// Keys of a tile, and queries of a tile of the backward. The grid of tiles starts at position 0 whoever computes.
constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileQueries = 64;

constexpr int64_t kHeadDimStep = 16, kMaxHeadDim = 256;

// A tensor (B, T, Hkv, slots, D) whose D elements are contiguous; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t batch, position, kv_head, slot;

  T* at(int64_t b, int64_t t, int64_t h, int64_t s) const {
    return data + b * batch + t * position + h * kv_head + s * slot;
  }
};

// Which probabilities are dropped: a function of their place (gptdist/ops/random.py). Without sample_ids, none.
struct AttentionDropout {
  const int64_t* sample_ids;  // [B]
  uint64_t key;
  uint32_t threshold;  // floor(p 2^32)
  float factor;        // 1 / (1 - p)
  int32_t site, head_offset;
};

struct AttentionShape {
  int64_t batch, positions, kv_heads, group, head_dim;
  bool causal;
  const int32_t* doc_start;  // [B, T], or nullptr
  AttentionDropout dropout;
  const int64_t* lengths;  // [B]: keys before the first query; nullptr: none
};

template <class T>
struct AttentionForward {
  AttentionShape shape;
  Heads<const T> qkv;  // slots: the G queries of a kv head, its k, its v
  Heads<T> out;        // slots: the G queries; overwritten
  float* lse;          // [B, Hkv, G, T] fp32, overwritten
};

template <class T>
struct AttentionBackward {
  AttentionShape shape;
  Heads<const T> dout, qkv, out;
  const float* lse;  // [B, Hkv, G, T] fp32
  float* delta;      // [B, Hkv, G, T] fp32: rowsum(dout * out), written by attention_delta
  Heads<T> dqkv;     // overwritten
};

// A cache (pages, page, Hkv, D) whose D elements are contiguous; strides in elements. Position s of row b lies in page
// table[b, s / page_size].
template <class T>
struct Pages {
  const T* data;
  int64_t page, slot, kv_head;  // strides
  int64_t page_size;
  const int32_t* table;  // [B, table_width]
  int64_t table_width;

  const T* at(int64_t b, int64_t s, int64_t h) const {
    return data + table[b * table_width + s / page_size] * page + s % page_size * slot + h * kv_head;
  }
};

// decode_attention: shape.lengths is set, shape.positions are those of the queries.
template <class T>
struct DecodeAttention {
  AttentionShape shape;
  Heads<const T> queries;
  Pages<T> keys, values;
  Heads<T> out;  // overwritten
};

// Keys of a task of decode_part, whatever the number of threads. So many rows of K and V stay in a second-level cache.
constexpr int64_t kSegmentKeys = 256;

// Floats of a query's part of a sum over a segment of keys: D sums of values, then the maximum and the denominator.
inline int64_t part_floats(int64_t head_dim) { return head_dim + 2; }

// Positions [begin, end) of a kv head of a row of the batch.
struct Span {
  int64_t begin, end;
};

struct ForwardTask {
  int64_t b, h;
  Span queries;  // begin: a multiple of kTileQueries
};

// One pass over tiles that writes dq of `queries` (from all keys that they see), dk and dv of `keys` (from all queries
// that see them, which `queries` must hold), or all three.
struct BackwardTask {
  int64_t b, h;
  Span queries, keys;  // begin: multiples of kTileQueries, kTileKeys
  bool write_dq, write_dkv;
};

// The kernels of an instruction set.
template <class T>
struct AttentionKernels {
  void (*forward)(const AttentionForward<T>& args, const ForwardTask& task, std::byte* scratch);
  void (*delta)(const AttentionBackward<T>& args, int64_t b, int64_t h, Span queries);
  void (*backward)(const AttentionBackward<T>& args, const BackwardTask& task, std::byte* scratch);

  // decode_attention: as the forward; or, for few queries, parts [Tq * G][part_floats] of one segment of the keys, and
  // the sum of `count` of them that are `stride` floats apart.
  void (*decode)(const DecodeAttention<T>& args, const ForwardTask& task, std::byte* scratch);
  void (*decode_part)(const DecodeAttention<T>& args, int64_t b, int64_t h, Span keys, float* parts);
  void (*decode_sum)(const DecodeAttention<T>& args, int64_t b, int64_t h, const float* parts, int64_t count,
                     int64_t stride);

  // Bytes of scratch memory, from a multiple of 64, for a task of that many queries' positions (backward: 0 if no dq).
  size_t (*forward_scratch)(const AttentionShape& shape, int64_t queries);
  size_t (*backward_scratch)(const AttentionShape& shape, int64_t queries);
};

template <class T>
const AttentionKernels<T>& attention_kernels(Isa isa);

// One table for each instruction set, in simd_*.cpp. fp32 has no use for bf16 products.
extern const AttentionKernels<float> kFp32Portable, kFp32Avx2, kFp32Avx512;
extern const AttentionKernels<Bf16> kBf16Portable, kBf16Avx2, kBf16Avx512, kBf16Avx512Bf16;

}  // namespace gptdist::cpu
