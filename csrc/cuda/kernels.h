// The CUDA kernels' host interface: pointers, sizes, a stream. No tensors, no CUDA headers.
//
// Every function launches on `stream`, does not wait, allocates nothing, and returns nullptr or a sentence that says
// what was wrong. Arguments were checked by the caller (ops_cuda.cpp): pointers are 16-byte aligned, rows contiguous.
// Zero rows launch nothing. Offsets are 64-bit: more than 2^31 elements are allowed.
#pragma once

#include <cstdint>

#include "../adamw_scalars.h"

namespace gptdist::cuda {

using Stream = void*;        // cudaStream_t
using Error = const char*;   // nullptr: none; static storage

enum class Dtype : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

inline int32_t bytes_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }

// Widths that the row-wise kernels (layer norm) take: kWidthStep divides the width, kMinWidth <= width <= kMaxWidth.
constexpr int32_t kWidthStep = 8, kMinWidth = 64, kMaxWidth = 16384;

// layer_norm.cu

struct LayerNormForward {
  Dtype dtype;            // of x and y
  Dtype sum_dtype;        // of residual and sum: dtype or fp32 (ignored where residual is nullptr)
  Dtype parameter_dtype;  // of weight and bias: dtype or fp32
  const void* x;          // [rows, width]
  const void* residual;   // [rows, width], or nullptr
  const void* weight;     // [width]
  const void* bias;       // [width], or nullptr
  void* y;                // [rows, width], overwritten
  void* sum;              // [rows, width] x + residual, overwritten; nullptr where residual is
  float* mean;            // [rows] fp32, overwritten
  float* rstd;            // [rows] fp32, overwritten
  int64_t rows;
  int32_t width;
  float eps;
};
Error layer_norm_forward(const LayerNormForward& args, Stream stream);

struct LayerNormBackward {
  Dtype dtype;            // of dy
  Dtype sum_dtype;        // of s, ds and dx: dtype or fp32
  Dtype parameter_dtype;  // of weight
  const void* dy;         // [rows, width]
  const void* s;          // [rows, width] what was normalised: x, or x + residual
  const void* ds;         // [rows, width] gradient that reaches s beside the norm, added to dx; or nullptr
  const void* weight;     // [width]
  const float* mean;      // [rows]
  const float* rstd;      // [rows]
  void* dx;               // [rows, width], overwritten
  float* partials;        // [layer_norm_partials(rows, width), 2, width] scratch: sums of dy xhat, of dy
  float* dweight;         // [width] fp32, overwritten
  float* dbias;           // [width] fp32, overwritten; or nullptr
  int64_t rows;
  int32_t width;
};
// Blocks of rows whose parameter gradients are summed apart. A function of the shape alone: the same bits on any GPU.
int32_t layer_norm_partials(int64_t rows, int32_t width);
Error layer_norm_backward(const LayerNormBackward& args, Stream stream);

// bias_gelu.cu

struct BiasGeluForward {
  Dtype dtype;            // of x and y
  Dtype parameter_dtype;  // of bias: dtype or fp32
  const void* x;          // [rows, width]; width a multiple of kWidthStep
  const void* bias;       // [width], or nullptr
  void* y;                // [rows, width], overwritten
  int64_t rows;
  int32_t width;
};
Error bias_gelu_forward(const BiasGeluForward& args, Stream stream);

struct BiasGeluBackward {
  Dtype dtype;            // of dy, x and dx
  Dtype parameter_dtype;  // of bias
  const void* dy;         // [rows, width]
  const void* x;          // [rows, width]
  const void* bias;       // [width], or nullptr
  void* dx;               // [rows, width], overwritten
  float* partials;        // [bias_gelu_partials(rows, width), width] scratch; nullptr where no bias gradient is wanted
  float* dbias;           // [width] fp32, overwritten; nullptr where partials is
  int64_t rows;
  int32_t width;
};
int32_t bias_gelu_partials(int64_t rows, int32_t width);
Error bias_gelu_backward(const BiasGeluBackward& args, Stream stream);

