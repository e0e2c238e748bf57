// Dropout by position: y = keep ? x * scale : 0. Its backward is the same function of the gradient. Included by
// simd_kernels.h after philox.h.
//
//   keep[b, t, c] = word >= threshold, word c % 4 of Philox4x32-7 with counter (c / 4, row_offset + t,
//   low 32 bits of sample_ids[b], site << 16): gptdist/ops/random.py, bit for bit. A dropped NaN is 0.
//
// Memory, n = batch * positions * channels elements: reads n, writes n; the mask is never stored.
//
// Launch: one call handles whole rows on one thread; ops_cpu_dropout.cpp gives threads ranges of rows.

namespace gptdist::cpu {
namespace {

template <class T>
GPTDIST_INLINE void drop(const T* x, Words words, const Dropout<T>& args, T* y) {
  store(y, words >= args.threshold ? load(x) * args.scale : broadcast(0.0f));
}

template <class T>
void dropout_rows(const Dropout<T>& args) {
  for (int64_t row = args.begin; row < args.end; ++row) {
    const int64_t b = row / args.positions, first = row * args.channels;
    const uint32_t position = args.row_offset + uint32_t(row - b * args.positions);
    for (int64_t column = 0; column < args.channels; column += kColumnsAtOnce) {
      Words words[4];
      random_words(uint32_t(column / 4), position, uint32_t(args.sample_ids[b]), args.site << 16, args.key, words);
      for (int m = 0; m < 4; ++m) {
        const int64_t c = column + m * kLanes, left = args.channels - c;
        if (left >= kLanes) {
          drop(args.x + first + c, words[m], args, args.y + first + c);
        } else if (left > 0) {
          T values[kLanes] = {};
          std::memcpy(values, args.x + first + c, left * sizeof(T));
          drop(values, words[m], args, values);
          std::memcpy(args.y + first + c, values, left * sizeof(T));
        }
      }
    }
  }
}

}  // namespace
}  // namespace gptdist::cpu
