// Where the tasks of attention and of decode_attention find q and a tile of k (slot 0) or v (slot 1), and put L.
// Included by simd_*.cpp after attention_tiles.h.

namespace gptdist::cpu {
namespace {

// attention: one packed tensor

template <class T>
GPTDIST_INLINE const Heads<const T>& queries_of(const AttentionForward<T>& args) {
  return args.qkv;
}

template <class T, class Unit>
GPTDIST_INLINE void load_tile(const AttentionForward<T>& args, int64_t b, int64_t h, int64_t slot, Span keys,
                              int64_t D, Unit* to) {
  const T* first = args.qkv.at(b, keys.begin, h, args.shape.group + slot);
  load_rows(first, args.qkv.position, keys.end - keys.begin, kTileKeys, D, to);
}

template <class T>
GPTDIST_INLINE float* lse_of(const AttentionForward<T>& args, int64_t b, int64_t h, int64_t g) {
  return args.lse + ((b * args.shape.kv_heads + h) * args.shape.group + g) * args.shape.positions;
}

// decode_attention: pages

// Calls use(first row, position, count) for runs of positions that lie one after the other in a page.
template <class T, class Use>
GPTDIST_INLINE void for_runs(const Pages<T>& pages, int64_t b, int64_t h, Span keys, const Use& use) {
  for (int64_t s = keys.begin; s < keys.end;) {
    const int64_t count = least(pages.page_size - s % pages.page_size, keys.end - s);
    use(pages.at(b, s, h), s, count);
    s += count;
  }
}

// Calls use(row, index) for each position of `keys`, and asks for the rows to come: a head's rows lie apart, in pages
// that lie anywhere, which no processor foresees. (8192 positions of 12 heads of 64 in bf16, on a Zen 4: 6.3 ms
// without, 3.6 with; 12 rows ahead do no better, 24 worse.)
template <class T, class Use>
GPTDIST_INLINE void for_rows(const Pages<T>& pages, int64_t b, int64_t h, Span keys, int64_t D, const Use& use) {
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
  for_runs(pages, b, h, keys, [&](const T* rows, int64_t s, int64_t count) GPTDIST_LAMBDA {
    const T* next = s + count < keys.end ? pages.at(b, s + count, h) : rows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t ahead = i + kAhead;
      const T* later = ahead < count ? rows + ahead * pages.slot : next + least(ahead - count, count - 1) * pages.slot;
      for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(later + d);
      use(rows + i * pages.slot, s - keys.begin + i);
    }
  });
}

template <class T>
GPTDIST_INLINE const Heads<const T>& queries_of(const DecodeAttention<T>& args) {
  return args.queries;
}

template <class T, class Unit>
GPTDIST_INLINE void load_tile(const DecodeAttention<T>& args, int64_t b, int64_t h, int64_t slot, Span keys, int64_t D,
                              Unit* to) {
  const int64_t units = row_units<Unit>(D);
  const Pages<T>& pages = slot == 0 ? args.keys : args.values;
  for_runs(pages, b, h, keys, [&](const T* rows, int64_t s, int64_t count) GPTDIST_LAMBDA {
    const int64_t at = s - keys.begin;
    const bool last = s + count == keys.end;
    load_rows(rows, pages.slot, count, last ? kTileKeys - at : count, D, to + at * units);
  });
}

template <class T>
GPTDIST_INLINE float* lse_of(const DecodeAttention<T>&, int64_t, int64_t, int64_t) {
  return nullptr;
}

}  // namespace
}  // namespace gptdist::cpu
