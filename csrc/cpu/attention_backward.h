// The backward of attention on a CPU. Included by simd_*.cpp after attention_forward.h.
//
//   P = 2^(x - log2(e) L)        x: attention_forward.h; Z: dropout's factor
//   dv = (P Z)^T do,  dS = P (do v^T Z - delta),  delta = rowsum(do out),  dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D)
//
// Launch: a task is a kv head, some positions' queries of all its group, and some keys. For each tile of 64 keys,
// which it packs once, it takes each tile of 64 queries: strip by strip x, do v^T, P Z and dS, then the three products
// of the tile. dk and dv of the keys are summed over queries, dq of the queries over keys, always in ascending tiles,
// in fp32. A task that has all queries and all keys writes all three. Where those are too few tasks for the threads,
// some write dq of some queries and others dk and dv of a tile of keys, for which S and dP are computed twice: every
// sum has the same terms in the same order, so the bits are the same.
//
// Memory: a task reads k and v once, and q, do, L and delta once for each tile of keys; writes dq, dk and dv.

namespace gptdist::cpu {
namespace {

template <class Unit>
struct BackwardScratch {
  Unit *keys, *keys_transposed, *keys_joined, *values, *values_transposed;
  Unit *queries, *queries_joined, *dout, *dout_joined;
  Unit *probabilities, *dscores, *dscores_rows;  // P Z and dS as [queries / step][keys]; dS as [queries][keys / step]
  float *scores, *dprobabilities;                // of a strip
  float *dq, *dk, *dv, *lse, *delta;

  BackwardScratch(Cutter& cut, int64_t group, int64_t positions, int64_t D) {
    static_assert(kTileKeys == kTileQueries);
    const int64_t tile = kTileKeys * row_units<Unit>(D), joined = kTileKeys * D / kStepElements<Unit>;
    for (auto* rows : {&keys, &keys_transposed, &values, &values_transposed}) *rows = cut.take<Unit>(tile);
    for (auto* rows : {&queries, &dout}) *rows = cut.take<Unit>(tile);
    for (auto* rows : {&keys_joined, &queries_joined, &dout_joined}) *rows = cut.take<Unit>(joined);
    for (auto* all : {&probabilities, &dscores, &dscores_rows}) *all = cut.take<Unit>(kTileQueries * kTileKeys);
    for (auto* strip : {&scores, &dprobabilities}) *strip = cut.take<float>(kStripRows * kTileKeys);
    for (auto* sums : {&dk, &dv}) *sums = cut.take<float>(kTileKeys * D);
    for (auto* statistics : {&lse, &delta}) *statistics = cut.take<float>(kTileQueries);
    dq = cut.take<float>(group * round_up(positions, kTileQueries) * D);
  }
};

template <class T>
GPTDIST_INLINE void delta_rows(const AttentionBackward<T>& args, int64_t b, int64_t h, Span queries) {
  const AttentionShape& shape = args.shape;
  for (int64_t g = 0; g < shape.group; ++g) {
    float* delta = args.delta + ((b * shape.kv_heads + h) * shape.group + g) * shape.positions;
    for (int64_t t = queries.begin; t < queries.end; ++t) {
      const T *dout = args.dout.at(b, t, h, g), *out = args.out.at(b, t, h, g);
      Floats total{};
      for (int64_t d = 0; d < shape.head_dim; d += kLanes) total += load(dout + d) * load(out + d);
      delta[t] = sum(total);
    }
  }
}

// Two rows of a strip: scores and do v^T become P Z and dS.
template <bool kMasked, bool kDrop, class Unit>
GPTDIST_INLINE void gradient_rows(int64_t r, int64_t row, int64_t columns, float scale, const StripMask& mask,
                                  const float* kept, const BackwardScratch<Unit>& scratch) {
  Unit* const rows[2] = {scratch.dscores_rows + row * (kTileKeys / kStepElements<Unit>),
                         scratch.dscores_rows + (row + 1) * (kTileKeys / kStepElements<Unit>)};
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    Floats dropped[2][2], dscores[2][2];
    for (int i = 0; i < 2; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t at = (r + i) * kTileKeys + column + v * kLanes;
        Floats x = load(scratch.scores + at) * scale - scratch.lse[row + i];
        if constexpr (kMasked) x = hide(x, mask.rows[r + i], column + v * kLanes);
        const Floats p = exp2(x);
        Floats dp = load(scratch.dprobabilities + at);
        dropped[i][v] = p;
        if constexpr (kDrop) {
          const Floats factor = load(kept + at);
          dropped[i][v] *= factor;
          dp *= factor;
        }
        dscores[i][v] = p * (dp - scratch.delta[row + i]);
      }
      store_row(rows[i], column, dscores[i][0], dscores[i][1]);
    }
    for (int v = 0; v < 2; ++v) {
      store_joined(scratch.probabilities, row, column + v * kLanes, dropped[0][v], dropped[1][v]);
      store_joined(scratch.dscores, row, column + v * kLanes, dscores[0][v], dscores[1][v]);
    }
  }
}

