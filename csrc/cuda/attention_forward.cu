// Attention, forward. For query head g of kv head h, query t, and the keys s that it sees:
//
//   S = softmax_scale q k^T,  L = log sum_s exp(S),  P = exp(S - L),  out = (P keep / (1 - p)) v
//
// causal: s <= t, and with documents doc_start[t] <= s; otherwise all keys. keep: dropout's mask (gptdist/ops/random.py).
// Sources: Dao, "FlashAttention-2" (2023); Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
//
// Memory: reads q once and k, v once for every block of 128 queries that sees them (from the second-level cache: the blocks
// of a head run together), writes out once and 4 bytes a query of lse. S and P are never stored.
//
// Launch: a block of 4 warps for 128 queries of one head, 32 queries a warp, so that a fragment of K or V read from shared
// memory serves two products. Keys pass by in tiles: 128 at D = 64 and 64 at D = 128, the most whose scores (128 and 64
// registers a thread) fit beside the output (64 and 128). Shared memory: Q, K and V, 48 and 64 KiB: two blocks on a
// multiprocessor of an A100 or H100, as the registers allow. One copy of K and of V is enough: V arrives while Q K^T is
// computed, the next K during the softmax and P V.
//
// Tiles are taken from the diagonal down. Those that hide something, at the diagonal and where documents begin, have a
// loop of their own: the others compare nothing. Only the first tile can be ragged, so the loads of the others check
// nothing either. Tiles that no query of the block sees are skipped.
//
// The maxima are of unscaled scores: p = 2^(s c - m c) with c = softmax_scale log2(e) is one FFMA and one ex2. Row sums stay
// per thread until the end. P goes from accumulators to operands in registers; out leaves through the shared memory of Q
// as 16-byte stores.
//
// Accuracy: fp32 but for P, which is rounded to the operands' 16 bits; each result is rounded once.
// Registers: 255 of 255, a few bytes spilled outside of the loop. csrc/README.md has the instruction counts.

#include "common/attention.cuh"
#include "common/host.h"
#include "launch.h"

namespace gptdist::cuda {
namespace {

template <int kHeadDim>
constexpr AttentionTile kTile = attention_forward_tile(kHeadDim);

}  // namespace

template <class T, int kHeadDim, int kVariant>
__global__ void __launch_bounds__(kAttentionThreads)
attention_forward_kernel(const __grid_constant__ AttentionForward args) {
  using Rows = Tile<kHeadDim>;
  constexpr int kQueries = kTile<kHeadDim>.queries, kKeys = kTile<kHeadDim>.keys;
  constexpr int kM = kQueries / (16 * kAttentionWarps), kN = kKeys / 8;
  const int32_t positions = args.positions;
  const bool documents = kVariant != kAttentionPlain && args.doc_start != nullptr;
  const auto [batch, head, kv_head, first_query, batch_head] = query_block<kHeadDim, kQueries>(args, blockIdx.x);

  const int64_t stride = args.qkv_stride;
  const T* qkv = static_cast<const T*>(args.qkv);
  const int32_t* doc_start = documents ? args.doc_start + int64_t(batch) * positions : nullptr;
  const KeyTiles tiles = key_tiles(first_query, kQueries, kKeys, positions, args.causal, doc_start);
  int32_t n = tiles.end - 1;  // the tile at hand; from the diagonal down, so that the first one alone can be ragged

  const uint32_t q_tile = shared_base(), k_tile = q_tile + kQueries * Rows::kRowBytes;
  const uint32_t v_tile = k_tile + kKeys * Rows::kRowBytes;
  const Mover<kHeadDim, kAttentionThreads> mover(threadIdx.x);
  const int64_t tile_stride = int64_t(kKeys) * stride;
  const T* k_from = mover.first(qkv + key_offset<kHeadDim>(args, batch, kv_head, n * kKeys), stride);
  const T* v_from = k_from + kHeadDim;
  const T* q_from = mover.first(qkv + query_offset<kHeadDim>(args, batch, head, kv_head, first_query), stride);
  mover.template load<kQueries, true>(q_tile, q_from, stride, positions - first_query);
  mover.template load<kKeys, true>(k_tile, k_from, stride, positions - n * kKeys);
  commit_copies();

  const Lane lane = lane_of(threadIdx.x);
  const int32_t warp_row = int32_t(threadIdx.x) / kWarpSize * 16 * kM, query = first_query + warp_row + lane.g;
  const uint32_t q_place = q_tile + warp_row * Rows::kRowBytes + Rows::place_a(lane.lane);
  const uint32_t k_place = k_tile + Rows::place_b(lane.lane), v_place = v_tile + Rows::place_a(lane.lane);
  const int32_t horizon = args.causal ? 0 : positions - 1;  // every query sees the keys up to here
  const float scale_log2 = args.softmax_scale * kLog2e;
  Keep keep;
  if constexpr (kVariant == kAttentionDropout) keep = keep_of(args, batch, head);

  float out[kM][kHeadDim / 8][4];
  clear(out);
  RowState<kM> state;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    state.maximum[i][0] = state.maximum[i][1] = -INFINITY;
    state.sum[i][0] = state.sum[i][1] = 0.0f;
  }

