// What the attention kernels share: tiles in shared memory, products of tiles, the online softmax, dropout's mask, the
// order of blocks.
#pragma once

#include <cstdint>

#include "host.h"
#include "mma.cuh"
#include "philox.cuh"
#include "ptx.cuh"

namespace gptdist::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A thread's place in its warp's fragments (mma.cuh).
struct Lane {
  int32_t lane, g, t2;
};

__device__ __forceinline__ Lane lane_of(uint32_t thread) {
  const int32_t lane = int32_t(thread) % kWarpSize;
  return {lane, lane / 4, lane % 4 * 2};
}

// A tile: rows of kHeadDim 16-bit elements in shared memory, one after the other. The 16-byte chunk c of row r lies in
// place c ^ (r % 8). ldmatrix reads one chunk of eight consecutive rows at a time; the rows' lengths are multiples of
// all 32 banks, so that without the exclusive-or those eight chunks would lie in the same four banks.
// Addresses that a lane gives to ldmatrix follow from its first one: 16 elements on along the row flips bits
// (`^ 32 k`), 16 rows on adds a constant.
template <int kHeadDim>
struct Tile {
  static constexpr int kRowBytes = kHeadDim * 2, kChunks = kHeadDim / 8;

  static __device__ __forceinline__ uint32_t place(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // For a 16x16 A fragment of rows; also, transposed, for two 16x8 B fragments whose k runs down the rows.
  static __device__ __forceinline__ uint32_t place_a(int lane) { return place(lane & 15, lane >> 4); }

  // For two 16x8 B fragments whose k runs along the rows: columns are 8 rows, then 8 more.
  static __device__ __forceinline__ uint32_t place_b(int lane) {
    return place((lane & 7) + ((lane >> 4) << 3), lane >> 3 & 1);
  }
};

// A thread's part in moving tiles between global and shared memory: one chunk in every kRowsAtOnce rows.
template <int kHeadDim, int kThreads>
struct Mover {
  using Rows = Tile<kHeadDim>;
  static constexpr int kRowsAtOnce = kThreads / Rows::kChunks;
  static_assert(kRowsAtOnce % 8 == 0, "the place of a thread's chunk must be the same in all of its rows");
  int32_t row, column;  // of the first chunk
  uint32_t place;

  explicit __device__ __forceinline__ Mover(uint32_t thread) {
    const int32_t chunk = int32_t(thread) % Rows::kChunks;
    row = int32_t(thread) / Rows::kChunks;
    column = chunk * 8;
    place = Rows::place(row, chunk);
  }

  template <class T>
  __device__ __forceinline__ T* first(T* rows, int32_t stride) const { return rows + int64_t(row) * stride + column; }

  // kRows rows from `from` (this thread's first chunk) to the tile at `to`. kChecked: rows from `rows_left` on do not
  // exist and become zeros.
  template <int kRows, bool kChecked, class T>
  __device__ __forceinline__ void load(uint32_t to, const T* from, int64_t stride, int32_t rows_left) const {
    const int32_t left = rows_left - row;  // of this thread
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const bool inside = !kChecked || i * kRowsAtOnce < left;
      copy_async_16(to + place + i * kRowsAtOnce * Rows::kRowBytes, from + int64_t(i * kRowsAtOnce) * stride, inside);
    }
  }

  // The tile at `from` to kRows rows of global memory, of which `rows_left` exist.
  template <int kRows, class T>
  __device__ __forceinline__ void store(T* to, int64_t stride, int32_t rows_left, uint32_t from) const {
    T* chunk = first(to, stride);
    const int32_t left = rows_left - row;
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      if (i * kRowsAtOnce >= left) break;
      const uint4 words = load_shared_16(from + place + i * kRowsAtOnce * Rows::kRowBytes);
      __stwb(reinterpret_cast<uint4*>(chunk + int64_t(i * kRowsAtOnce) * stride), words);
    }
  }
};

// Accumulators: kM by kN fragments of 16x8.

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) c[i][j][0] = c[i][j][1] = c[i][j][2] = c[i][j][3] = 0.0f;
  }
}

