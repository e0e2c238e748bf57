// Attention of new queries over keys and values in pages, for generation. Query t of row b stands at position n =
// lengths[b] + t. For query head g of kv head h, and the cached positions s <= n:
//
//   S = softmax_scale q k^T,  P = exp(S - logsumexp_s S),  out = P v
//
// Position s lies in page block_table[b, s / page], slot s % page. Sources: Kwon et al., "PagedAttention" (2023); Dao
// et al., "Flash-Decoding" (2023); Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
//
// Memory: with up to 16 query rows (query heads of the group times queries) reads q, and each key and value in use
// once; with more, once for every 64 of them. Writes out once. Where the keys are split, writes and reads 4 (D + 2)
// bytes for every query row and split besides.
//
// Launch: a block of 4 warps for the query rows of one kv head, packed into the rows of the tensor cores' operands so
// that a key read once serves the whole group. A single row fills a sixteenth of them: these products cost nothing
// beside the bytes they wait for.
//   up to 16 rows: the warps divide each tile of 64 keys among them, and add up what they found at the end;
//   more: tiles of 64 rows, 16 a warp, and every warp sees all keys. Tiles with the most keys go first.
// K and V pass by in tiles of 64 positions, the last of which are still on their way while one is worked on (3 stages
// at D = 64, 2 at D = 128: a block has 32 KiB in flight, more than the 18 KB that a multiprocessor must have). The pages
// of a tile are looked up while the tile before it is being copied. Shared memory: Q and the stages, 50 to 80 KiB.
//
// The second grid dimension divides a row's keys: a block takes its share of the tiles that lengths[b] needs, read on
// the device, and is done at once where there are more splits than tiles. A second kernel merges the parts in
// ascending order. The number of splits follows from shapes alone, so launches are the same for any lengths (CUDA
// graphs), and there are no atomics: the same bits in every run.
//
// Nothing beyond a row's last key is read, nor beyond the table, whatever lengths and block_table hold: a query that
// stands beyond the table sees no key, and 0 / 0 makes it NaN.
//
// Accuracy: fp32 but for P, which is rounded to the operands' 16 bits; each result is rounded once. With
// u = 2^-8 (bf16) or 2^-11 (fp16) and A = softmax_scale max_s sum |q k|,
//   |out - exact| <= (2 u + 2^-19 (4 + A)) sum_s P |v|.

#include "common/attention.cuh"
#include "common/host.h"
#include "launch.h"

namespace gptdist::cuda {
namespace {

template <int kHeadDim>
constexpr int kStages = decode_stages(kHeadDim);

// The keys that a tile of query rows meets. All fit in 31 bits, a tile of keys beyond them too.
struct Keys {
  int32_t before;         // position of query 0; from the table's capacity on, no query of the row exists
  int32_t end, common;    // some query of the tile sees the keys before `end`, all see those before `common`
  int32_t tiles, share;   // tiles of keys, and how many of them a split takes
};

template <int kRows>
__device__ __forceinline__ Keys keys_of(const DecodeAttention& args, int32_t batch, int32_t first_row) {
  const int32_t rows = args.queries * args.group, capacity = args.table_pages * args.page;
  const int64_t length = args.lengths[batch];
  Keys keys;
  keys.before = length < 0 || length > capacity ? capacity : int32_t(length);
  const int32_t first = keys.before + first_row / args.group;
  const int32_t last = keys.before + (first_row + min(kRows, rows - first_row) - 1) / args.group;
  keys.end = min(last + 1, capacity);
  keys.common = last < capacity ? first + 1 : 0;
  keys.tiles = (keys.end + kDecodeKeys - 1) / kDecodeKeys;
  keys.share = (keys.tiles + args.splits - 1) / args.splits;
  return keys;
}

__device__ __forceinline__ int32_t log2_of(int32_t power_of_two) { return __ffs(power_of_two) - 1; }

// A thread's part in moving tiles of keys and values to shared memory.
template <class T, int kHeadDim>
struct PagedTiles {
  using Part = Mover<kHeadDim, kDecodeThreads>;
  static constexpr int kLoads = kDecodeKeys / Part::kRowsAtOnce, kBytes = kDecodeKeys * Tile<kHeadDim>::kRowBytes;
  Part part;
  const T *k, *v;
  const int32_t* table;
  int32_t page_shift, last_entry, last_page, stride, end;
  int32_t pages[kLoads];  // of the tile that is copied next