// cross_entropy.cu. Any vocabulary and any row_stride >= vocabulary: rows need not be 16-byte aligned, the base is.
// A target outside [0, vocabulary) that is not ignore_index makes the row's loss and gradients NaN: no wait for the
// device to report it.

struct CrossEntropyForward {
  Dtype dtype;             // of logits
  const void* logits;      // [rows, vocabulary], row_stride elements from row to row
  const int64_t* targets;  // [rows]
  float* loss;             // [rows] fp32, overwritten; 0 where the target is ignore_index
  float* lse;              // [rows] fp32, overwritten: log-sum-exp of the row
  int64_t rows, row_stride;
  int32_t vocabulary;
  int64_t ignore_index;
};
Error cross_entropy_forward(const CrossEntropyForward& args, Stream stream);

struct CrossEntropyBackward {
  Dtype dtype;             // of logits and dlogits
  const void* logits;      // [rows, vocabulary]
  const int64_t* targets;  // [rows]
  const float* lse;        // [rows]
  const float* dloss;      // [rows] fp32
  void* dlogits;           // [rows, vocabulary], overwritten; may be logits itself (a buffer private to the op)
  int64_t rows, row_stride;  // of both
  int32_t vocabulary;
  int64_t ignore_index;
};
Error cross_entropy_backward(const CrossEntropyBackward& args, Stream stream);

// dropout.cu: its backward is the same function on the gradient. Masks: gptdist/ops/random.py, bit for bit.

struct Dropout {
  Dtype dtype;
  const void* x;              // [batch, positions, channels]
  const int64_t* key;         // [1], on the device: a changing step needs no new launch arguments
  const int64_t* sample_ids;  // [batch]
  void* y;                    // like x, overwritten
  int64_t batch, positions;
  int32_t channels;           // any; rows need not be 16-byte aligned where it is not a multiple of kWidthStep
  uint32_t threshold;         // kept iff random word >= threshold = floor(p 2^32)
  float scale;                // 1 / (1 - p)
  int32_t site, row_offset;
};
Error dropout(const Dropout& args, Stream stream);

// attention_forward.cu, attention_backward.cu. One projection holds everything: for each kv head its `group` query heads,
// then k, then v. All arrays are contiguous; elements are 16 bits wide; D is head_dim, 64 or 128.

struct AttentionDropout {
  const int64_t* key;         // [1], on the device; nullptr: no dropout, and the rest is ignored
  const int64_t* sample_ids;  // [batch]
  uint32_t threshold;         // kept iff random word >= threshold = floor(p 2^32)
  float scale;                // 1 / (1 - p)
  int32_t site, head_offset;  // head_offset: global number of query head 0
};

struct AttentionForward {
  Dtype dtype;               // bf16 or fp16, of qkv and out
  const void* qkv;           // [batch, positions, kv_heads, group + 2, D]
  const int32_t* doc_start;  // [batch, positions]: the first key that a query sees; never decreasing along a row, at
                             // most the query's own position, else results mean nothing. nullptr: 0. Only where causal
  void* out;                 // [batch, positions, kv_heads, group, D], overwritten
  float* lse;                // [batch, kv_heads, group, positions], overwritten: log-sum-exp of the scaled scores
  int32_t qkv_stride, out_stride;  // elements from position to position: kv_heads (group + 2) D and kv_heads group D
  int32_t batch, positions, kv_heads, group, head_dim;
  int32_t causal;            // 1: a query sees no later key. 0: it sees all
  float softmax_scale;       // > 0
  AttentionDropout dropout;
};
Error attention_forward(const AttentionForward& args, Stream stream);

