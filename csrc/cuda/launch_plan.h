// Which kernel runs for given shapes, and with what grid, block and shared memory. Plain host C++: the launchers in
// the .cu files call these functions and pass what they return to launch(); the tests call them too.
//
// The reasons for the sizes stand in the headers of the .cu files. No GPU has timed them: they follow from registers
// per thread (ptxas -v) and from how many bytes a multiprocessor must keep in flight to hide the latency of memory
// (bandwidth x latency: about 18 KB on an H100, 3.35 TB/s x 0.7 us / 132).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels.h"

namespace gptdist::cuda {

struct LaunchPlan {
  const char* kernel;     // name of the __global__ template, without its arguments
  int32_t variant;        // which instantiation, as the .cu file numbers them
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;  // dynamic
};

constexpr int64_t kMaxGrid = (int64_t(1) << 31) - 1;  // blocks along x

// 0 where there are more blocks than a grid can have: the launchers refuse such a plan.
inline uint32_t grid_of(int64_t blocks) { return blocks > kMaxGrid ? 0 : uint32_t(blocks); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// fold_partials.cuh

constexpr int32_t kFoldColumns = 32, kFoldGroups = 16;

inline LaunchPlan plan_fold_partials(int32_t halves, int32_t width) {
  return {"fold_partials_kernel", 0, {uint32_t(ceil_div(width, kFoldColumns)), uint32_t(halves), 1},
          {kFoldColumns, kFoldGroups, 1}, 0};
}

// layer_norm.cu

// How a row is divided: kWarpN gives it to one warp, N elements a thread; kBlock to a block, 16 elements a thread;
// kWideBlock to a block of kWideThreads: a backward whose row does not fit in registers beside its sums.
enum LayerNormVariant : int32_t { kWarp16, kWarp24, kWarp32, kBlock, kWideBlock };

constexpr int32_t kNormWarps = 4;         // warps per block, and so rows, where a row is one warp's
constexpr int32_t kBlockMaxWidth = 8192;  // of a backward's kBlock: 512 threads, the most that may have 128 registers
constexpr int32_t kWideThreads = 1024;    // the same for every width, so that a thread's columns are at fixed distances
constexpr int32_t kMaxPartials = 216;     // two blocks for each multiprocessor of an A100: no half-empty second wave

constexpr bool block_per_row(int32_t variant) { return variant >= kBlock; }

constexpr int32_t elements_per_thread(int32_t variant) {
  return variant == kWarp24 ? 24 : variant == kWarp32 ? 32 : 16;
}

constexpr LayerNormVariant layer_norm_variant(int32_t width, int32_t block_max_width) {
  for (const LayerNormVariant variant : {kWarp16, kWarp24, kWarp32}) {
    if (width <= 32 * elements_per_thread(variant)) return variant;
  }
  return width <= block_max_width ? kBlock : kWideBlock;
}

constexpr uint32_t layer_norm_threads(LayerNormVariant variant, int32_t width) {
  if (variant == kWideBlock) return kWideThreads;
  return variant == kBlock ? uint32_t(ceil_div(width, 32 * elements_per_thread(kBlock)) * 32) : kNormWarps * 32;
}

// At least two rows for every warp (eight for a block of four), at least four for a block that has one row at a time.
inline int32_t layer_norm_partial_count(int64_t rows, int32_t width) {
  const bool block = block_per_row(layer_norm_variant(width, kBlockMaxWidth));
  const int64_t blocks = ceil_div(rows, block ? 4 : 2 * kNormWarps);
  return int32_t(blocks < kMaxPartials ? blocks : kMaxPartials);
}

inline LaunchPlan plan_layer_norm_forward(const LayerNormForward& args) {
  const LayerNormVariant variant = layer_norm_variant(args.width, kMaxWidth);
  const int64_t blocks = block_per_row(variant) ? args.rows : ceil_div(args.rows, kNormWarps);
  return {"layer_norm_forward_kernel", variant, {grid_of(blocks), 1, 1},
          {layer_norm_threads(variant, args.width), 1, 1}, 0};
}

inline LaunchPlan plan_layer_norm_backward(const LayerNormBackward& args) {
  const LayerNormVariant variant = layer_norm_variant(args.width, kBlockMaxWidth);
  const uint32_t rows_at_once = block_per_row(variant) ? 1 : kNormWarps;
  return {"layer_norm_backward_kernel", variant, {uint32_t(layer_norm_partial_count(args.rows, args.width)), 1, 1},
          {layer_norm_threads(variant, args.width), 1, 1}, rows_at_once * uint32_t(args.width) * 4};
}

// bias_gelu.cu and dropout.cu walk [rows, width] in tiles: threads_x vectors of 16 bytes side by side, threads_y rows
// at once. A warp spans 512 consecutive bytes of a row, or whole narrow rows. The tiles of a block of rows are
// neighbours in the grid, so blocks that run together read whole rows.

constexpr int32_t kTileThreads = 256;

struct Tiles {
  uint32_t threads_x, threads_y;
  int64_t across;  // tiles in a row
};

inline Tiles tiles_of(int32_t width, int32_t vector_elements) {
  const int64_t vectors = ceil_div(width, vector_elements);
  uint32_t threads_x = 32;
  while (threads_x > 1 && threads_x / 2 >= vectors) threads_x /= 2;
  return {threads_x, kTileThreads / threads_x, ceil_div(vectors, threads_x)};
}

constexpr int32_t kGeluForwardRows = 4;   // rows that a thread has in flight
constexpr int32_t kGeluBackwardRows = 2;  // of two arrays each
constexpr int32_t kGeluRowsPerPartial = 16;

inline int32_t bias_gelu_partial_count(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kGeluRowsPerPartial);
  return int32_t(blocks < kMaxPartials ? blocks : kMaxPartials);
}

inline LaunchPlan plan_bias_gelu_forward(const BiasGeluForward& args) {
  const Tiles tiles = tiles_of(args.width, 16 / bytes_of(args.dtype));
  const int64_t blocks = ceil_div(args.rows, int64_t(tiles.threads_y) * kGeluForwardRows) * tiles.across;
  return {"bias_gelu_forward_kernel", 0, {grid_of(blocks), 1, 1}, {tiles.threads_x, tiles.threads_y, 1}, 0};
}

inline LaunchPlan plan_bias_gelu_backward(const BiasGeluBackward& args) {
  const Tiles tiles = tiles_of(args.width, 16 / bytes_of(args.dtype));
  const int64_t blocks = bias_gelu_partial_count(args.rows) * tiles.across;
  return {"bias_gelu_backward_kernel", 0, {grid_of(blocks), 1, 1}, {tiles.threads_x, tiles.threads_y, 1}, 0};
}

// cross_entropy.cu

constexpr int32_t kEntropyMaxThreads = 512, kEntropyVectors = 4;  // vectors that a thread has in flight

// A power of two of threads, such that one sweep of kEntropyVectors a thread covers a short row.
inline uint32_t cross_entropy_threads(int32_t vocabulary, Dtype dtype) {
  const int64_t vectors = ceil_div(vocabulary, 16 / bytes_of(dtype));
  uint32_t threads = 32;
  while (threads < kEntropyMaxThreads && threads * kEntropyVectors < vectors) threads *= 2;
  return threads;
}

inline LaunchPlan plan_cross_entropy_forward(const CrossEntropyForward& args) {
  return {"cross_entropy_forward_kernel", 0, {grid_of(args.rows), 1, 1},
          {cross_entropy_threads(args.vocabulary, args.dtype), 1, 1}, 0};
}

inline LaunchPlan plan_cross_entropy_backward(const CrossEntropyBackward& args) {
  return {"cross_entropy_backward_kernel", 0, {grid_of(args.rows), 1, 1},
          {cross_entropy_threads(args.vocabulary, args.dtype), 1, 1}, 0};
}

// dropout.cu

enum DropoutVariant : int32_t { kDropoutVectors, kDropoutElements };  // elements where rows are not aligned to 16 bytes

constexpr int32_t kDropoutRows = 4;  // rows that a thread has in flight

struct DropoutTiles {
  Tiles tiles;
  int64_t position_blocks;  // blocks of threads_y * kDropoutRows positions in a sample
};

inline DropoutTiles dropout_tiles(const Dropout& args) {
  const bool aligned = args.channels % kWidthStep == 0;
  const Tiles tiles = tiles_of(args.channels, aligned ? 16 / bytes_of(args.dtype) : 4);
  return {tiles, ceil_div(args.positions, int64_t(tiles.threads_y) * kDropoutRows)};
}

inline LaunchPlan plan_dropout(const Dropout& args) {
  const DropoutTiles shape = dropout_tiles(args);
  const int64_t blocks = args.batch * shape.position_blocks * shape.tiles.across;
  const DropoutVariant variant = args.channels % kWidthStep == 0 ? kDropoutVectors : kDropoutElements;
  return {"dropout_kernel", variant, {grid_of(blocks), 1, 1}, {shape.tiles.threads_x, shape.tiles.threads_y, 1}, 0};
}

// attention_forward.cu and attention_backward.cu

// Dropout's kernels ask at run time whether there are documents: beside the mask's arithmetic that costs nothing.
enum AttentionVariant : int32_t { kAttentionPlain, kAttentionDocuments, kAttentionDropout };

constexpr int32_t kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * 32;

struct AttentionTile {
  int32_t queries, keys;
};

constexpr AttentionTile attention_forward_tile(int32_t head_dim) {
  return head_dim == 64 ? AttentionTile{128, 128} : AttentionTile{128, 64};
}

constexpr AttentionTile attention_dkv_tile(int32_t head_dim) {
  return head_dim == 64 ? AttentionTile{64, 128} : AttentionTile{64, 64};
}

constexpr AttentionTile attention_dq_tile(int32_t head_dim) {
  return head_dim == 64 ? AttentionTile{128, 64} : AttentionTile{128, 32};
}

constexpr int32_t kStatisticsRows = 16;  // of attention_statistics_kernel's blocks: 8 threads a row

template <class Args>
int64_t attention_heads(const Args& args) {
  return int64_t(args.batch) * args.kv_heads * args.group;
}

template <class Args>
AttentionVariant attention_variant(const Args& args) {
  if (args.dropout.key != nullptr && args.dropout.threshold > 0) return kAttentionDropout;  // 0: p < 2^-32, all is kept
  return args.doc_start != nullptr ? kAttentionDocuments : kAttentionPlain;
}

// Shared memory: Q, one tile of K and one of V.
inline LaunchPlan plan_attention_forward(const AttentionForward& args) {
  const AttentionTile tile = attention_forward_tile(args.head_dim);
  const int64_t blocks = ceil_div(args.positions, tile.queries) * attention_heads(args);
  return {"attention_forward_kernel", attention_variant(args), {grid_of(blocks), 1, 1}, {kAttentionThreads, 1, 1},
          uint32_t((tile.queries + 2 * tile.keys) * args.head_dim * 2)};
}

inline LaunchPlan plan_attention_statistics(const AttentionBackward& args) {
  const int64_t blocks = ceil_div(args.positions, kStatisticsRows) * attention_heads(args);
  return {"attention_statistics_kernel", 0, {grid_of(blocks), 1, 1}, {kStatisticsRows * 8, 1, 1}, 0};
}

// Shared memory: K and V; Q and dO twice, with 8 bytes of statistics and 4 of document starts a query.
inline LaunchPlan plan_attention_dkv(const AttentionBackward& args) {
  const AttentionTile tile = attention_dkv_tile(args.head_dim);
  const int64_t blocks = ceil_div(args.positions, tile.keys) * args.batch * args.kv_heads;
  const int32_t query_bytes = 2 * args.head_dim * 2 + 8 + (args.doc_start != nullptr ? 4 : 0);
  return {"attention_dkv_kernel", attention_variant(args), {grid_of(blocks), 1, 1}, {kAttentionThreads, 1, 1},
          uint32_t(2 * tile.keys * args.head_dim * 2 + 2 * tile.queries * query_bytes)};
}

// Shared memory: Q and dO; K and V twice.
inline LaunchPlan plan_attention_dq(const AttentionBackward& args) {
  const AttentionTile tile = attention_dq_tile(args.head_dim);
  const int64_t blocks = ceil_div(args.positions, tile.queries) * attention_heads(args);
  return {"attention_dq_kernel", attention_variant(args), {grid_of(blocks), 1, 1}, {kAttentionThreads, 1, 1},
          uint32_t((2 * tile.queries + 4 * tile.keys) * args.head_dim * 2)};
}

// adamw.cu and grad_norm.cu: a block for each chunk

constexpr int32_t kAdamWThreads = 256, kNormThreads = 256, kNormFoldThreads = 1024;
constexpr int32_t kAdamWBlocks = 4;  // on a multiprocessor: 64 registers a thread
constexpr int32_t kNormVectors = 4;  // of 16 bytes: 16 KB a block

inline LaunchPlan plan_adamw(const AdamW& args) {
  return {"adamw_kernel", 0, {grid_of(args.chunks), 1, 1}, {kAdamWThreads, 1, 1}, 0};
}

inline LaunchPlan plan_grad_norm(const GradNorm& args) {
  return {"grad_norm_kernel", 0, {grid_of(args.chunks), 1, 1}, {kNormThreads, 1, 1}, 0};
}

inline LaunchPlan plan_grad_norm_fold(const GradNorm&) {
  return {"grad_norm_fold_kernel", 0, {1, 1, 1}, {kNormFoldThreads, 1, 1}, 0};
}

// decode_attention.cu

// How many of the queries * group query rows of a kv head a block takes.
enum DecodeVariant : int32_t { kDecodeFewRows, kDecodeManyRows };

constexpr int32_t kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * 32;
constexpr int32_t kDecodeKeys = 64;       // keys in a tile
constexpr int32_t kDecodeBlocks = 264;    // that keys are split for: two for each multiprocessor of an H100
constexpr int32_t kDecodeMaxSplits = 128;

constexpr int32_t decode_rows(int32_t variant) { return variant == kDecodeFewRows ? 16 : 64; }

// Tiles of K and V in shared memory: at least 32 KiB are on their way while one is worked on.
constexpr int32_t decode_stages(int32_t head_dim) { return head_dim == 64 ? 3 : 2; }

inline DecodeVariant decode_variant(const DecodeAttention& args) {
  return int64_t(args.queries) * args.group <= decode_rows(kDecodeFewRows) ? kDecodeFewRows : kDecodeManyRows;
}

// Blocks of one split: tiles of query rows of all kv heads.
inline int64_t decode_row_blocks(const DecodeAttention& args) {
  const int64_t rows = int64_t(args.queries) * args.group;
  return ceil_div(rows, decode_rows(decode_variant(args))) * args.batch * args.kv_heads;
}

// As many as fill the device, as long as each has a tile of a row that fills its table.
inline int32_t decode_split_count(const DecodeAttention& args) {
  const int64_t blocks = decode_row_blocks(args);
  const int64_t wanted = blocks < kDecodeBlocks ? kDecodeBlocks / (blocks > 0 ? blocks : 1) : 1;
  const int64_t tiles = ceil_div(int64_t(args.table_pages) * args.page, kDecodeKeys);
  const int64_t most = tiles < kDecodeMaxSplits ? tiles : kDecodeMaxSplits;
  return int32_t(wanted < most ? wanted : most);
}

// Shared memory: Q, and the stages of K and V.
inline LaunchPlan plan_decode_attention(const DecodeAttention& args) {
  const DecodeVariant variant = decode_variant(args);
  const int32_t rows = decode_rows(variant) + 2 * decode_stages(args.head_dim) * kDecodeKeys;
  return {"decode_attention_kernel", variant, {grid_of(decode_row_blocks(args)), uint32_t(args.splits), 1},
          {kDecodeThreads, 1, 1}, uint32_t(rows * args.head_dim * 2)};
}

// Four elements a thread.
inline LaunchPlan plan_decode_merge(const DecodeAttention& args) {
  const int64_t rows = int64_t(args.batch) * args.kv_heads * args.queries * args.group;
  const int64_t blocks = ceil_div(rows * args.head_dim / 4, kDecodeThreads);
  return {"decode_merge_kernel", decode_variant(args), {grid_of(blocks), 1, 1}, {kDecodeThreads, 1, 1}, 0};
}

}  // namespace gptdist::cuda