  __device__ __forceinline__ PagedTiles(const DecodeAttention& args, int32_t batch, int32_t kv_head, int32_t key_end)
      : part(threadIdx.x), table(args.block_table + int64_t(batch) * args.table_pages), page_shift(log2_of(args.page)),
        last_entry(args.table_pages - 1), last_page(args.pages - 1), stride(args.kv_heads * kHeadDim), end(key_end) {
    k = static_cast<const T*>(args.k_cache) + kv_head * kHeadDim + part.column;
    v = static_cast<const T*>(args.v_cache) + kv_head * kHeadDim + part.column;
  }

  __device__ __forceinline__ void look_up(int32_t tile) {
    const int32_t position = tile * kDecodeKeys + part.row;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      pages[i] = table[min((position + i * Part::kRowsAtOnce) >> page_shift, last_entry)];
    }
  }

  // The tile that was looked up, to the stage at `to`: K, then V. Those from `end` on are not read; they become zeros.
  __device__ __forceinline__ void load(uint32_t to, int32_t tile) const {
    const int32_t position = tile * kDecodeKeys + part.row, left = end - position, slots = (1 << page_shift) - 1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t page = max(min(pages[i], last_page), 0);
      const int32_t slot = (page << page_shift) + ((position + i * Part::kRowsAtOnce) & slots);
      const int64_t offset = int64_t(slot) * stride;
      const uint32_t place = to + part.place + i * Part::kRowsAtOnce * Tile<kHeadDim>::kRowBytes;
      const bool inside = i * Part::kRowsAtOnce < left;
      copy_async_16(place, k + offset, inside);
      copy_async_16(place + kBytes, v + offset, inside);
    }
  }
};

// kRows query rows of a kv head, from row_of(first_row) on, to a tile; rows that do not exist become zeros.
template <class T, int kHeadDim, int kRows>
__device__ __forceinline__ void load_queries(const DecodeAttention& args, uint32_t to, int32_t batch, int32_t kv_head,
                                             int32_t first_row, int32_t rows_left) {
  using Part = Mover<kHeadDim, kDecodeThreads>;
  const Part part(threadIdx.x);
  const T* q = static_cast<const T*>(args.q) + batch * args.q_strides[0] + kv_head * args.q_strides[2] + part.column;
#pragma unroll
  for (int i = 0; i < kRows / Part::kRowsAtOnce; ++i) {
    const int32_t row = part.row + i * Part::kRowsAtOnce, query = (first_row + row) / args.group;
    const int32_t head = first_row + row - query * args.group;
    const T* from = q + query * args.q_strides[1] + head * args.q_strides[3];
    copy_async_16(to + part.place + i * Part::kRowsAtOnce * Tile<kHeadDim>::kRowBytes, from, row < rows_left);
  }
}

// What is known of a query row after some of its keys: the largest score times log2(e), the sum of exponentials and of
// values beneath it; of the values, four neighbouring elements.
struct Merged {
  float maximum, sum, out[4];
};

// `count` parts in ascending order. state(p): their {maximum, sum}; out(p): their float4.
template <class State, class Out>
__device__ __forceinline__ Merged merge(int32_t count, const State& state, const Out& out) {
  Merged merged{-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
  for (int32_t p = 0; p < count; ++p) merged.maximum = fmaxf(merged.maximum, state(p).x);
  const float subtrahend = merged.maximum == -INFINITY ? 0.0f : merged.maximum;
#pragma unroll 4
  for (int32_t p = 0; p < count; ++p) {
    const float2 part = state(p);
    const float4 values = out(p);
    const float weight = exp2_approx(part.x - subtrahend);
    merged.sum += weight * part.y;
    merged.out[0] += weight * values.x, merged.out[1] += weight * values.y;
    merged.out[2] += weight * values.z, merged.out[3] += weight * values.w;
  }
  return merged;
}

// Row `row` of a kv head, elements from `column` on, to out.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_row(const DecodeAttention& args, int32_t batch, int32_t kv_head, int32_t row,
                                          int32_t column, const Merged& merged) {
  const int32_t query = row / args.group, head = row - query * args.group;
  const int64_t place = ((int64_t(batch) * args.queries + query) * args.kv_heads + kv_head) * args.group + head;
  const float factor = reciprocal_approx(merged.sum);
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = merged.out[i] * factor;
  Vector<T, 4>::from_floats(values).store(static_cast<T*>(args.out) + place * kHeadDim + column);
}

}  // namespace

