// The forward of attention on a CPU. Included by simd_*.cpp after attention_tiles.h.
//
//   x = log2(e) q k^T / sqrt(D),  m = max_s x,  l = sum_s 2^(x - m)
//   out = (sum_s 2^(x - m) Z v) / l,  L = ln2 m + ln l
//
// m, l and out are running sums (Milakov and Gimelshein 2018; Dao et al. 2022): each tile of keys raises m and scales
// what was summed before by 2^(old m - new m). Z is dropout's factor.
//
// Launch: a task is a kv head and some positions, with all queries of its group. It packs each tile of 64 keys once,
// and takes every strip of queries over it: scores, softmax and second product of a strip stay in the first-level
// cache. A row's bits depend on the grid of tiles alone, not on which positions share a task.
//
// Memory: reads q once, k and v once a task, writes out and L.

namespace gptdist::cpu {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNoMaximum = -1e30f;  // finite, so that a row which has seen nothing makes no inf - inf

GPTDIST_INLINE float softmax_scale(int64_t D) { return float(1.0 / std::sqrt(double(D))); }

template <class Unit>
struct ForwardScratch {
  Unit *queries, *keys, *keys_transposed, *values, *values_joined, *probabilities;
  float *sums, *maxima, *denominators, *scores;

  ForwardScratch(Cutter& cut, int64_t group, int64_t positions, int64_t D) {
    const int64_t rows = group * round_up(positions, kStripRows), tile = kTileKeys * row_units<Unit>(D);
    queries = cut.take<Unit>(rows * row_units<Unit>(D));
    keys = cut.take<Unit>(tile);
    keys_transposed = cut.take<Unit>(tile);
    values = cut.take<Unit>(tile);
    values_joined = cut.take<Unit>(kTileKeys * D / kStepElements<Unit>);
    probabilities = cut.take<Unit>(kStripRows * kTileKeys);
    sums = cut.take<float>(rows * D);
    maxima = cut.take<float>(rows);
    denominators = cut.take<float>(rows * kLanes);
    scores = cut.take<float>(kStripRows * kTileKeys);
  }
};

// A strip of queries: what it is and its running state.
template <class Unit>
struct Strip {
  const Unit* queries;  // [kStripRows][row_units]
  float* sums;          // [kStripRows][D]
  float* maxima;        // [kStripRows]
  float* denominators;  // [kStripRows][kLanes]: partial sums
};

// factors[r] = 2^(old maximum - new maximum); the new maxima are kept.
GPTDIST_INLINE void raise_maxima(const float* tops, float* maxima, float* factors) {
  constexpr int kPadded = int(round_up(kStripRows, kLanes));
  float drop[kPadded] = {};
  for (int r = 0; r < kStripRows; ++r) {
    const float raised = maxima[r] < tops[r] ? tops[r] : maxima[r];
    drop[r] = maxima[r] - raised;
    maxima[r] = raised;
  }
  for (int r = 0; r < kPadded; r += kLanes) store(drop + r, exp2(load(drop + r)));
  std::memcpy(factors, drop, kStripRows * sizeof(float));
}

// Scores of a strip to probabilities, and the factors of what was summed before.
template <bool kMasked, bool kDrop, class Unit>
GPTDIST_INLINE void softmax_strip(float* scores, int64_t columns, float scale, const StripMask& mask,
                                  const float* kept, const Strip<Unit>& strip, Unit* probabilities, float* factors) {
  float tops[kStripRows];
  for (int r = 0; r < kStripRows; ++r) {
    float* row = scores + r * kTileKeys;
    Floats top = broadcast(kNoMaximum);
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats x = load(row + column);
      if constexpr (kMasked) store(row + column, x = hide(x, mask.rows[r], column));
      top = larger(x, top);
    }
    tops[r] = largest(top) * scale;
  }
  raise_maxima(tops, strip.maxima, factors);
  for (int r = 0; r < kStripRows; ++r) {
    const float* row = scores + r * kTileKeys;
    const float maximum = strip.maxima[r];
    Floats denominator = load(strip.denominators + r * kLanes) * factors[r];
    for (int64_t column = 0; column < columns; column += 2 * kLanes) {
      Floats low = exp2(load(row + column) * scale - maximum);
      Floats high = exp2(load(row + column + kLanes) * scale - maximum);
      denominator += low + high;
      if constexpr (kDrop) {
        low *= load(kept + r * kTileKeys + column);
        high *= load(kept + r * kTileKeys + column + kLanes);
      }
      store_row(probabilities + r * (kTileKeys / kStepElements<Unit>), column, low, high);
    }
    store(strip.denominators + r * kLanes, denominator);
  }
}

