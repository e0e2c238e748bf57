// Attention, backward. With the forward's S, L and P, Z = keep / (1 - p) (all ones without dropout):
//
//   delta = sum over D of dout out,  dv = (P Z)^T dout,  dP = (dout v^T) Z,  dS = P (dP - delta)
//   dq = softmax_scale dS k,  dk = softmax_scale dS^T q;  dk and dv are summed over the queries of the kv head's group
// Source: Dao, "FlashAttention-2" (2023), algorithm 2.
//
// Three kernels, without atomics: the same bits in every run and on any GPU.
//
//   statistics   {L log2(e), delta} of each query: reads out and dout, writes 8 bytes a query
//   dkv          a block for a tile of keys walks the queries that see it, of all heads of the group
//   dq           a block for a tile of queries walks the keys that they see
//
// The second and the third both compute P and dP: 7 products where one kernel with atomic additions to an fp32 dq needs 5.
// That is the price of a fixed order of additions, and it saves the fp32 dq, which is written and read again.
//
// Memory: dkv reads k and v once, q, dout and the statistics once for every tile of keys; dq reads q and dout once, k and
// v once for every tile of queries, as the forward; both from the second-level cache. dqkv is written once.
//
// Launch: blocks of 4 warps. dkv: 128 keys and tiles of 64 queries at D = 64, 64 and 64 at D = 128, 32 queries at a time. It
// computes S^T and dP^T, rows are keys: P^T and dS^T are then left operands of dv and dk as they come, in registers. dk and
// dv take 128 registers a thread at either D; the scores of 32 queries are what fits beside them. Q, dout and statistics are
// loaded one tile ahead: 65 and 97 KiB of shared memory.
// dq: 128 queries, shaped like the forward; tiles of 64 keys at D = 64 and 32 at D = 128, because S and dP are held at once.
// K and V are loaded one tile ahead: 64 and 96 KiB.
// 97 KiB are one block on a multiprocessor of an A100 and two on an H100; RTX 50 allows 99 a block.
//
// Accuracy: fp32 but for P and dS, which are rounded to 16 bits as operands; each result is rounded once. delta is of the
// rounded out, so where a query sees a single key dq and dk are rounding errors, not zero.

#include "common/attention.cuh"
#include "common/host.h"
#include "launch.h"