// c = A B^T of two tiles along the head dimension; a, b: this lane's places (place_a, place_b) in them.
// An A fragment serves kN products and a pair of B fragments 2 kM: with kM = 2, five ldmatrix feed 16 mma (kN = 8).
template <class T, int kHeadDim, int kM, int kN>
__device__ __forceinline__ void multiply_tiles(float (&c)[kM][kN][4], uint32_t a, uint32_t b) {
  constexpr int kRowBytes = Tile<kHeadDim>::kRowBytes;
  clear(c);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix_x4(left[i], (a ^ (k << 5)) + i * 16 * kRowBytes);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, (b ^ (k << 5)) + j * 8 * kRowBytes);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16x8x16<T>(c[i][j], left[i], right[0], right[1]);
        mma_16x8x16<T>(c[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// c += A B: A's fragments from registers, fragment(a, i, k) for rows 16 i and columns 16 k; B the 16 kK rows of a tile,
// in which this lane's place_a is b.
template <class T, int kHeadDim, int kK, int kM, class Fragment>
__device__ __forceinline__ void multiply_by_tile(float (&c)[kM][kHeadDim / 8][4], uint32_t b, const Fragment& fragment) {
  constexpr int kRowBytes = Tile<kHeadDim>::kRowBytes;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) fragment(left[i], i, k);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 2) {
      uint32_t right[4];
      ldmatrix_x4_transposed(right, (b ^ (j << 4)) + k * 16 * kRowBytes);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16x8x16<T>(c[i][j], left[i], right[0], right[1]);
        mma_16x8x16<T>(c[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// The online softmax.

// What a thread keeps of its 2 kM query rows while keys pass by: the largest score so far, and its own columns' share of
// the sum of exponentials.
template <int kM>
struct RowState {
  float maximum[kM][2], sum[kM][2];
};

// Scores s to exponentials 2^(scale_log2 (s - maximum)), state and output rescaled to the new maxima.
// kMasked: some rows may have seen no key yet; their maximum is -inf, and nothing is taken from it.
template <bool kMasked, int kM, int kN, int kD>
__device__ __forceinline__ void online_softmax(float (&s)[kM][kN][4], float (&out)[kM][kD][4], RowState<kM>& state,
                                               float scale_log2) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = state.maximum[i][half];
#pragma unroll
      for (int j = 0; j < kN; ++j) maximum = fmaxf(maximum, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      float subtrahend = maximum * scale_log2;
      if (kMasked) subtrahend = maximum == -INFINITY ? 0.0f : subtrahend;
      const float shrink = exp2_approx(state.maximum[i][half] * scale_log2 - subtrahend);
      float sum = state.sum[i][half] * shrink;
      state.maximum[i][half] = maximum;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float p0 = exp2_approx(s[i][j][2 * half] * scale_log2 - subtrahend);
        const float p1 = exp2_approx(s[i][j][2 * half + 1] * scale_log2 - subtrahend);
        s[i][j][2 * half] = p0;
        s[i][j][2 * half + 1] = p1;
        sum += p0 + p1;
      }
      state.sum[i][half] = sum;
#pragma unroll
      for (int j = 0; j < kD; ++j) {
        out[i][j][2 * half] *= shrink;
        out[i][j][2 * half + 1] *= shrink;
      }
    }
  }
}

// Accumulators, times factor(i, half) and rounded, to rows of a tile that begin at `rows`; half: row g or g + 8. Free of
// bank conflicts: eight g spread over the chunks, four t2 within one. The rows are the warp's own.
template <class T, int kHeadDim, int kM, class Factor>
__device__ __forceinline__ void stage(uint32_t rows, const Lane& lane, const float (&c)[kM][kHeadDim / 8][4],
                                      const Factor& factor) {
  __syncwarp();  // its other lanes have read what lay there
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(i, half);
      const uint32_t row = rows + (i * 16 + half * 8 + lane.g) * Tile<kHeadDim>::kRowBytes + lane.t2 * 2;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        store_shared_4(row + ((j ^ lane.g) << 4), pack<T>(c[i][j][2 * half] * f, c[i][j][2 * half + 1] * f));
      }
    }
  }
}

// The order of blocks. Causal tiles differ in work, so the heaviest go first: of all heads, or where their operands are
// more than kOperandBytes, of as many heads as fit. Blocks that run at once would otherwise share nothing in the
// second-level cache (40 MB on an A100, 50 on an H100, half of each near a multiprocessor).

constexpr uint32_t kOperandBytes = 16 << 20;

struct Work {
  int32_t rank;  // 0: the first of a head's tiles to be started
  int32_t head;
};

// `sharing` heads read the same operands, of operand_bytes.
__device__ __forceinline__ Work work_of(uint32_t block, int32_t tiles, int32_t heads, int32_t sharing,
                                        int64_t operand_bytes) {
  const uint32_t fitting = kOperandBytes / uint32_t(min(operand_bytes, int64_t(kOperandBytes)));
  const uint32_t heads_at_once = min(fitting * sharing, uint32_t(heads));
  const uint32_t section = block / (heads_at_once * tiles), first = section * heads_at_once;
  const uint32_t within = block - first * tiles, section_heads = min(heads_at_once, uint32_t(heads) - first);
  const uint32_t rank = within / section_heads;
  return {int32_t(rank), int32_t(first + within - rank * section_heads)};
}

