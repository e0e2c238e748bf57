// few_rows_linear on a CPU. Included by simd_kernels.h after attention_tiles.h, whose units it computes in.
//
//   y[r, o] = sum_i x[r, i] weight[o, i] + bias[o]        up to kMaxFewRows rows r
//
// With so few rows all time goes into reading the weight. Each row of it is read once, from memory straight into
// registers, for all rows of x: a block of rows side by side, while the next block is asked for. Every y has one vector
// of fp32 sums, whose lanes are added in a fixed order at the end: its bits depend neither on the number of threads nor
// on how many rows or outputs stand beside it.
//
// Memory: reads the weight and x once (x, packed and padded with zeros, from a cache after that), writes y.

namespace gptdist::cpu {
namespace {

constexpr int kTileOutputs = 16;  // y is rounded and written in tiles of so many, whole vectors

template <class Unit>
constexpr int64_t kVectorElements = kLanes * kStepElements<Unit>;

// Rows of a block: its sums stay in registers, 16 vectors, or 8 where there are 16 registers.
template <int kRows>
constexpr int kBlock = kLanes == 16 ? (kRows > 4 ? 2 : 4) : (kRows > 4 ? 1 : kRows > 2 ? 2 : 4);

// A vector of units of the weight or of x.
template <class Unit, class T>
GPTDIST_INLINE auto load_vector(const T* from) {
  if constexpr (std::is_same_v<Unit, float>) return load(from);
  else return load_units(reinterpret_cast<const Unit*>(from));
}

// sums[o][r] of kCount rows of the weight; those at `next` are read after them.
template <class Unit, int kRows, int kCount, class T>
GPTDIST_INLINE void block_sums(const Unit* x, const T* weight, const T* next, int64_t inputs,
                               Floats (&sums)[kCount][kRows]) {
  constexpr int64_t kVector = kVectorElements<Unit>, kLine = 64 / sizeof(T);
  const auto add = [&](const T* from, int64_t row) GPTDIST_LAMBDA {
    decltype(load_vector<Unit>(from)) weights[kCount];
    for (int o = 0; o < kCount; ++o) weights[o] = load_vector<Unit>(from + o * row);
    for (int r = 0; r < kRows; ++r, x += kLanes) {
      const auto factor = load_units(x);
      for (int o = 0; o < kCount; ++o) sums[o][r] = multiply_add(factor, weights[o], sums[o][r]);
    }
  };
  int64_t i = 0;
  for (; i + kVector <= inputs; i += kVector) {
    if (kVector >= kLine || i % kLine == 0) {
      for (int o = 0; o < kCount; ++o) __builtin_prefetch(next + o * inputs + i);
    }
    add(weight + i, inputs);
  }
  if (i == inputs) return;
  alignas(64) T rest[kCount * kVector] = {};
  for (int o = 0; o < kCount; ++o) std::memcpy(rest + o * kVector, weight + o * inputs + i, (inputs - i) * sizeof(T));
  add(rest, kVector);
}

// tile[r][o] of kCount outputs from `first`.
template <class Unit, int kRows, int kCount, class T>
GPTDIST_INLINE void block(const FewRowsLinear<T>& args, const Unit* x, int64_t first, int64_t end, float* tile) {
  const T* weight = args.weight + first * args.inputs;
  Floats sums[kCount][kRows] = {};
  block_sums<Unit>(x, weight, first + 2 * kCount <= end ? weight + kCount * args.inputs : weight, args.inputs, sums);
  for (int o = 0; o < kCount; ++o) {
    for (int r = 0; r < kRows; ++r) tile[r * kTileOutputs + o] = sum(sums[o][r]);
  }
}

// y of `count` outputs from `first`: tile + bias, rounded.
template <int kRows, class T>
GPTDIST_INLINE void write_tile(const FewRowsLinear<T>& args, const float* tile, int64_t first, int64_t count) {
  alignas(64) T bias[kTileOutputs] = {}, y[kTileOutputs];
  if (args.bias != nullptr) std::memcpy(bias, args.bias + first, count * sizeof(T));
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kTileOutputs; o += kLanes) store(y + o, load(tile + r * kTileOutputs + o) + load(bias + o));
    std::memcpy(args.y + r * args.outputs + first, y, count * sizeof(T));
  }
}

template <class Unit, int kRows, class T>
GPTDIST_INLINE void few_rows_outputs(const FewRowsLinear<T>& args, const Unit* x, int64_t begin, int64_t end) {
  constexpr int kCount = kBlock<kRows>;
  for (int64_t first = begin; first < end; first += kTileOutputs) {
    const int64_t count = least(kTileOutputs, end - first);
    alignas(64) float tile[kRows * kTileOutputs] = {};
    int64_t o = 0;
    for (; o + kCount <= count; o += kCount) block<Unit, kRows, kCount>(args, x, first + o, end, tile + o);
    for (; o < count; ++o) block<Unit, kRows, 1>(args, x, first + o, end, tile + o);
    write_tile<kRows>(args, tile, first, count);
  }
}

// Unit: what T is computed in.
template <class T, class Unit>
struct LinearKernels {
  static size_t packed_bytes(int64_t rows, int64_t inputs) {
    return rows * round_up(inputs, kVectorElements<Unit>) / kStepElements<Unit> * sizeof(Unit);
  }

  // x as [vectors of inputs][rows][kLanes] units, zeros beyond the inputs
  static void pack(const FewRowsLinear<T>& args, std::byte* packed) {
    constexpr int64_t kVector = kVectorElements<Unit>;
    Unit* to = reinterpret_cast<Unit*>(packed);
    for (int64_t i = 0; i < args.inputs; i += kVector) {
      for (int64_t r = 0; r < args.rows; ++r, to += kLanes) {
        alignas(64) T elements[kVector] = {};
        std::memcpy(elements, args.x + r * args.inputs + i, least(kVector, args.inputs - i) * sizeof(T));
        copy_row(elements, kVector, to);
      }
    }
  }

  static void outputs(const FewRowsLinear<T>& args, const std::byte* packed, int64_t begin, int64_t end) {
    const Unit* x = reinterpret_cast<const Unit*>(packed);
    switch (args.rows) {
      case 1: return few_rows_outputs<Unit, 1>(args, x, begin, end);
      case 2: return few_rows_outputs<Unit, 2>(args, x, begin, end);
      case 3: return few_rows_outputs<Unit, 3>(args, x, begin, end);
      case 4: return few_rows_outputs<Unit, 4>(args, x, begin, end);
      case 5: return few_rows_outputs<Unit, 5>(args, x, begin, end);
      case 6: return few_rows_outputs<Unit, 6>(args, x, begin, end);
      case 7: return few_rows_outputs<Unit, 7>(args, x, begin, end);
      case 8: return few_rows_outputs<Unit, 8>(args, x, begin, end);
    }
  }

  static constexpr FewRowsLinearKernels<T> table() { return {packed_bytes, pack, outputs}; }
};

}  // namespace
}  // namespace gptdist::cpu