namespace gptdist::cuda {
namespace {

template <int kHeadDim>
constexpr AttentionTile kDkvTile = attention_dkv_tile(kHeadDim);

template <int kHeadDim>
constexpr AttentionTile kDqTile = attention_dq_tile(kHeadDim);

constexpr int kQueriesAtOnce = 32;  // of a tile in the dK, dV kernel: what its scores leave room for in the registers

// Tiles of queries that a block of keys meets: [begin, end), of which [full_begin, full_end) need no mask. Queries and
// keys beyond the sequence need none: the queries are zeros in shared memory and add nothing, the keys' gradients are
// not stored.
struct QueryTiles {
  int32_t begin, full_begin, full_end, end;
};

// How many of the values, which never decrease, are below `limit`, where those before `first` are. For all threads of
// the block: each round divides what is left by their number.
__device__ __forceinline__ int32_t count_below(const int32_t* values, int32_t first, int32_t count, int32_t limit) {
  while (first < count) {
    const int32_t step = (count - first + kAttentionThreads - 1) / kAttentionThreads;
    const int32_t last = first + (int32_t(threadIdx.x) + 1) * step - 1;  // of this thread's values
    first += step * __syncthreads_count(last < count && values[last] < limit);
    count = min(count, first + step - 1);
  }
  return first;
}

template <int kKeys, int kQueries>
__device__ __forceinline__ QueryTiles query_tiles(int32_t key, int32_t positions, bool causal, const int32_t* doc_start) {
  static_assert(kKeys % kQueries == 0, "a block of keys begins where a tile of queries does");
  const int32_t all = (positions + kQueries - 1) / kQueries;
  QueryTiles tiles{0, 0, all, all};
  if (causal) tiles.begin = key / kQueries, tiles.full_begin = (key + kKeys) / kQueries;
  if (doc_start != nullptr) {
    const int32_t seeing_first = count_below(doc_start, key, positions, key + 1);
    const int32_t seeing_any = count_below(doc_start, seeing_first, positions, key + kKeys);
    if (seeing_first < positions) tiles.full_end = seeing_first / kQueries;
    tiles.end = (seeing_any + kQueries - 1) / kQueries;
  }
  return tiles;
}

// What a block of the dK, dV kernel works on.
struct KeyBlock {
  int32_t batch, kv_head, first_key;
};

template <int kHeadDim, int kKeys>
__device__ __forceinline__ KeyBlock key_block(const AttentionBackward& args, uint32_t block) {
  const int32_t tiles = (args.positions + kKeys - 1) / kKeys;
  const int64_t query_bytes = int64_t(args.positions) * args.group * Tile<kHeadDim>::kRowBytes * 2;  // q and dout
  const Work work = work_of(block, tiles, args.batch * args.kv_heads, 1, query_bytes);
  const int32_t batch = work.head / args.kv_heads;
  return {batch, work.head - batch * args.kv_heads, work.rank * kKeys};  // the first keys are seen by the most queries
}

}  // namespace

// statistics[row] = {lse log2(e), delta}: what the other kernels subtract. Eight threads a row.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kStatisticsRows * 8)
attention_statistics_kernel(const __grid_constant__ AttentionBackward args) {
  const int32_t positions = args.positions, heads = args.kv_heads * args.group;
  const int32_t blocks = (positions + kStatisticsRows - 1) / kStatisticsRows;
  const int32_t batch_head = int32_t(blockIdx.x) / blocks, batch = batch_head / heads, head = batch_head - batch * heads;
  const int32_t position = (int32_t(blockIdx.x) - batch_head * blocks) * kStatisticsRows + int32_t(threadIdx.x) / 8;
  const int32_t share = int32_t(threadIdx.x) % 8;
  float delta = 0.0f;
  if (position < positions) {
    const int64_t row = out_offset<kHeadDim>(args, batch, head, position);
    const T *out = static_cast<const T*>(args.out) + row, *dout = static_cast<const T*>(args.dout) + row;
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 64) {
      float a[8], b[8];
      Vector<T, 8>::load(out + column + share * 8).to_floats(a);
      Vector<T, 8>::load(dout + column + share * 8).to_floats(b);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += a[i] * b[i];
    }
  }
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) delta += __shfl_xor_sync(~0u, delta, distance);
  if (share == 0 && position < positions) {
    const int64_t at = int64_t(batch_head) * positions + position;
    reinterpret_cast<float2*>(args.statistics)[at] = make_float2(args.lse[at] * kLog2e, delta);
  }
}