// What a block of the forward and of the dQ kernel works on.
struct QueryBlock {
  int32_t batch, head, kv_head, first_query;  // head, kv_head: within the batch row
  int64_t batch_head;
};

template <int kHeadDim, int kQueries, class Args>
__device__ __forceinline__ QueryBlock query_block(const Args& args, uint32_t block) {
  const int32_t tiles = (args.positions + kQueries - 1) / kQueries, heads = args.kv_heads * args.group;
  const int64_t kv_bytes = int64_t(args.positions) * Tile<kHeadDim>::kRowBytes * 2;
  const Work work = work_of(block, tiles, args.batch * heads, args.group, kv_bytes);
  const int32_t batch = work.head / heads, head = work.head - batch * heads;
  const int32_t first_query = (tiles - 1 - work.rank) * kQueries;  // the last queries see the most keys
  return {batch, head, head / args.group, first_query, work.head};
}

// Tiles of keys that a block of queries meets: [begin, end), of which [full_begin, full_end) need no mask.
struct KeyTiles {
  int32_t begin, full_begin, full_end, end;
};

// doc_start: of the block's batch row, or nullptr. It never decreases along a row, so the first query of the block
// reaches back the farthest.
__device__ __forceinline__ KeyTiles key_tiles(int32_t query, int32_t queries, int32_t keys, int32_t positions, bool causal,
                                              const int32_t* doc_start) {
  const int32_t end = min(query + queries, positions);
  KeyTiles tiles{0, 0, (causal ? query : positions) / keys, ((causal ? end : positions) + keys - 1) / keys};
  if (doc_start != nullptr) {
    // Clamped, so that no block leaves the sequence or has nothing to do, whatever doc_start holds.
    tiles.begin = min(max(doc_start[query], 0), query) / keys;
    tiles.full_begin = max((doc_start[end - 1] + keys - 1) / keys, tiles.begin);
  }
  return tiles;
}

// Elements from the start of out or dout to a position of a query head; from the start of qkv or dqkv, where two rows more
// lie before it for every earlier kv head; and from there to the key of a kv head. Its value follows.

template <int kHeadDim, class Args>
__device__ __forceinline__ int64_t out_offset(const Args& args, int32_t batch, int32_t head, int32_t position) {
  return (int64_t(batch) * args.positions + position) * args.out_stride + head * kHeadDim;
}

template <int kHeadDim, class Args>
__device__ __forceinline__ int64_t query_offset(const Args& args, int32_t batch, int32_t head, int32_t kv_head,
                                                int32_t position) {
  return (int64_t(batch) * args.positions + position) * args.qkv_stride + (head + 2 * kv_head) * kHeadDim;
}

template <int kHeadDim, class Args>
__device__ __forceinline__ int64_t key_offset(const Args& args, int32_t batch, int32_t kv_head, int32_t position) {
  return query_offset<kHeadDim>(args, batch, (kv_head + 1) * args.group, kv_head, position);
}

// Dropout's mask. The counter of an element: {key position / 4, query position, sample, site and head}; one Philox call
// serves four neighbouring keys of a query. In C fragments these lie in two lanes (keys run along the rows) or four
// lanes (keys run down the columns). Each lane makes one call for every four of its elements and the bits change hands:
// the fewest calls, and one or four shuffles for 32 elements.
//
// A word holds the bits of up to eight fragments: byte e for their elements e, bit 7 - f of it for fragment f. Shifted
// left by f, fragment f's bits are the bytes' sign bits, which prmt spreads over the halves of a packed pair.
struct Keep {
  uint2 key;
  uint32_t sample, site_and_head, negated_threshold;  // the threshold is not 0

  // One fragment more: what adding the negated threshold to a random word carries is whether the word is kept.
  __device__ __forceinline__ void append(uint32_t& bits, uint32_t word) const {
    asm("{ .reg .u32 unused;  add.cc.u32 unused, %1, %2;  addc.u32 %0, %0, %0; }"
        : "+r"(bits) : "r"(word), "r"(negated_threshold));
  }

