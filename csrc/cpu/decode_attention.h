// decode_attention on a CPU. Included by simd_*.cpp after attention_forward.h, whose mathematics it shares.
//
// Many queries (a prompt) are the forward's tasks over tiles of keys gathered from the pages. Few queries of a kv head
// are bound by the memory that k and v are read from: 4, 2 or 1 at a time are taken over kSegmentKeys keys,
//
//   x[r, s] = q[r] . k[s],   P = 2^(x - m),   part[r] = { sum_s P[r, s] v[s], m, sum_s P[r, s] }
//
// where the first of them brings the segment into the second-level cache. A second pass adds a query's parts, in
// ascending order: bits do not depend on the number of threads.
//
// Memory: reads k and v of the context once, and 4 (D + 2) bytes a query and segment written and read back.

namespace gptdist::cpu {
namespace {

// Queries of a kv head, one for each position and head of the group.
template <class T>
struct QueryRows {
  const DecodeAttention<T>& args;
  int64_t b, h, first;

  const T* at(int64_t r) const {
    const int64_t G = args.shape.group, row = first + r;
    return args.queries.at(b, row / G, h, row % G);
  }
  int64_t seen(int64_t r) const { return args.shape.lengths[b] + (first + r) / args.shape.group + 1; }
};

// scores[r][s - begin] = q[r] . k[s]
template <int kRows, class T>
GPTDIST_INLINE void segment_scores(const QueryRows<T>& queries, Span keys, float (*scores)[kSegmentKeys]) {
  const int64_t D = queries.args.shape.head_dim;
  alignas(64) float q[kRows][kMaxHeadDim];
  for (int r = 0; r < kRows; ++r) copy_row(queries.at(r), D, q[r]);
  const Pages<T>& pages = queries.args.keys;
  for_rows(pages, queries.b, queries.h, keys, D, [&](const T* row, int64_t i) GPTDIST_LAMBDA {
    Floats sums[kRows] = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const Floats key = load(row + d);
      for (int r = 0; r < kRows; ++r) sums[r] += load(q[r] + d) * key;
    }
    for (int r = 0; r < kRows; ++r) scores[r][i] = sum(sums[r]);
  });
}

// Scores to probabilities relative to their maximum; what lies beyond `seen` and `count` becomes 0. Returns the sum.
GPTDIST_INLINE float segment_softmax(float* scores, int64_t count, int64_t seen, float scale, float* maximum) {
  const int64_t padded = round_up(count, kLanes);
  for (int64_t s = most(0, least(seen, count)); s < padded; ++s) scores[s] = -std::numeric_limits<float>::infinity();
  Floats top = broadcast(kNoMaximum), total{};
  for (int64_t s = 0; s < padded; s += kLanes) top = larger(load(scores + s), top);
  *maximum = largest(top) * scale;
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Floats p = exp2(load(scores + s) * scale - *maximum);
    total += p;
    store(scores + s, p);
  }
  return sum(total);
}

// to[r][d] = sum_s P[r, s] v[s][d] for kVectors vectors of d
template <int kRows, int kVectors, class T>
GPTDIST_INLINE void weighted_values(const QueryRows<T>& queries, Span keys, const float (*scores)[kSegmentKeys],
                                    int64_t d, float* to, int64_t to_row) {
  Floats sums[kRows][kVectors] = {};
  const Pages<T>& pages = queries.args.values;
  for_rows(pages, queries.b, queries.h, keys, queries.args.shape.head_dim,
           [&](const T* row, int64_t i) GPTDIST_LAMBDA {
             for (int v = 0; v < kVectors; ++v) {
               const Floats value = load(row + d + v * kLanes);
               for (int r = 0; r < kRows; ++r) sums[r][v] += broadcast(scores[r][i]) * value;
             }
           });
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(to + r * to_row + d + v * kLanes, sums[r][v]);
  }
}

template <int kRows, class T>
GPTDIST_INLINE void part_of_rows(const QueryRows<T>& queries, Span keys, float* parts) {
  const int64_t D = queries.args.shape.head_dim, row = part_floats(D);
  alignas(64) float scores[kRows][kSegmentKeys];
  segment_scores<kRows>(queries, keys, scores);
  for (int r = 0; r < kRows; ++r) {
    float* statistics = parts + r * row + D;
    const int64_t seen = queries.seen(r) - keys.begin;
    statistics[1] = segment_softmax(scores[r], keys.end - keys.begin, seen, softmax_scale(D) * kLog2E, statistics);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) weighted_values<kRows, 4>(queries, keys, scores, d, parts, row);
  for (; d < D; d += kLanes) weighted_values<kRows, 1>(queries, keys, scores, d, parts, row);
}

template <class T>
GPTDIST_INLINE void decode_segment(const DecodeAttention<T>& args, int64_t b, int64_t h, Span keys, float* parts) {
  const int64_t rows = args.shape.positions * args.shape.group, floats = part_floats(args.shape.head_dim);
  for (int64_t r = 0; r < rows;) {
    const QueryRows<T> queries{args, b, h, r};
    const int64_t left = rows - r;
    if (left >= 4) part_of_rows<4>(queries, keys, parts + r * floats);
    else if (left >= 2) part_of_rows<2>(queries, keys, parts + r * floats);
    else part_of_rows<1>(queries, keys, parts + r * floats);
    r += left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

// out of kVectors vectors of channels from d: sum_i 2^(m_i - m) part_i[d] / sum_i 2^(m_i - m) part_i[D + 1]
template <int kVectors, class T>
GPTDIST_INLINE void sum_channels(const float* parts, int64_t count, int64_t stride, int64_t D, float maximum, int64_t d,
                                 T* out) {
  Floats sums[kVectors] = {}, denominator{};
  for (int64_t i = 0; i < count; ++i) {
    const float* part = parts + i * stride;
    const Floats factor = exp2(broadcast(part[D] - maximum));
    denominator += factor * part[D + 1];
    for (int v = 0; v < kVectors; ++v) sums[v] += factor * load(part + d + v * kLanes);
  }
  const Floats scale = 1.0f / denominator;
  for (int v = 0; v < kVectors; ++v) store(out + d + v * kLanes, sums[v] * scale);
}

template <class T>
GPTDIST_INLINE void sum_parts(const DecodeAttention<T>& args, int64_t b, int64_t h, const float* parts, int64_t count,
                              int64_t stride) {
  const int64_t D = args.shape.head_dim, G = args.shape.group;
  for (int64_t row = 0; row < args.shape.positions * G; ++row) {
    const float* first = parts + row * part_floats(D);
    float maximum = kNoMaximum;
    for (int64_t i = 0; i < count; ++i) maximum = first[i * stride + D] > maximum ? first[i * stride + D] : maximum;
    T* out = args.out.at(b, row / G, h, row % G);
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) sum_channels<4>(first, count, stride, D, maximum, d, out);
    for (; d < D; d += kLanes) sum_channels<1>(first, count, stride, D, maximum, d, out);
  }
}

}  // namespace
}  // namespace gptdist::cpu