template <class T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kDecodeThreads)
decode_attention_kernel(const __grid_constant__ DecodeAttention args) {
  using Rows = Tile<kHeadDim>;
  using Loader = PagedTiles<T, kHeadDim>;
  constexpr int kKeyWarps = kDecodeWarps * 16 / kRows, kWarpKeys = kDecodeKeys / kKeyWarps;
  constexpr int kAhead = kStages<kHeadDim> - 1, kStageBytes = 2 * Loader::kBytes;
  const int32_t rows = args.queries * args.group, row_tiles = (rows + kRows - 1) / kRows;
  const int64_t kv_bytes = int64_t(args.table_pages) * args.page * Rows::kRowBytes * 2;
  const Work work = work_of(blockIdx.x, row_tiles, args.batch * args.kv_heads, 1, kv_bytes);
  const int32_t batch = work.head / args.kv_heads, kv_head = work.head - batch * args.kv_heads;
  const int32_t first_row = (row_tiles - 1 - work.rank) * kRows, rows_left = min(kRows, rows - first_row);
  const Keys keys = keys_of<kRows>(args, batch, first_row);
  const int32_t first_tile = blockIdx.y * keys.share, end_tile = min(first_tile + keys.share, keys.tiles);
  if (first_tile >= end_tile) return;

  const uint32_t q_tile = shared_base(), stages = q_tile + kRows * Rows::kRowBytes;
  load_queries<T, kHeadDim, kRows>(args, q_tile, batch, kv_head, first_row, rows_left);
  Loader loader(args, batch, kv_head, keys.end);
  loader.look_up(first_tile);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first_tile + i < end_tile) {
      loader.load(stages + i * kStageBytes, first_tile + i);
      loader.look_up(first_tile + i + 1);
    }
    commit_copies();
  }

  const Lane lane = lane_of(threadIdx.x);
  const int32_t warp = int32_t(threadIdx.x) / kWarpSize, warp_row = warp / kKeyWarps * 16;
  const int32_t warp_key = warp % kKeyWarps * kWarpKeys;
  const uint32_t q_place = q_tile + warp_row * Rows::kRowBytes + Rows::place_a(lane.lane);
  const uint32_t k_place = stages + warp_key * Rows::kRowBytes + Rows::place_b(lane.lane);
  const uint32_t v_place = stages + Loader::kBytes + warp_key * Rows::kRowBytes + Rows::place_a(lane.lane);
  const float scale_log2 = args.softmax_scale * kLog2e;
  const int32_t capacity = args.table_pages * args.page;
  int32_t last[2];  // that rows g and g + 8 see
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t position = keys.before + (first_row + warp_row + lane.g + 8 * half) / args.group;
    last[half] = position < capacity ? position : -1;
  }

  float out[1][kHeadDim / 8][4];
  clear(out);
  RowState<1> state{{{-INFINITY, -INFINITY}}, {{0.0f, 0.0f}}};
  const auto hide = [&](float (&s)[1][kWarpKeys / 8][4], int32_t key) {
#pragma unroll
    for (int j = 0; j < kWarpKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][j][e] = 8 * j + e % 2 > last[e / 2] - key ? -INFINITY : s[0][j][e];
    }
  };

  uint32_t stage = 0, free_stage = kAhead * kStageBytes;  // bytes from `stages`
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    await_copies<kAhead - 1>();
    __syncthreads();  // the tile is there, the one before it is done with
    const int32_t ahead = tile + kAhead;
    if (ahead < end_tile) {
      loader.load(stages + free_stage, ahead);
      loader.look_up(ahead + 1);
    }
    commit_copies();
    if (warp_row < rows_left) {
      float s[1][kWarpKeys / 8][4];
      multiply_tiles<T, kHeadDim>(s, q_place, k_place + stage);
      if ((tile + 1) * kDecodeKeys > keys.common) hide(s, tile * kDecodeKeys + warp_key + lane.t2);
      online_softmax<true>(s, out, state, scale_log2);
      multiply_by_tile<T, kHeadDim, kWarpKeys / 16>(out, v_place + stage, [&](uint32_t (&a)[4], int i, int k) {
        fragment_of<T>(a, s[i][2 * k], s[i][2 * k + 1]);
      });
    }
    free_stage = stage;
    stage = stage == kAhead * kStageBytes ? 0 : stage + kStageBytes;
  }

  // What the warps found, in place of the stages: fp32 rows, 32 bytes apart so that four of them fill all banks, and
  // then the rows' states.
  constexpr int kPartBytes = kHeadDim * 4 + 32, kParts = kKeyWarps * kRows;
  static_assert(kParts * (kPartBytes + 8) <= (kAhead + 1) * kStageBytes, "the parts fit in the stages");
  const uint32_t states = stages + kParts * kPartBytes;
  __syncthreads();  // the stages are done with
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[0][half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int32_t part = warp % kKeyWarps * kRows + warp_row + lane.g + 8 * half;
    if (lane.t2 == 0) store_shared_float2(states + part * 8, state.maximum[0][half] * scale_log2, sum);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const uint32_t place = stages + part * kPartBytes + (8 * j + lane.t2) * 4;
      store_shared_float2(place, out[0][j][2 * half], out[0][j][2 * half + 1]);
    }
  }
  __syncthreads();
  constexpr int kChunks = kHeadDim / 4;
  for (int32_t i = threadIdx.x; i < rows_left * kChunks; i += kDecodeThreads) {
    const int32_t row = i / kChunks, column = i % kChunks * 4;
    const Merged merged = merge(
        kKeyWarps, [&](int32_t p) { return load_shared_float2(states + (p * kRows + row) * 8); },
        [&](int32_t p) { return load_shared_float4(stages + (p * kRows + row) * kPartBytes + column * 4); });
    if (args.splits == 1) {
      store_row<T, kHeadDim>(args, batch, kv_head, first_row + row, column, merged);
    } else {
      const int64_t heads = int64_t(blockIdx.y) * args.batch * args.kv_heads + work.head;
      const int64_t place = heads * rows + first_row + row;
      Vector<float, 4>::from_floats(merged.out).store(args.partial_out + place * kHeadDim + column);
      if (column == 0) reinterpret_cast<float2*>(args.partial_state)[place] = make_float2(merged.maximum, merged.sum);
    }
  }
}