  // A word of four neighbouring keys, one in each byte, for kFragments positions: key_of(f), query_of(f).
  template <int kFragments, class KeyOf, class QueryOf>
  __device__ __forceinline__ uint32_t draw(const KeyOf& key_of, const QueryOf& query_of) const {
    static_assert(kFragments <= 8, "a word holds eight fragments");
    uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const uint4 counter = make_uint4(uint32_t(key_of(f)) / 4, uint32_t(query_of(f)), sample, site_and_head);
      const uint4 words = philox4x32(counter, key);
      append(bits[0], words.x), append(bits[1], words.y), append(bits[2], words.z), append(bits[3], words.w);
    }
    const uint32_t first_two = __byte_perm(bits[0], bits[1], 0x0040), last_two = __byte_perm(bits[2], bits[3], 0x0040);
    return __byte_perm(first_two, last_two, 0x5410) << (8 - kFragments);
  }

  // Fragments of 16 queries by 8 keys, side by side; `query`, `key_position`: of this lane's c[0]. Lanes t2 / 2 = 0 and 1
  // (2 and 3) hold the same four keys: the even one draws for row g, the odd one for row g + 8.
  template <int kFragments>
  __device__ __forceinline__ uint32_t by_query(int32_t query, int32_t key_position) const {
    const bool odd = threadIdx.x & 1;
    const uint32_t own =
        draw<kFragments>([&](int f) { return key_position + 8 * f; }, [&](int) { return query + (odd ? 8 : 0); });
    const uint32_t other = __shfl_xor_sync(~0u, own, 1);
    return __byte_perm(own, other, odd ? 0x3276 : 0x5410);  // of rows g, g + 8: keys 0 and 1, or 2 and 3
  }

  // Fragments of 16 keys by 8 queries, kM down and kN across: fragment i kN + j. The four lanes g % 4 of the same t2 hold
  // the same four keys: the one with g % 4 = e draws for the elements e of all four.
  template <int kM, int kN>
  __device__ __forceinline__ uint32_t by_key(int32_t key_position, int32_t query, const Lane& lane) const {
    const int32_t mine = lane.g & 3, drawn_key = key_position + (mine >> 1) * 8, drawn_query = query + (mine & 1);
    const uint32_t own = draw<kM * kN>([&](int f) { return drawn_key + f / kN * 16; },
                                       [&](int f) { return drawn_query + f % kN * 8; });
    uint32_t drawn[4];  // by the lanes e; byte `mine` is this lane's
#pragma unroll
    for (int e = 0; e < 4; ++e) drawn[e] = __shfl_sync(~0u, own, (lane.lane & ~12) | e << 2);
    const uint32_t pair = mine | (4 + mine) << 4;
    return __byte_perm(__byte_perm(drawn[0], drawn[1], pair), __byte_perm(drawn[2], drawn[3], pair), 0x5410);
  }
};

// Whether element e of fragment f is kept.
__device__ __forceinline__ bool is_kept(uint32_t kept, int f, int e) { return kept & (1u << (8 * e + 7 - f)); }

// A packed pair of fragment f, elements 0 and 1 or (upper) 2 and 3, with zeros where dropped.
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t kept, int f, bool upper) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(kept << f), "r"(upper ? 0xbbaa : 0x9988));
  return pair & mask;
}

// The A fragment of fragments f and f + 1.
__device__ __forceinline__ void keep_fragment(uint32_t (&a)[4], uint32_t kept, int f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = keep_pair(a[i], kept, f + i / 2, i % 2);
}

template <class Args>
__device__ __forceinline__ Keep keep_of(const Args& args, int32_t batch, int32_t head) {
  return {philox_key(*args.dropout.key), uint32_t(args.dropout.sample_ids[batch]),
          uint32_t(args.dropout.site) << 16 | uint32_t(args.dropout.head_offset + head), 0 - args.dropout.threshold};
}

// Host: what is wrong with the arguments of either pass, or nullptr.
template <class Args>
Error attention_error(const Args& args) {
  if (args.dtype != Dtype::kBf16 && args.dtype != Dtype::kFp16) {
    return error("attention: qkv is %s, expected bf16 or fp16", name_of(args.dtype));
  }
  if (args.head_dim != 64 && args.head_dim != 128) {
    return error("attention: head_dim is %d, expected 64 or 128", args.head_dim);
  }
  if (args.group < 1) return error("attention: group is %d, expected at least 1", args.group);
  if (!(args.softmax_scale > 0.0f)) {
    return error("attention: softmax_scale is %g, expected more than 0", args.softmax_scale);
  }
  if (!args.causal && args.doc_start != nullptr) return error("attention: documents are causal, but causal is 0");
  if (args.dropout.key != nullptr) {
    const int64_t heads = int64_t(args.kv_heads) * args.group, offset = args.dropout.head_offset;
    if (args.dropout.site < 0 || args.dropout.site >= 1 << 16) {
      return error("attention: site is %d, expected 0 to 65535", args.dropout.site);
    }
    if (offset < 0 || offset + heads > 1 << 16) {
      return error("attention: heads %lld to %lld, expected 0 to 65535", (long long)offset,
                   (long long)(offset + heads - 1));
    }
  }
  return nullptr;
}

template <class Args>
Error too_many_blocks(const Args& args) {
  return error("attention: %d x %d heads of %d positions, more than a grid holds", args.batch,
               args.kv_heads * args.group, args.positions);
}

}  // namespace gptdist::cuda
