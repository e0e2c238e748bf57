// Tiles of attention on a CPU: packing, products, masks. Included by simd_*.cpp after simd.h.
//
// A product C[M x N] (+)= A[M x K] B[K x N] walks K in steps. A step holds one fp32 element, or a pair of bf16 that
// dpbf16 multiplies and adds in fp32; either is a unit of 32 bits. A unit of A is broadcast, a vector of B's units
// (one for each column) is loaded, and C's strip of kStripRows x kPanel vectors stays in registers.
//
//     float   a[m][k]                  b[k][n]
//     Pair    a[m][2k], a[m][2k + 1]   b[2k][n], b[2k + 1][n]
//
// So rows as they lie in memory are left operands; a right operand is rows joined in pairs (join_rows), or, for q k^T,
// rows transposed unit by unit (transpose_rows).

namespace gptdist::cpu {
namespace {

// AVX-512 has 32 registers: 8 x 2 sums, 2 of B and one of A. The others have 16: 4 x 3 sums, 3 and one.
constexpr int kStripRows = kLanes == 16 ? 8 : 4;
constexpr int kPanel = kLanes == 16 ? 2 : 3;

// Columns of scores are computed in multiples of this: whole vectors, and whole pairs of them.
constexpr int64_t kColumnStep = 32;

struct Pair {  // two bf16, the even one in the low bits
  uint32_t bits;
};

template <class Unit>
constexpr int64_t kStepElements = std::is_same_v<Unit, Pair> ? 2 : 1;

GPTDIST_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
GPTDIST_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GPTDIST_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Units from one packed row of D elements to the next: whole vectors, for transpose_rows.
template <class Unit>
GPTDIST_INLINE constexpr int64_t row_units(int64_t D) {
  return round_up(D / kStepElements<Unit>, kLanes);
}

// products

GPTDIST_INLINE Floats load_units(const float* from) { return load(from); }
GPTDIST_INLINE Floats broadcast_unit(float unit) { return broadcast(unit); }
GPTDIST_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

#if GPTDIST_ISA == 3
GPTDIST_INLINE __m512bh load_units(const Pair* from) { return __m512bh(load_as<Words>(from)); }
GPTDIST_INLINE __m512bh broadcast_unit(Pair unit) { return __m512bh(Words{} + unit.bits); }
GPTDIST_INLINE Floats multiply_add(__m512bh a, __m512bh b, Floats c) {
  return Floats(_mm512_dpbf16_ps(__m512(c), a, b));
}
#endif

// A left operand: unit (row, step) lies at data[row * row_stride + step * step_stride].
template <class Unit>
struct Left {
  const Unit* data;
  int64_t row_stride, step_stride;
};

// A right operand: unit (step, column) lies at data[step * step_stride + column].
template <class Unit>
struct Right {
  const Unit* data;
  int64_t step_stride;
};

// What a product starts from: zero, what c holds, or that times a factor for each row.
enum class Start { kZero, kAdd, kScale };

template <Start kStart, int kVectors, class Unit>
GPTDIST_INLINE void panel_product(Left<Unit> a, Right<Unit> b, int64_t steps, float* c, int64_t c_row,
                                  [[maybe_unused]] const float* factors) {
  Floats sums[kStripRows][kVectors];
  for (int r = 0; r < kStripRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kStart == Start::kZero ? Floats{} : load(c + r * c_row + v * kLanes);
      if constexpr (kStart == Start::kScale) sums[r][v] *= factors[r];
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    decltype(load_units(b.data)) columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load_units(b.data + step * b.step_stride + v * kLanes);
    for (int r = 0; r < kStripRows; ++r) {
      const auto left = broadcast_unit(a.data[r * a.row_stride + step * a.step_stride]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(left, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kStripRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
  }
}

// c[kStripRows x columns] = start + a b over `steps`; columns: whole vectors.
template <Start kStart, class Unit>
GPTDIST_INLINE void strip_product(Left<Unit> a, Right<Unit> b, int64_t steps, float* c, int64_t c_row, int64_t columns,
                                  const float* factors = nullptr) {
  int64_t n = 0;
  for (; n + kPanel * kLanes <= columns; n += kPanel * kLanes) {
    panel_product<kStart, kPanel>(a, {b.data + n, b.step_stride}, steps, c + n, c_row, factors);
  }
  if (kPanel > 2 && n + 2 * kLanes <= columns) {
    panel_product<kStart, 2>(a, {b.data + n, b.step_stride}, steps, c + n, c_row, factors);
    n += 2 * kLanes;
  }
  if (n < columns) panel_product<kStart, 1>(a, {b.data + n, b.step_stride}, steps, c + n, c_row, factors);
}

// packing

GPTDIST_INLINE void copy_row(const float* from, int64_t D, float* to) { std::memcpy(to, from, D * sizeof(float)); }
GPTDIST_INLINE void copy_row(const Bf16* from, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += kLanes) store(to + d, load(from + d));
}
GPTDIST_INLINE void copy_row(const Bf16* from, int64_t D, Pair* to) { std::memcpy(to, from, D * sizeof(Bf16)); }

// Copies `count` rows and writes zeros up to `padded`.
template <class T, class Unit>
GPTDIST_INLINE void load_rows(const T* from, int64_t stride, int64_t count, int64_t padded, int64_t D, Unit* to) {
  const int64_t units = row_units<Unit>(D);
  for (int64_t row = 0; row < count; ++row) copy_row(from + row * stride, D, to + row * units);
  if (count < padded) std::memset(to + count * units, 0, (padded - count) * units * sizeof(Unit));
}

// kLanes x kLanes units; `from_stride` and `to_stride` from row to row.
GPTDIST_INLINE void transpose_square(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  const uint32_t* in = static_cast<const uint32_t*>(from);
  uint32_t* out = static_cast<uint32_t*>(to);
#if GPTDIST_ISA >= 2
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each 4 x 4 block of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {  // then the blocks themselves
    const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (4 + c) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (8 + c) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (12 + c) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
#elif GPTDIST_ISA == 1
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * from_stride));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const auto row = [&](int i) GPTDIST_LAMBDA { return reinterpret_cast<__m256i*>(out + i * to_stride); };
    _mm256_storeu_si256(row(c), _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
    _mm256_storeu_si256(row(4 + c), _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) out[j * to_stride + i] = in[i * from_stride + j];
  }
#endif
}

// Packed rows [kTileKeys][row_units] as [row_units][kTileKeys].
template <class Unit>
GPTDIST_INLINE void transpose_rows(const Unit* rows, int64_t D, Unit* to) {
  const int64_t units = row_units<Unit>(D);
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    for (int64_t row = 0; row < kTileKeys; row += kLanes) {
      transpose_square(rows + row * units + unit, units, to + unit * kTileKeys + row, kTileKeys);
    }
  }
}

// Packed rows as a right operand, steps over rows: themselves, or neighbours joined, [count / 2][D].
GPTDIST_INLINE Right<float> join_rows(const float* rows, int64_t, int64_t D, float*) {
  return {rows, row_units<float>(D)};
}

#if GPTDIST_ISA == 3
GPTDIST_INLINE Words join(Halves even, Halves odd) { return widen(even) | widen(odd) << 16; }

GPTDIST_INLINE Right<Pair> join_rows(const Pair* rows, int64_t count, int64_t D, Pair* to) {
  const int64_t units = row_units<Pair>(D);
  for (int64_t row = 0; row < count; row += 2) {
    for (int64_t d = 0; d < D; d += kLanes) {
      const Pair* even = rows + row * units + d / 2;
      store_as(to + row / 2 * D + d, join(load_as<Halves>(even), load_as<Halves>(even + units)));
    }
  }
  return {to, D};
}
#endif

// scores: from rows of fp32 to units

// 2 kLanes neighbours of a row of a left operand.
GPTDIST_INLINE void store_row(float* row, int64_t column, Floats low, Floats high) {
  store(row + column, low);
  store(row + column + kLanes, high);
}

// kLanes neighbours of two rows, as a left operand whose steps go over the rows: [rows / step][kTileKeys].
GPTDIST_INLINE void store_joined(float* tile, int64_t row, int64_t column, Floats even, Floats odd) {
  store(tile + row * kTileKeys + column, even);
  store(tile + (row + 1) * kTileKeys + column, odd);
}

#if GPTDIST_ISA == 3
GPTDIST_INLINE void store_row(Pair* row, int64_t column, Floats low, Floats high) {
  store_as(row + column / 2, _mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
}

GPTDIST_INLINE void store_joined(Pair* tile, int64_t row, int64_t column, Floats even, Floats odd) {
  const Halves low = Halves(_mm512_cvtneps_pbh(__m512(even))), high = Halves(_mm512_cvtneps_pbh(__m512(odd)));
  store_as(tile + row / 2 * kTileKeys + column, join(low, high));
}
#endif

// masks

// Keys [begin, end) that a query sees, relative to a tile's first key.
struct Seen {
  int32_t begin, end;
};

GPTDIST_INLINE Span keys_of(const AttentionShape& shape, int64_t b, int64_t t) {
  const int64_t start = shape.doc_start ? most(0, shape.doc_start[b * shape.positions + t]) : 0;
  const int64_t before = shape.lengths ? shape.lengths[b] : 0;
  return {start, shape.causal ? before + t + 1 : shape.positions};
}

// Keys that any of the queries sees. Neither starts nor ends decrease along a row.
GPTDIST_INLINE Span keys_of(const AttentionShape& shape, int64_t b, Span queries) {
  return {keys_of(shape, b, queries.begin).begin, keys_of(shape, b, queries.end - 1).end};
}

// What the rows of a strip see of a tile of keys.
struct StripMask {
  bool any, all;          // any of the keys is seen by any row; all by all rows
  int64_t columns;        // keys up to the last one seen by any row
  Seen rows[kStripRows];  // set unless `all`; rows from `count` on are padding and see what the last one does

  GPTDIST_INLINE StripMask(const AttentionShape& shape, int64_t b, int64_t t, int64_t count, int64_t first_key) {
    const Span first = keys_of(shape, b, t), last = keys_of(shape, b, t + count - 1);
    any = first.begin < first_key + kTileKeys && last.end > first_key;
    all = last.begin <= first_key && first.end >= first_key + kTileKeys;
    columns = least(last.end - first_key, kTileKeys);
    if (all) return;
    for (int64_t r = 0; r < kStripRows; ++r) {
      const Span seen = keys_of(shape, b, t + least(r, count - 1));
      rows[r] = {int32_t(least(most(seen.begin - first_key, 0), kTileKeys)), int32_t(most(seen.end - first_key, 0))};
    }
  }
};

// x, or -inf where the key is hidden. column: of the vector's first lane.
GPTDIST_INLINE Floats hide(Floats x, Seen seen, int64_t column) {
  const Ints key = lane_numbers() + int32_t(column);
  return ((key >= seen.begin) & (key < seen.end)) ? x : broadcast(-std::numeric_limits<float>::infinity());
}

// Dropout's factors of a query and the kTileKeys keys from first_key: 0, or `factor` where kept.
struct DropoutRow {
  uint64_t key;
  uint32_t sample, site_and_head, threshold;
  float factor;

  GPTDIST_INLINE DropoutRow(const AttentionShape& shape, int64_t b, int64_t h, int64_t g) {
    const AttentionDropout& dropout = shape.dropout;
    key = dropout.key;
    sample = uint32_t(dropout.sample_ids[b]);
    site_and_head = uint32_t(dropout.site) << 16 | uint32_t(dropout.head_offset + h * shape.group + g);
    threshold = dropout.threshold;
    factor = dropout.factor;
  }

  // [kStripRows][kTileKeys]
  GPTDIST_INLINE void strip(int64_t query, int64_t first_key, float* to) const {
    for (int64_t r = 0; r < kStripRows; ++r) factors(query + r, first_key, to + r * kTileKeys);
  }

  GPTDIST_INLINE void factors(int64_t query, int64_t first_key, float* to) const {
    for (int64_t column = 0; column < kTileKeys; column += kColumnsAtOnce) {
      Words words[4];
      random_words(uint32_t((first_key + column) / 4), uint32_t(query), sample, site_and_head, key, words);
      for (int m = 0; m < 4; ++m) {
        store(to + column + m * kLanes, words[m] >= threshold ? broadcast(factor) : broadcast(0.0f));
      }
    }
  }
};

// scratch memory

// Cuts a block into arrays, each from a multiple of 64 bytes; with a null block it only counts.
class Cutter {
 public:
  explicit Cutter(std::byte* block) : block_(block) {}

  template <class U>
  U* take(int64_t count) {
    U* found = block_ ? reinterpret_cast<U*>(block_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(U)), 64);
    return found;
  }

  size_t used() const { return size_t(used_); }

 private:
  std::byte* block_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace gptdist::cpu
