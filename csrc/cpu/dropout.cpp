// Dropout by position: y = keep ? x * scale : 0. Its backward is the same function of the gradient.
//
//   keep[b, t, c] = word >= threshold, word c % 4 of Philox4x32-7 with counter (c / 4, row_offset + t,
//   low 32 bits of sample_ids[b], site << 16): gptdist/ops/random.py, bit for bit. A dropped NaN is 0.
//
// Memory, n = batch * positions * channels elements: reads n, writes n; the mask is never stored.
//
// Launch: one call handles whole rows on one thread; ops_cpu_dropout.cpp gives threads ranges of rows.

#include "dropout.h"

#include "philox.h"
#include "vector.h"

namespace gptdist::cpu {
namespace {

constexpr int kCalls = 64;  // of Philox at a time
constexpr int64_t kTile = 4 * kCalls;  // columns

template <class T>
GPTDIST_INLINE void drop(const Dropout<T>& a) {
  for (int64_t row = a.begin; row < a.end; ++row) {
    const T* x = a.x + row * a.channels;
    T* __restrict__ y = a.y + row * a.channels;
    const int64_t b = row / a.positions;
    const uint32_t position = a.row_offset + uint32_t(row - b * a.positions), sample = uint32_t(a.sample_ids[b]);
    for (int64_t first = 0; first < a.channels; first += kTile) {
      uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls], words[kTile];
      for (int i = 0; i < kCalls; ++i) {
        c0[i] = uint32_t(first / 4) + uint32_t(i);
        c1[i] = position;
        c2[i] = sample;
        c3[i] = a.site << 16;
      }
      philox4x32(c0, c1, c2, c3, a.key);
      for (int i = 0; i < kCalls; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
      }
      const int64_t count = a.channels - first < kTile ? a.channels - first : kTile;
      GPTDIST_INDEPENDENT
      for (int64_t c = 0; c < count; ++c) {
        const float scaled = load(x + first + c) * a.scale;
        store(y + first + c, words[c] >= a.threshold ? scaled : 0.0f);
      }
    }
  }
}

GPTDIST_FOR_EACH_ISA(drop)

}  // namespace

void dropout(const Dropout<float>& args, Isa isa) { drop_at(args, isa); }
void dropout(const Dropout<Bf16>& args, Isa isa) { drop_at(args, isa); }

}  // namespace gptdist::cpu