struct AttentionBackward {
  Dtype dtype;               // of dout, qkv, out and dqkv
  const void* dout;          // [batch, positions, kv_heads, group, D]
  const void* qkv;           // [batch, positions, kv_heads, group + 2, D]
  const void* out;           // [batch, positions, kv_heads, group, D]
  const float* lse;          // [batch, kv_heads, group, positions]
  const int32_t* doc_start;  // as in the forward
  float* statistics;         // [batch, kv_heads, group, positions, 2] scratch: lse log2(e), dot product of dout and out
  void* dqkv;                // like qkv, overwritten
  int32_t qkv_stride, out_stride;  // of qkv and dqkv; of out and dout
  int32_t batch, positions, kv_heads, group, head_dim;
  int32_t causal;
  float softmax_scale;
  AttentionDropout dropout;
};
Error attention_backward(const AttentionBackward& args, Stream stream);

// adamw.cu and grad_norm.cu walk a list of tensors in one launch. Its table is in device memory: an entry for each
// tensor, and the number of the chunk (a block's share of a tensor) that it begins with. No entry is empty, so these
// numbers ascend. Tensors are contiguous; where one is not aligned to its vectors, its elements are moved one by one.

constexpr int64_t kAdamWChunk = 8192, kNormChunk = 16384;  // elements; a tensor's last chunk may have fewer

struct AdamWTensor {
  float* param;        // [elements], stepped in place
  float* exp_avg;      // [elements], updated in place
  float* exp_avg_sq;   // [elements], updated in place
  const void* grad;    // [elements] of grad_dtype
  void* shadow;        // [elements] of shadow_dtype, overwritten with the new params; or nullptr
  int64_t elements;
  Dtype grad_dtype;
  Dtype shadow_dtype;  // bf16 or fp16 (ignored where shadow is nullptr)
};

struct AdamW {
  const int64_t* first_chunks;  // [count]
  const AdamWTensor* tensors;   // [count]
  const float* grad_scale;      // [1], multiplied into the gradients; or nullptr
  int64_t chunks;
  int32_t count;
  AdamWScalars scalars;
};
Error adamw(const AdamW& args, Stream stream);

struct NormTensor {
  const void* x;  // [elements] of dtype
  int64_t elements;
  Dtype dtype;
};

struct GradNorm {
  const int64_t* first_chunks;  // [count]
  const NormTensor* tensors;    // [count]
  double* partials;             // [chunks] scratch: sums of squares
  float* norm;                  // [1], overwritten
  int64_t chunks;
  int32_t count;
};
Error grad_norm(const GradNorm& args, Stream stream);

// decode_attention.cu. Queries against keys and values in pages, for generation. D is head_dim, 64 or 128.

struct DecodeAttention {
  Dtype dtype;                 // bf16 or fp16, of q, the caches and out
  const void* q;               // [batch, queries, kv_heads, group, D], by q_strides; D contiguous
  const void* k_cache;         // [pages, page, kv_heads, D]
  const void* v_cache;         // [pages, page, kv_heads, D]
  const int32_t* block_table;  // [batch, table_pages]: pages of each row in order; entries beyond a row's last key are
                               // not used, and one that is no page counts as the nearest that is
  const int64_t* lengths;      // [batch]: query i stands at lengths + i and sees the positions up to its own. A query
                               // that stands beyond the table, or whose length is negative, becomes NaN
  void* out;                   // [batch, queries, kv_heads, group, D], overwritten
  float* partial_out;          // [splits, batch, kv_heads, queries, group, D] scratch; nullptr where splits is 1
  float* partial_state;        // [splits, batch, kv_heads, queries, group, 2] scratch: largest score, sum
  int64_t q_strides[4];        // elements from one of q's first four indices to the next; multiples of kWidthStep
  int32_t batch, queries, kv_heads, group, head_dim;
  int32_t pages, page, table_pages;  // page: a power of two
  int32_t splits;              // decode_attention_splits(args)
  float softmax_scale;         // > 0
};
// Parts that a row's keys are divided into. A function of the shape alone: nothing waits for lengths.
constexpr int32_t kMaxDecodePositions = 1 << 30;  // table_pages * page, and queries
int32_t decode_attention_splits(const DecodeAttention& args);
Error decode_attention(const DecodeAttention& args, Stream stream);

}  // namespace gptdist::cuda