// A strip against a packed tile of keys.
template <class Unit>
GPTDIST_INLINE void forward_strip(const Strip<Unit>& strip, Right<Unit> keys, Right<Unit> values, int64_t D,
                                  float scale, const StripMask& mask, const float* kept,
                                  const ForwardScratch<Unit>& scratch) {
  constexpr int64_t kRow = kTileKeys / kStepElements<Unit>;
  const int64_t columns = round_up(mask.columns, kColumnStep);
  strip_product<Start::kZero>(Left<Unit>{strip.queries, row_units<Unit>(D), 1}, keys, D / kStepElements<Unit>,
                              scratch.scores, kTileKeys, columns);
  float factors[kStripRows];
  const auto softmax = [&](auto masked, auto drop) GPTDIST_LAMBDA {
    softmax_strip<masked.value, drop.value>(scratch.scores, columns, scale, mask, kept, strip, scratch.probabilities,
                                            factors);
  };
  if (kept) {
    mask.all ? softmax(std::false_type{}, std::true_type{}) : softmax(std::true_type{}, std::true_type{});
  } else {
    mask.all ? softmax(std::false_type{}, std::false_type{}) : softmax(std::true_type{}, std::false_type{});
  }
  const int64_t steps = round_up(mask.columns, kStepElements<Unit>) / kStepElements<Unit>;
  strip_product<Start::kScale>(Left<Unit>{scratch.probabilities, kRow, 1}, values, steps, strip.sums, D, D, factors);
}

template <class T>
GPTDIST_INLINE void write_strip(const Heads<T>& out, int64_t b, int64_t t, int64_t h, int64_t g, int64_t count,
                                int64_t D, const float* sums, const float* maxima, const float* denominators,
                                float* lse) {
  for (int64_t r = 0; r < count; ++r) {
    const float denominator = sum(load(denominators + r * kLanes));
    const float inverse = 1.0f / denominator;
    T* row = out.at(b, t + r, h, g);
    for (int64_t d = 0; d < D; d += kLanes) store(row + d, load(sums + r * D + d) * inverse);
    if (lse) lse[r] = maxima[r] * kLn2 + std::log(denominator);
  }
}

// kHeadDim: D, or 0 where it is known at run time only.
template <int64_t kHeadDim, class Unit, class Args>
GPTDIST_INLINE void forward_task(const Args& args, const ForwardTask& task, std::byte* memory) {
  const AttentionShape& shape = args.shape;
  const int64_t D = kHeadDim ? kHeadDim : shape.head_dim, G = shape.group, b = task.b, h = task.h;
  const int64_t first = task.queries.begin, count = task.queries.end - first, padded = round_up(count, kStripRows);
  const int64_t units = row_units<Unit>(D);
  const float scale = softmax_scale(D) * kLog2E;
  Cutter cut(memory);
  const ForwardScratch<Unit> scratch(cut, G, count, D);

  for (int64_t g = 0; g < G; ++g) {
    const auto& queries = queries_of(args);
    load_rows(queries.at(b, first, h, g), queries.position, count, padded, D, scratch.queries + g * padded * units);
  }
  std::memset(scratch.sums, 0, G * padded * D * sizeof(float));
  std::memset(scratch.denominators, 0, G * padded * kLanes * sizeof(float));
  for (int64_t row = 0; row < G * padded; ++row) scratch.maxima[row] = kNoMaximum;

  const Span keys = keys_of(shape, b, task.queries);
  for (int64_t key = keys.begin / kTileKeys * kTileKeys; key < keys.end; key += kTileKeys) {
    const Span tile{key, least(key + kTileKeys, keys.end)};
    load_tile(args, b, h, 0, tile, D, scratch.keys);
    transpose_rows(scratch.keys, D, scratch.keys_transposed);
    load_tile(args, b, h, 1, tile, D, scratch.values);
    const Right<Unit> values = join_rows(scratch.values, kTileKeys, D, scratch.values_joined);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t t = 0; t < count; t += kStripRows) {
        const StripMask mask(shape, b, first + t, least(kStripRows, count - t), key);
        if (!mask.any) continue;
        alignas(64) float kept[kStripRows * kTileKeys];
        if (shape.dropout.sample_ids) DropoutRow(shape, b, h, g).strip(first + t, key, kept);
        const int64_t row = g * padded + t;
        const Strip<Unit> strip{scratch.queries + row * units, scratch.sums + row * D, scratch.maxima + row,
                                scratch.denominators + row * kLanes};
        forward_strip<Unit>(strip, {scratch.keys_transposed, kTileKeys}, values, D, scale, mask,
                            shape.dropout.sample_ids ? kept : nullptr, scratch);
      }
    }
  }
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t t = 0; t < count; t += kStripRows) {
      const int64_t row = g * padded + t;
      float* lse = lse_of(args, b, h, g);
      write_strip(args.out, b, first + t, h, g, least(kStripRows, count - t), D, scratch.sums + row * D,
                  scratch.maxima + row, scratch.denominators + row * kLanes, lse ? lse + first + t : nullptr);
    }
  }
}

}  // namespace
}  // namespace gptdist::cpu