  const auto hide = [&](float (&s)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = query + 16 * i + 8 * half, column = n * kKeys + lane.t2;
        const int32_t last = max(row, horizon) - column;
        const int32_t first = documents ? doc_start[min(row, positions - 1)] - column : 0;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            bool hidden = 8 * j + e > last;
            if constexpr (kVariant != kAttentionPlain) hidden |= documents && 8 * j + e < first;
            s[i][j][2 * half + e] = hidden ? -INFINITY : s[i][j][2 * half + e];
          }
        }
      }
    }
  };

  const auto step = [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    await_copies();
    __syncthreads();  // K is there, the last tile's V is done with
    mover.template load<kKeys, kMasked>(v_tile, v_from, stride, positions - n * kKeys);
    commit_copies();
    v_from -= tile_stride;
    [[maybe_unused]] uint32_t kept[kM][kN / 8];
    if constexpr (kVariant == kAttentionDropout) {  // here, where no scores take up registers
#pragma unroll
      for (int f = 0; f < kM * kN / 8; ++f) {
        const int i = f / (kN / 8), j = f % (kN / 8);
        kept[i][j] = keep.by_query<8>(query + 16 * i, n * kKeys + 64 * j + lane.t2);
      }
    }
    float s[kM][kN][4];
    multiply_tiles<T, kHeadDim>(s, q_place, k_place);
    await_copies();
    __syncthreads();  // V is there, K is done with
    if (n > tiles.begin) {
      k_from -= tile_stride;
      mover.template load<kKeys, false>(k_tile, k_from, stride, kKeys);
    }
    commit_copies();
    if constexpr (kMasked) hide(s);
    online_softmax<kMasked>(s, out, state, scale_log2);
    multiply_by_tile<T, kHeadDim, kKeys / 16>(out, v_place, [&](uint32_t (&a)[4], int i, int k) {
      fragment_of<T>(a, s[i][2 * k], s[i][2 * k + 1]);
      if constexpr (kVariant == kAttentionDropout) keep_fragment(a, kept[i][k / 4], 2 * k % 8);
    });
  };
  if constexpr (kVariant == kAttentionPlain) {
    for (; n >= tiles.full_end; --n) step(std::true_type{});
    for (; n >= 0; --n) step(std::false_type{});
  } else {
    while (n >= tiles.begin) {
      for (; n < tiles.full_end && n >= tiles.full_begin; --n) step(std::false_type{});
      if (n >= tiles.begin) step(std::true_type{}), --n;
    }
  }

  const QueryBlock done = query_block<kHeadDim, kQueries>(args, reread_block());
  const uint32_t thread = reread_thread();
  const Lane place = lane_of(thread);
  const int32_t first_row = int32_t(thread) / kWarpSize * 16 * kM;
  float* lse = args.lse + done.batch_head * positions;
  const auto finish_row = [&](int i, int half) {  // returns what the row's output is to be multiplied by
    float sum = state.sum[i][half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int32_t row = done.first_query + first_row + place.g + 16 * i + 8 * half;
    if (place.t2 == 0 && row < positions) lse[row] = (state.maximum[i][half] * scale_log2 + log2_approx(sum)) * kLn2;
    return (kVariant == kAttentionDropout ? args.dropout.scale : 1.0f) * reciprocal_approx(sum);
  };
  stage<T, kHeadDim>(q_tile + first_row * Rows::kRowBytes, place, out, finish_row);
  __syncthreads();
  T* out_rows = static_cast<T*>(args.out) + out_offset<kHeadDim>(args, done.batch, done.head, done.first_query);
  const Mover<kHeadDim, kAttentionThreads> last_mover(thread);
  last_mover.template store<kQueries>(out_rows, args.out_stride, positions - done.first_query, q_tile);
}

// Launchers.

namespace {

template <class T, int kHeadDim>
Error launch_forward(const LaunchPlan& plan, const AttentionForward& args, Stream stream) {
  switch (plan.variant) {
    case kAttentionPlain: return launch(attention_forward_kernel<T, kHeadDim, kAttentionPlain>, plan, args, stream);
    case kAttentionDocuments: return launch(attention_forward_kernel<T, kHeadDim, kAttentionDocuments>, plan, args, stream);
    default: return launch(attention_forward_kernel<T, kHeadDim, kAttentionDropout>, plan, args, stream);
  }
}

}  // namespace

Error attention_forward(const AttentionForward& args, Stream stream) {
  if (const Error wrong = attention_error(args)) return wrong;
  if (args.batch == 0 || args.positions == 0 || args.kv_heads == 0) return nullptr;
  const LaunchPlan plan = plan_attention_forward(args);
  if (plan.grid[0] == 0) return too_many_blocks(args);
  const bool wide = args.head_dim == 128;
  if (args.dtype == Dtype::kBf16) return (wide ? launch_forward<Bf16, 128> : launch_forward<Bf16, 64>)(plan, args, stream);
  return (wide ? launch_forward<Fp16, 128> : launch_forward<Fp16, 64>)(plan, args, stream);
}

}  // namespace gptdist::cuda