// dk and dv of one tile of keys.
template <class T, int kHeadDim, int kVariant>
__global__ void __launch_bounds__(kAttentionThreads)
attention_dkv_kernel(const __grid_constant__ AttentionBackward args) {
  using Rows = Tile<kHeadDim>;
  constexpr int kQueries = kDkvTile<kHeadDim>.queries, kKeys = kDkvTile<kHeadDim>.keys;
  constexpr int kM = kKeys / (16 * kAttentionWarps), kN = kQueriesAtOnce / 8;
  constexpr int kQueryTileBytes = kQueries * Rows::kRowBytes;
  const int32_t positions = args.positions;
  const bool documents = kVariant != kAttentionPlain && args.doc_start != nullptr;

  const auto [batch, kv_head, first_key] = key_block<kHeadDim, kKeys>(args, blockIdx.x);
  const int32_t* doc_start = documents ? args.doc_start + int64_t(batch) * positions : nullptr;
  const QueryTiles tiles = query_tiles<kKeys, kQueries>(first_key, positions, args.causal, doc_start);

  const uint32_t k_tile = shared_base(), v_tile = k_tile + kKeys * Rows::kRowBytes;
  const uint32_t q_tiles = v_tile + kKeys * Rows::kRowBytes, o_tiles = q_tiles + 2 * kQueryTileBytes;  // o: dout
  const uint32_t statistics_tiles = o_tiles + 2 * kQueryTileBytes, doc_tiles = statistics_tiles + 2 * kQueries * 8;
  const Mover<kHeadDim, kAttentionThreads> mover(threadIdx.x);
  const int32_t stride = args.qkv_stride, out_stride = args.out_stride;
  const T* k_from = static_cast<const T*>(args.qkv) + key_offset<kHeadDim>(args, batch, kv_head, first_key);
  mover.template load<kKeys, true>(k_tile, mover.first(k_from, stride), stride, positions - first_key);
  mover.template load<kKeys, true>(v_tile, mover.first(k_from + kHeadDim, stride), stride, positions - first_key);

  // Addresses are made anew for each tile: pointers that lived through the products would be spilled.
  const auto fetch = [&](int32_t head, int32_t tile, uint32_t buffer) {  // head: within the group
    const int32_t query = tile * kQueries, left = positions - query;
    const int64_t row = int64_t(batch) * positions + query + mover.row, heads = args.kv_heads * args.group;
    const int32_t head_column = (kv_head * args.group + head) * kHeadDim + mover.column;
    const T* q_from = static_cast<const T*>(args.qkv) + row * stride + head_column + 2 * kv_head * kHeadDim;
    const T* o_from = static_cast<const T*>(args.dout) + row * out_stride + head_column;
    const uint32_t q_tile = q_tiles + buffer * kQueryTileBytes, o_tile = o_tiles + buffer * kQueryTileBytes;
    mover.template load<kQueries, true>(q_tile, q_from, stride, left);
    mover.template load<kQueries, true>(o_tile, o_from, out_stride, left);
    const int32_t i = int32_t(threadIdx.x) % kQueries;
    if (threadIdx.x < kQueries) {
      const int64_t batch_head = batch * heads + kv_head * args.group + head;
      const float2* from = reinterpret_cast<const float2*>(args.statistics) + batch_head * positions;
      copy_async_small<8>(statistics_tiles + (buffer * kQueries + i) * 8, from + query + i, i < left);
    } else if (documents) {
      copy_async_small<4>(doc_tiles + (buffer * kQueries + i) * 4, doc_start + query + i, i < left);
    }
  };
  fetch(0, tiles.begin, 0);
  commit_copies();

  const Lane lane = lane_of(threadIdx.x);
  const int32_t warp_row = int32_t(threadIdx.x) / kWarpSize * 16 * kM, key = first_key + warp_row + lane.g;
  const uint32_t k_place = k_tile + warp_row * Rows::kRowBytes + Rows::place_a(lane.lane);
  const uint32_t v_place = k_place + kKeys * Rows::kRowBytes;
  const uint32_t rows_place = Rows::place_b(lane.lane), columns_place = Rows::place_a(lane.lane);
  const float scale_log2 = args.softmax_scale * kLog2e;

  float dk[kM][kHeadDim / 8][4], dv[kM][kHeadDim / 8][4];
  clear(dk);
  clear(dv);

  // kQueriesAtOnce queries from `query` on, at the addresses q, o, stat and doc of shared memory.
  const auto step = [&](auto masked, const Keep& keep, int32_t query, uint32_t q, uint32_t o, uint32_t stat,
                        uint32_t doc) {
    constexpr bool kMasked = decltype(masked)::value;
    [[maybe_unused]] uint32_t kept = 0;
    if constexpr (kVariant == kAttentionDropout) kept = keep.by_key<kM, kN>(key, query + lane.t2, lane);
    float s[kM][kN][4], dp[kM][kN][4];  // transposed: rows are keys, columns are queries
    multiply_tiles<T, kHeadDim>(s, k_place, q + rows_place);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float4 two = load_shared_float4(stat + (8 * j + lane.t2) * 8);  // {lse, delta} of columns t2, t2 + 1
      const int2 starts = kMasked && documents ? load_shared_int2(doc + (8 * j + lane.t2) * 4) : make_int2(0, 0);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_approx(s[i][j][e] * scale_log2 - (e & 1 ? two.z : two.x));
          const int32_t row = key + 16 * i + 8 * (e >> 1), column = query + 8 * j + lane.t2 + (e & 1);
          bool hidden = kMasked && row > column;
          if constexpr (kVariant != kAttentionPlain) hidden |= kMasked && documents && row < (e & 1 ? starts.y : starts.x);
          s[i][j][e] = hidden ? 0.0f : p;
        }
      }
    }
    multiply_by_tile<T, kHeadDim, kQueriesAtOnce / 16>(dv, o + columns_place, [&](uint32_t (&a)[4], int i, int k) {
      fragment_of<T>(a, s[i][2 * k], s[i][2 * k + 1]);
      if constexpr (kVariant == kAttentionDropout) keep_fragment(a, kept, i * kN + 2 * k);
    });
    multiply_tiles<T, kHeadDim>(dp, v_place, o + rows_place);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float4 two = load_shared_float4(stat + (8 * j + lane.t2) * 8);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float gradient = dp[i][j][e];
          if constexpr (kVariant == kAttentionDropout) {
            gradient = is_kept(kept, i * kN + j, e) ? gradient * args.dropout.scale : 0.0f;
          }
          s[i][j][e] *= gradient - (e & 1 ? two.w : two.y);
        }
      }
    }
    multiply_by_tile<T, kHeadDim, kQueriesAtOnce / 16>(dk, q + columns_place, [&](uint32_t (&a)[4], int i, int k) {
      fragment_of<T>(a, s[i][2 * k], s[i][2 * k + 1]);
    });
  };

  uint32_t buffer = 0;
  for (int32_t head = 0, m = tiles.begin;;) {
    int32_t next_head = head, next = m + 1;
    if (next >= tiles.end) next = tiles.begin, ++next_head;  // beyond the end only if doc_start is wrong
    await_copies();
    __syncthreads();  // the tile is there, the one before is done with
    if (next_head < args.group) fetch(next_head, next, buffer ^ 1);
    commit_copies();
    const uint32_t q = q_tiles + buffer * kQueryTileBytes, o = o_tiles + buffer * kQueryTileBytes;
    const uint32_t stat = statistics_tiles + buffer * kQueries * 8, doc = doc_tiles + buffer * kQueries * 4;
    Keep keep{};
    if constexpr (kVariant == kAttentionDropout) keep = keep_of(args, batch, kv_head * args.group + head);
    const auto steps = [&](auto masked) {
#pragma unroll 1
      for (int c = 0; c < kQueries; c += kQueriesAtOnce) {
        step(masked, keep, m * kQueries + c, q + c * Rows::kRowBytes, o + c * Rows::kRowBytes, stat + c * 8, doc + c * 4);
      }
    };
    if (m < tiles.full_begin || m >= tiles.full_end) steps(std::true_type{});
    else steps(std::false_type{});
    if (next_head == args.group) break;
    head = next_head, m = next, buffer ^= 1;
  }

  const KeyBlock done = key_block<kHeadDim, kKeys>(args, reread_block());
  const uint32_t thread = reread_thread(), first_row = thread / kWarpSize * 16 * kM * Rows::kRowBytes;
  stage<T, kHeadDim>(k_tile + first_row, lane_of(thread), dk, [&](int, int) { return args.softmax_scale; });
  stage<T, kHeadDim>(v_tile + first_row, lane_of(thread), dv, [&](int, int) {
    return kVariant == kAttentionDropout ? args.dropout.scale : 1.0f;
  });
  __syncthreads();
  T* dk_rows = static_cast<T*>(args.dqkv) + key_offset<kHeadDim>(args, done.batch, done.kv_head, done.first_key);
  const Mover<kHeadDim, kAttentionThreads> last_mover(thread);
  last_mover.template store<kKeys>(dk_rows, args.qkv_stride, positions - done.first_key, k_tile);
  last_mover.template store<kKeys>(dk_rows + kHeadDim, args.qkv_stride, positions - done.first_key, v_tile);
}

