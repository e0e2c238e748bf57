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

// Outputs whose sums are kept while x is walked in blocks of inputs, rounded and written together: whole blocks of rows.
constexpr int kTileOutputs = 24;

// Bytes of x that a block of inputs may take in the first-level cache.
constexpr int64_t kFactorBytes = 16 << 10;

// Bytes of the weight between what is computed and what is asked for.
constexpr int64_t kAheadBytes = 12 << 10;

template <class Unit>
constexpr int64_t kVectorElements = kLanes * kStepElements<Unit>;

// Rows of x at once, and rows of the weight beside them: their sums stay in registers, up to 24 of 32, or 12 of 16.
template <int kRows>
constexpr int kRowsAtOnce = kLanes == 16 || kRows <= 4 ? kRows : 4;
template <int kRows>
constexpr int kOutputsAtOnce = (kLanes == 16 ? kRows > 4 : kRows > 3) ? 3 : 4;

template <class Unit>
GPTDIST_INLINE int64_t block_inputs(int64_t rows) {
  return kFactorBytes / (rows * int64_t(sizeof(Unit)) * kLanes) * kVectorElements<Unit>;
}

// A vector of units of the weight or of x.
template <class Unit, class T>
GPTDIST_INLINE auto load_vector(const T* from) {
  if constexpr (std::is_same_v<Unit, float>) return load(from);
  else return load_units(reinterpret_cast<const Unit*>(from));
}

// Adds the products with `count` inputs to kRows x kCount sums. x: vectors of the same row are x_row units apart, those
// of the weight's rows `inputs`; sums: [kCount][all rows]. What lies at `next` is asked for.
template <class Unit, int kRows, int kCount, class T>
GPTDIST_INLINE void add_products(const Unit* x, int64_t x_row, const T* weight, int64_t inputs, int64_t count,
                                 const T* next, Floats* sums, int64_t rows) {
  constexpr int64_t kVector = kVectorElements<Unit>, kLine = 64 / sizeof(T);
  Floats held[kCount][kRows];
  for (int o = 0; o < kCount; ++o) {
    for (int r = 0; r < kRows; ++r) held[o][r] = sums[o * rows + r];
  }
  const auto add = [&](const T* from, int64_t row) GPTDIST_LAMBDA {
    decltype(load_vector<Unit>(from)) weights[kCount];
    for (int o = 0; o < kCount; ++o) weights[o] = load_vector<Unit>(from + o * row);
    for (int r = 0; r < kRows; ++r) {
      const auto factor = load_units(x + r * kLanes);
      for (int o = 0; o < kCount; ++o) held[o][r] = multiply_add(factor, weights[o], held[o][r]);
    }
    x += x_row;
  };
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    if (kVector >= kLine || i % kLine == 0) {
      for (int o = 0; o < kCount; ++o) __builtin_prefetch(next + o * inputs + i);
    }
    add(weight + i, inputs);
  }
  if (i < count) {
    alignas(64) T rest[kCount * kVector] = {};
    for (int o = 0; o < kCount; ++o) std::memcpy(rest + o * kVector, weight + o * inputs + i, (count - i) * sizeof(T));
    add(rest, kVector);
  }
  for (int o = 0; o < kCount; ++o) {
    for (int r = 0; r < kRows; ++r) sums[o * rows + r] = held[o][r];
  }
}

// The same for all kRows rows of x. With few registers the weight's are read a second time, from the first-level cache.
template <class Unit, int kRows, int kCount, class T>
GPTDIST_INLINE void add_all_products(const Unit* x, const T* weight, int64_t inputs, int64_t count, const T* next,
                                     Floats* sums) {
  constexpr int kFirst = kRowsAtOnce<kRows>, kSecond = kRows - kFirst;
  add_products<Unit, kFirst, kCount>(x, kRows * kLanes, weight, inputs, count, next, sums, kRows);
  if constexpr (kSecond > 0) {
    add_products<Unit, kSecond, kCount>(x + kFirst * kLanes, kRows * kLanes, weight, inputs, count, next,
                                        sums + kFirst, kRows);
  }
}

// y of `count` outputs from `first`: the sums' lanes and the bias added, rounded.
template <int kRows, class T>
GPTDIST_INLINE void write_outputs(const FewRowsLinear<T>& args, const Floats* sums, int64_t first, int64_t count) {
  constexpr int kPadded = round_up(kTileOutputs, kLanes);
  alignas(64) T bias[kPadded] = {}, y[kPadded];
  if (args.bias != nullptr) std::memcpy(bias, args.bias + first, count * sizeof(T));
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float row[kPadded] = {};
    for (int64_t o = 0; o < count; ++o) row[o] = sum(sums[o * kRows + r]);
    for (int o = 0; o < kPadded; o += kLanes) store(y + o, load(row + o) + load(bias + o));
    std::memcpy(args.y + r * args.outputs + first, y, count * sizeof(T));
  }
}

template <class Unit, int kRows, class T>
GPTDIST_INLINE void few_rows_outputs(const FewRowsLinear<T>& args, const Unit* x, int64_t begin, int64_t end) {
  constexpr int kCount = kOutputsAtOnce<kRows>;
  const int64_t step = block_inputs<Unit>(kRows), inputs = args.inputs;
  const int64_t ahead = round_up(kAheadBytes / (least(step, inputs) * sizeof(T)) + 1, kCount);
  for (int64_t first = begin; first < end; first += kTileOutputs) {
    const int64_t count = least(kTileOutputs, end - first);
    Floats sums[kTileOutputs * kRows] = {};
    for (int64_t i = 0; i < inputs; i += step) {
      const Unit* factors = x + i / kVectorElements<Unit> * kRows * kLanes;
      const T* weight = args.weight + first * inputs + i;
      const int64_t length = least(step, inputs - i);
      int64_t o = 0;
      for (; o + kCount <= count; o += kCount) {
        const T* next = first + o + ahead + kCount <= end ? weight + (o + ahead) * inputs : weight;
        add_all_products<Unit, kRows, kCount>(factors, weight + o * inputs, inputs, length, next, sums + o * kRows);
      }
      for (; o < count; ++o) {
        add_all_products<Unit, kRows, 1>(factors, weight + o * inputs, inputs, length, weight, sums + o * kRows);
      }
    }
    write_outputs<kRows>(args, sums, first, count);
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