template <class T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kDecodeThreads) decode_merge_kernel(const __grid_constant__ DecodeAttention args) {
  constexpr int kChunks = kHeadDim / 4, kRowsAtOnce = kDecodeThreads / kChunks;
  const int32_t rows = args.queries * args.group, column = int32_t(threadIdx.x) % kChunks * 4;
  const int64_t all_rows = int64_t(args.batch) * args.kv_heads * rows;
  const int64_t place = int64_t(blockIdx.x) * kRowsAtOnce + int32_t(threadIdx.x) / kChunks;
  if (place >= all_rows) return;
  const int32_t head = int32_t(place / rows), row = int32_t(place - int64_t(head) * rows);
  const int32_t batch = head / args.kv_heads, kv_head = head - batch * args.kv_heads;
  const Keys keys = keys_of<kRows>(args, batch, row / kRows * kRows);
  const float2* states = reinterpret_cast<const float2*>(args.partial_state) + place;
  const float* outs = args.partial_out + place * kHeadDim + column;
  const Merged merged = merge(
      (keys.tiles + keys.share - 1) / keys.share, [&](int32_t p) { return states[p * all_rows]; },
      [&](int32_t p) { return *reinterpret_cast<const float4*>(outs + p * all_rows * kHeadDim); });
  store_row<T, kHeadDim>(args, batch, kv_head, row, column, merged);
}

// Launchers.

namespace {

template <class T, int kHeadDim, int kRows>
Error launch_decode(const DecodeAttention& args, Stream stream) {
  const Error failed = launch(decode_attention_kernel<T, kHeadDim, kRows>, plan_decode_attention(args), args, stream);
  if (failed != nullptr || args.splits == 1) return failed;
  return launch(decode_merge_kernel<T, kHeadDim, kRows>, plan_decode_merge(args), args, stream);
}

template <class T, int kHeadDim>
Error launch_decode(const DecodeAttention& args, Stream stream) {
  return decode_variant(args) == kDecodeFewRows
             ? launch_decode<T, kHeadDim, decode_rows(kDecodeFewRows)>(args, stream)
             : launch_decode<T, kHeadDim, decode_rows(kDecodeManyRows)>(args, stream);
}

}  // namespace

int32_t decode_attention_splits(const DecodeAttention& args) { return decode_split_count(args); }

Error decode_attention(const DecodeAttention& args, Stream stream) {
  if (args.dtype != Dtype::kBf16 && args.dtype != Dtype::kFp16) {
    return error("decode_attention: q is %s, expected bf16 or fp16", name_of(args.dtype));
  }
  if (args.head_dim != 64 && args.head_dim != 128) {
    return error("decode_attention: head_dim is %d, expected 64 or 128", args.head_dim);
  }
  if (args.page < 1 || (args.page & (args.page - 1)) != 0) {
    return error("decode_attention: page is %d, expected a power of two", args.page);
  }
  if (args.batch == 0 || args.queries == 0 || args.kv_heads == 0) return nullptr;
  if (plan_decode_attention(args).grid[0] == 0 || plan_decode_merge(args).grid[0] == 0) {
    return error("decode_attention: %d x %d heads of %d x %d query rows, more than a grid holds", args.batch,
                 args.kv_heads, args.queries, args.group);
  }
  const bool wide = args.head_dim == 128;
  if (args.dtype == Dtype::kBf16) return (wide ? launch_decode<Bf16, 128> : launch_decode<Bf16, 64>)(args, stream);
  return (wide ? launch_decode<Fp16, 128> : launch_decode<Fp16, 64>)(args, stream);
}

}  // namespace gptdist::cuda