// dq of one tile of queries. Shaped like the forward.
template <class T, int kHeadDim, int kVariant>
__global__ void __launch_bounds__(kAttentionThreads)
attention_dq_kernel(const __grid_constant__ AttentionBackward args) {
  using Rows = Tile<kHeadDim>;
  constexpr int kQueries = kDqTile<kHeadDim>.queries, kKeys = kDqTile<kHeadDim>.keys;
  constexpr int kM = kQueries / (16 * kAttentionWarps), kN = kKeys / 8;
  constexpr int kKeyTileBytes = kKeys * Rows::kRowBytes;
  const int32_t positions = args.positions;
  const bool documents = kVariant != kAttentionPlain && args.doc_start != nullptr;
  const auto [batch, head, kv_head, first_query, batch_head] = query_block<kHeadDim, kQueries>(args, blockIdx.x);
  const int32_t left = positions - first_query;
  const int32_t* doc_start = documents ? args.doc_start + int64_t(batch) * positions : nullptr;
  const KeyTiles tiles = key_tiles(first_query, kQueries, kKeys, positions, args.causal, doc_start);
  int32_t n = tiles.end - 1;  // the tile at hand; downwards, so that the first one alone can be ragged

  const uint32_t q_tile = shared_base(), o_tile = q_tile + kQueries * Rows::kRowBytes;
  const uint32_t k_tiles = o_tile + kQueries * Rows::kRowBytes, v_tiles = k_tiles + 2 * kKeyTileBytes;
  const Mover<kHeadDim, kAttentionThreads> mover(threadIdx.x);
  const int32_t stride = args.qkv_stride, out_stride = args.out_stride;
  const T* q_from = static_cast<const T*>(args.qkv) + query_offset<kHeadDim>(args, batch, head, kv_head, first_query);
  const T* o_from = static_cast<const T*>(args.dout) + out_offset<kHeadDim>(args, batch, head, first_query);
  const T* kv_from = static_cast<const T*>(args.qkv) + key_offset<kHeadDim>(args, batch, kv_head, n * kKeys);
  const T* k_from = mover.first(kv_from, stride);
  const T* v_from = k_from + kHeadDim;
  mover.template load<kQueries, true>(q_tile, mover.first(q_from, stride), stride, left);
  mover.template load<kQueries, true>(o_tile, mover.first(o_from, out_stride), out_stride, left);
  mover.template load<kKeys, true>(k_tiles, k_from, stride, positions - n * kKeys);
  mover.template load<kKeys, true>(v_tiles, v_from, stride, positions - n * kKeys);
  commit_copies();

  const Lane lane = lane_of(threadIdx.x);
  const int32_t warp_row = int32_t(threadIdx.x) / kWarpSize * 16 * kM, query = first_query + warp_row + lane.g;
  const uint32_t q_place = q_tile + warp_row * Rows::kRowBytes + Rows::place_a(lane.lane);
  const uint32_t o_place = q_place + kQueries * Rows::kRowBytes;
  const uint32_t rows_place = Rows::place_b(lane.lane), columns_place = Rows::place_a(lane.lane);
  const float scale_log2 = args.softmax_scale * kLog2e;
  const int32_t horizon = args.causal ? 0 : positions - 1;  // every query sees the keys up to here
  Keep keep;
  if constexpr (kVariant == kAttentionDropout) keep = keep_of(args, batch, head);

  float lse[kM][2], delta[kM][2], dq[kM][kHeadDim / 8][4];
  clear(dq);
  const float2* statistics = reinterpret_cast<const float2*>(args.statistics) + batch_head * positions;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = query + 16 * i + 8 * half;
      const float2 two = row < positions ? statistics[row] : make_float2(INFINITY, 0.0f);  // P = 0 beyond the sequence
      lse[i][half] = two.x;
      delta[i][half] = two.y;
    }
  }

  uint32_t buffer = 0;  // or kKeyTileBytes
  const auto step = [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    await_copies();
    __syncthreads();  // the tile is there, the one before is done with
    if (n > tiles.begin) {
      k_from -= int64_t(kKeys) * stride, v_from -= int64_t(kKeys) * stride;
      mover.template load<kKeys, false>(k_tiles + (buffer ^ kKeyTileBytes), k_from, stride, kKeys);
      mover.template load<kKeys, false>(v_tiles + (buffer ^ kKeyTileBytes), v_from, stride, kKeys);
    }
    commit_copies();
    const uint32_t k_tile = k_tiles + buffer, v_tile = v_tiles + buffer;
    [[maybe_unused]] uint32_t kept[kM];
    if constexpr (kVariant == kAttentionDropout) {
#pragma unroll
      for (int i = 0; i < kM; ++i) kept[i] = keep.by_query<kN>(query + 16 * i, n * kKeys + lane.t2);
    }
    float s[kM][kN][4], dp[kM][kN][4];
    multiply_tiles<T, kHeadDim>(s, q_place, k_tile + rows_place);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = query + 16 * i + 8 * half, column = n * kKeys + lane.t2;
        const int32_t last = max(row, horizon) - column;
        const int32_t first = kMasked && documents ? doc_start[min(row, positions - 1)] - column : 0;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float p = exp2_approx(s[i][j][2 * half + e] * scale_log2 - lse[i][half]);
            bool hidden = kMasked && 8 * j + e > last;
            if constexpr (kVariant != kAttentionPlain) hidden |= kMasked && documents && 8 * j + e < first;
            s[i][j][2 * half + e] = hidden ? 0.0f : p;
          }
        }
      }
    }
    multiply_tiles<T, kHeadDim>(dp, o_place, v_tile + rows_place);
    multiply_by_tile<T, kHeadDim, kKeys / 16>(dq, k_tile + columns_place, [&](uint32_t (&a)[4], int i, int k) {
      float ds[2][4];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int j = 2 * k + e / 4;
        float gradient = dp[i][j][e % 4];
        if constexpr (kVariant == kAttentionDropout) {
          gradient = is_kept(kept[i], j, e % 4) ? gradient * args.dropout.scale : 0.0f;
        }
        ds[e / 4][e % 4] = s[i][j][e % 4] * (gradient - delta[i][e % 4 / 2]);
      }
      fragment_of<T>(a, ds[0], ds[1]);
    });
    buffer ^= kKeyTileBytes;
  };
  if constexpr (kVariant == kAttentionPlain) {
#pragma unroll 1
    for (; n >= tiles.full_end; --n) step(std::true_type{});
#pragma unroll 1
    for (; n >= 0; --n) step(std::false_type{});
  } else {
    while (n >= tiles.begin) {
      for (; n < tiles.full_end && n >= tiles.full_begin; --n) step(std::false_type{});
      if (n >= tiles.begin) step(std::true_type{}), --n;
    }
  }

  const QueryBlock done = query_block<kHeadDim, kQueries>(args, reread_block());
  const uint32_t thread = reread_thread();
  stage<T, kHeadDim>(q_tile + thread / kWarpSize * 16 * kM * Rows::kRowBytes, lane_of(thread), dq,
                     [&](int, int) { return args.softmax_scale; });
  __syncthreads();
  const int64_t dq_offset = query_offset<kHeadDim>(args, done.batch, done.head, done.kv_head, done.first_query);
  const Mover<kHeadDim, kAttentionThreads> last_mover(thread);
  last_mover.template store<kQueries>(static_cast<T*>(args.dqkv) + dq_offset, args.qkv_stride,
                                      positions - done.first_query, q_tile);
}