// Strip `row` of a tile of queries against a tile of keys.
template <class Unit>
GPTDIST_INLINE void gradient_strip(int64_t row, int64_t D, float scale, const StripMask& mask, const float* kept,
                                   const BackwardScratch<Unit>& scratch) {
  const int64_t columns = round_up(mask.columns, kColumnStep);
  const int64_t units = row_units<Unit>(D), steps = D / kStepElements<Unit>;
  strip_product<Start::kZero>(Left<Unit>{scratch.queries + row * units, units, 1},
                              Right<Unit>{scratch.keys_transposed, kTileKeys}, steps, scratch.scores, kTileKeys,
                              columns);
  strip_product<Start::kZero>(Left<Unit>{scratch.dout + row * units, units, 1},
                              Right<Unit>{scratch.values_transposed, kTileKeys}, steps, scratch.dprobabilities,
                              kTileKeys, columns);
  const auto rows = [&](auto masked, auto drop) GPTDIST_LAMBDA {
    for (int64_t r = 0; r < kStripRows; r += 2) {
      gradient_rows<masked.value, drop.value>(r, row + r, columns, scale, mask, kept, scratch);
    }
  };
  if (kept) {
    mask.all ? rows(std::false_type{}, std::true_type{}) : rows(std::true_type{}, std::true_type{});
  } else {
    mask.all ? rows(std::false_type{}, std::false_type{}) : rows(std::true_type{}, std::false_type{});
  }
}

// The products of a tile of `rows` queries and kTileKeys keys. On the diagonal, query i sees keys 0 to i.
template <class Unit>
GPTDIST_INLINE void tile_products(int64_t rows, int64_t D, bool diagonal, Right<Unit> queries, Right<Unit> dout,
                                  Right<Unit> keys, const BackwardTask& task, float* dq,
                                  const BackwardScratch<Unit>& scratch) {
  constexpr int64_t kStep = kStepElements<Unit>, kRow = kTileKeys / kStep;
  for (int64_t key = 0; task.write_dkv && key < kTileKeys; key += kStripRows) {
    const int64_t skipped = diagonal ? least(key, rows) : 0, first = skipped / kStep, steps = (rows - skipped) / kStep;
    const auto add_over_queries = [&](const Unit* scores, Right<Unit> right, float* sums) GPTDIST_LAMBDA {
      const Left<Unit> left{scores + first * kTileKeys + key, 1, kTileKeys};
      right.data += first * right.step_stride;
      strip_product<Start::kAdd>(left, right, steps, sums + key * D, D, D);
    };
    add_over_queries(scratch.probabilities, dout, scratch.dv);
    add_over_queries(scratch.dscores, queries, scratch.dk);
  }
  for (int64_t row = 0; task.write_dq && row < rows; row += kStripRows) {
    const int64_t seen = diagonal ? row + kStripRows : kTileKeys;
    const Left<Unit> left{scratch.dscores_rows + row * kRow, kRow, 1};
    strip_product<Start::kAdd>(left, keys, seen / kStep, dq + row * D, D, D);
  }
}

// The queries of head g from t on, up to a tile of them, against the packed tile of keys.
template <class Unit, class T>
GPTDIST_INLINE void gradient_tile(const AttentionBackward<T>& args, const BackwardTask& task, int64_t g, int64_t t,
                                  int64_t key, int64_t D, Right<Unit> keys, float* dq,
                                  const BackwardScratch<Unit>& scratch) {
  const AttentionShape& shape = args.shape;
  const int64_t b = task.b, h = task.h, count = least(kTileQueries, task.queries.end - t);
  const int64_t rows = round_up(count, kStripRows);
  load_rows(args.qkv.at(b, t, h, g), args.qkv.position, count, rows, D, scratch.queries);
  load_rows(args.dout.at(b, t, h, g), args.dout.position, count, rows, D, scratch.dout);
  const int64_t statistics = ((b * shape.kv_heads + h) * shape.group + g) * shape.positions + t;
  for (int64_t row = 0; row < rows; ++row) {  // padding has probability 0
    scratch.lse[row] = row < count ? args.lse[statistics + row] * kLog2E : std::numeric_limits<float>::infinity();
    scratch.delta[row] = row < count ? args.delta[statistics + row] : 0.0f;
  }
  for (int64_t row = 0; row < rows; row += kStripRows) {
    const StripMask mask(shape, b, t + row, least(kStripRows, count - row), key);
    alignas(64) float kept[kStripRows * kTileKeys];
    if (shape.dropout.sample_ids) DropoutRow(shape, b, h, g).strip(t + row, key, kept);
    gradient_strip(row, D, softmax_scale(D) * kLog2E, mask, shape.dropout.sample_ids ? kept : nullptr, scratch);
  }
  const Right<Unit> queries = join_rows(scratch.queries, rows, D, scratch.queries_joined);
  const Right<Unit> dout = join_rows(scratch.dout, rows, D, scratch.dout_joined);
  tile_products(rows, D, shape.causal && t == key, queries, dout, keys, task, dq, scratch);
}

template <class T>
GPTDIST_INLINE void write_rows(const float* sums, float factor, int64_t count, int64_t D, T* to, int64_t stride) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t d = 0; d < D; d += kLanes) store(to + row * stride + d, load(sums + row * D + d) * factor);
  }
}

template <int64_t kHeadDim, class Unit, class T>
GPTDIST_INLINE void backward_task(const AttentionBackward<T>& args, const BackwardTask& task, std::byte* memory) {
  const AttentionShape& shape = args.shape;
  const int64_t D = kHeadDim ? kHeadDim : shape.head_dim, G = shape.group, b = task.b, h = task.h;
  const int64_t first = task.queries.begin, count = task.queries.end - first, padded = round_up(count, kTileQueries);
  const Span seen_keys = keys_of(shape, b, task.queries);
  const Span keys = task.write_dkv ? task.keys : Span{seen_keys.begin / kTileKeys * kTileKeys, seen_keys.end};
  Cutter cut(memory);
  const BackwardScratch<Unit> scratch(cut, G, task.write_dq ? count : 0, D);
  if (task.write_dq) std::memset(scratch.dq, 0, G * padded * D * sizeof(float));

  for (int64_t key = keys.begin; key < keys.end; key += kTileKeys) {
    const int64_t found = least(kTileKeys, shape.positions - key);
    load_rows(args.qkv.at(b, key, h, G), args.qkv.position, found, kTileKeys, D, scratch.keys);
    load_rows(args.qkv.at(b, key, h, G + 1), args.qkv.position, found, kTileKeys, D, scratch.values);
    transpose_rows(scratch.keys, D, scratch.keys_transposed);
    transpose_rows(scratch.values, D, scratch.values_transposed);
    const Right<Unit> joined = join_rows(scratch.keys, kTileKeys, D, scratch.keys_joined);
    std::memset(scratch.dk, 0, kTileKeys * D * sizeof(float));
    std::memset(scratch.dv, 0, kTileKeys * D * sizeof(float));
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t t = shape.causal ? most(first, key) : first; t < task.queries.end; t += kTileQueries) {
        const Span seen = keys_of(shape, b, {t, least(t + kTileQueries, task.queries.end)});
        if (seen.begin >= key + kTileKeys) continue;
        float* dq = task.write_dq ? scratch.dq + (g * padded + t - first) * D : nullptr;
        gradient_tile(args, task, g, t, key, D, joined, dq, scratch);
      }
    }
    if (task.write_dkv) {
      write_rows(scratch.dk, softmax_scale(D), found, D, args.dqkv.at(b, key, h, G), args.dqkv.position);
      write_rows(scratch.dv, 1.0f, found, D, args.dqkv.at(b, key, h, G + 1), args.dqkv.position);
    }
  }
  for (int64_t g = 0; task.write_dq && g < G; ++g) {
    write_rows(scratch.dq + g * padded * D, softmax_scale(D), count, D, args.dqkv.at(b, first, h, g),
               args.dqkv.position);
  }
}

}  // namespace
}  // namespace gptdist::cpu