// Launchers.

namespace {

template <class T, int kHeadDim, int kVariant>
Error launch_gradients(const AttentionBackward& args, Stream stream) {
  const Error failed = launch(attention_dkv_kernel<T, kHeadDim, kVariant>, plan_attention_dkv(args), args, stream);
  if (failed) return failed;
  return launch(attention_dq_kernel<T, kHeadDim, kVariant>, plan_attention_dq(args), args, stream);
}

template <class T, int kHeadDim>
Error launch_backward(const AttentionBackward& args, Stream stream) {
  const Error failed = launch(attention_statistics_kernel<T, kHeadDim>, plan_attention_statistics(args), args, stream);
  if (failed) return failed;
  switch (attention_variant(args)) {
    case kAttentionPlain: return launch_gradients<T, kHeadDim, kAttentionPlain>(args, stream);
    case kAttentionDocuments: return launch_gradients<T, kHeadDim, kAttentionDocuments>(args, stream);
    default: return launch_gradients<T, kHeadDim, kAttentionDropout>(args, stream);
  }
}

}  // namespace

Error attention_backward(const AttentionBackward& args, Stream stream) {
  if (const Error wrong = attention_error(args)) return wrong;
  if (args.batch == 0 || args.positions == 0 || args.kv_heads == 0) return nullptr;
  if (plan_attention_statistics(args).grid[0] == 0) {  // the largest of the grids
    return too_many_blocks(args);
  }
  const bool wide = args.head_dim == 128;
  if (args.dtype == Dtype::kBf16) return (wide ? launch_backward<Bf16, 128> : launch_backward<Bf16, 64>)(args, stream);
  return (wide ? launch_backward<Fp16, 128> : launch_backward<Fp16, 64>)(args, stream);
}

}  // namespace gptdist::cuda
