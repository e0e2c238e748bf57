// Runs the CPU kernels over shapes with ragged ends, on every instruction set of this processor, on buffers of exactly
// the size that each kernel may touch. Compiled with -fsanitize=address,undefined (tests/test_cpu_sanitize.py), which
// reports what goes wrong. The program itself fails where a result is not finite, or not that of the portable level.
//
// With -DGPTDIST_EMULATED it runs AVX-512's levels on any x86-64: cpu_emulated.cpp takes the place of their files.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/dropout.h"
#include "cpu/few_rows_linear.h"

using namespace gptdist::cpu;

namespace {

float value(const float& x) { return x; }
float value(const Bf16& x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

uint32_t seed;                             // of the next number
std::vector<std::vector<float>> expected;  // all results of the portable level, in their order
size_t checked;                            // results of this level so far

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> found(count);
  for (T& x : found) {
    seed = seed * 1664525u + 1013904223u;
    const float number = float(int32_t(seed)) / 2147483648.0f;
    std::memcpy(&x, reinterpret_cast<const char*>(&number) + sizeof number - sizeof x,
                sizeof x);  // bf16: its upper half
  }
  return found;
}

// What sums in another order may change, of the largest result; and of each result its rounding. Levels with bf16
// products round probabilities and gradients of scores that the others keep in fp32.
constexpr float kSums[] = {1e-5f, 3e-3f}, kRounding[] = {0.0f, 0x1p-7f};  // fp32, bf16

template <class T>
void check(const std::vector<T>& found, const char* what, Isa isa) {
  constexpr int bf16 = std::is_same_v<T, Bf16>;
  std::vector<float> values;
  float largest = 0;
  for (const T& x : found) {
    values.push_back(value(x));
    largest = std::fmax(largest, std::fabs(values.back()));
  }
  if (isa == Isa::kPortable) expected.push_back(values);
  for (size_t i = 0; i < values.size(); ++i) {
    const float wanted = expected[checked][i];
    const float bound = kSums[bf16] * largest + kRounding[bf16] * std::fabs(wanted);
    if (std::isfinite(values[i]) && std::fabs(values[i] - wanted) <= bound) continue;
    std::printf("level %d: %s[%zu] is %g, at the portable level %g\n", int(isa), what, i, values[i], wanted);
    std::exit(1);
  }
  ++checked;
}

struct Scratch {
  explicit Scratch(size_t bytes) : block(static_cast<std::byte*>(std::aligned_alloc(64, bytes)), &std::free) {}
  std::unique_ptr<std::byte, decltype(&std::free)> block;
};

template <class T>
Heads<T> packed(T* data, int64_t positions, int64_t kv_heads, int64_t slots, int64_t D) {
  return {data, positions * kv_heads * slots * D, kv_heads * slots * D, slots * D, D};
}

struct Case {
  int64_t positions, group, head_dim;
  bool causal, documents, dropout;
};

template <class T>
void attention(const Case& c, Isa isa) {
  const int64_t B = 2, T_ = c.positions, H = 2, G = c.group, D = c.head_dim;
  const auto& kernels = attention_kernels<T>(isa);
  std::vector<int32_t> starts(B * T_);
  for (int64_t i = 0; i < B * T_; ++i) starts[i] = int32_t(i % T_ >= T_ / 3 ? T_ / 3 : 0);
  const std::vector<int64_t> ids(B, 7);
  AttentionShape shape{B, T_, H, G, D, c.causal, c.documents ? starts.data() : nullptr, {}, nullptr};
  if (c.dropout) shape.dropout = {ids.data(), 12345, 1u << 30, 4.0f / 3.0f, 1, 3};
  const auto qkv = numbers<T>(B * T_ * H * (G + 2) * D), dout = numbers<T>(B * T_ * H * G * D);
  std::vector<T> out(dout.size()), dqkv(qkv.size());
  std::vector<float> lse(B * H * G * T_), delta(lse.size());
  const AttentionForward<T> forward{shape, packed(qkv.data(), T_, H, G + 2, D), packed(out.data(), T_, H, G, D),
                                    lse.data()};
  const AttentionBackward<T> backward{shape,
                                      packed(dout.data(), T_, H, G, D),
                                      forward.qkv,
                                      packed<const T>(out.data(), T_, H, G, D),
                                      lse.data(),
                                      delta.data(),
                                      packed(dqkv.data(), T_, H, G + 2, D)};
  const auto each_span = [&](int64_t length, const auto& use) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t t = 0; t < T_; t += length) use(b, h, Span{t, t + length < T_ ? t + length : T_});
      }
    }
  };
  each_span(128, [&](int64_t b, int64_t h, Span span) {
    const Scratch scratch(kernels.forward_scratch(shape, span.end - span.begin));
    kernels.forward(forward, {b, h, span}, scratch.block.get());
  });
  each_span(T_, [&](int64_t b, int64_t h, Span span) { kernels.delta(backward, b, h, span); });
  each_span(T_, [&](int64_t b, int64_t h, Span span) {
    const Scratch scratch(kernels.backward_scratch(shape, T_));
    kernels.backward(backward, {b, h, span, span, true, true}, scratch.block.get());
  });
  check(dqkv, "dqkv in one task", isa);
  std::memset(dqkv.data(), 0, dqkv.size() * sizeof(T));
  each_span(64, [&](int64_t b, int64_t h, Span span) {  // the same in parts
    const Scratch dq(kernels.backward_scratch(shape, span.end - span.begin)), dkv(kernels.backward_scratch(shape, 0));
    kernels.backward(backward, {b, h, span, {0, T_}, true, false}, dq.block.get());
    kernels.backward(backward, {b, h, {c.causal ? span.begin : 0, T_}, span, false, true}, dkv.block.get());
  });
  check(out, "out", isa);
  check(lse, "lse", isa);
  check(dqkv, "dqkv in parts", isa);
}

template <class T>
void decode(int64_t queries, int64_t group, int64_t D, int64_t page, Isa isa) {
  const int64_t B = 2, H = 2, width = 600 / page + 1;
  const auto& kernels = attention_kernels<T>(isa);
  const std::vector<int64_t> lengths{0, 600 - queries};
  std::vector<int32_t> table(B * width);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
  const auto q = numbers<T>(B * queries * H * group * D);
  const auto keys = numbers<T>(B * width * page * H * D), values = numbers<T>(keys.size());
  std::vector<T> out(q.size());
  const AttentionShape shape{B, queries, H, group, D, true, nullptr, {}, lengths.data()};
  const auto pages = [&](const std::vector<T>& cache) {
    return Pages<T>{cache.data(), page * H * D, H * D, D, page, table.data(), width};
  };
  const DecodeAttention<T> args{shape, packed(q.data(), queries, H, group, D), pages(keys), pages(values),
                                packed(out.data(), queries, H, group, D)};
  const Scratch scratch(kernels.forward_scratch(shape, queries));
  const auto each_head = [&](const auto& use) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) use(b, h);
    }
  };
  each_head([&](int64_t b, int64_t h) { kernels.decode(args, {b, h, {0, queries}}, scratch.block.get()); });
  check(out, "out of decode_attention", isa);
  std::memset(out.data(), 0, out.size() * sizeof(T));
  each_head([&](int64_t b, int64_t h) {
    const int64_t total = lengths[b] + queries, floats = queries * group * part_floats(D);
    const int64_t count = (total + kSegmentKeys - 1) / kSegmentKeys;
    std::vector<float> parts(count * floats);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * kSegmentKeys, end = begin + kSegmentKeys < total ? begin + kSegmentKeys : total;
      kernels.decode_part(args, b, h, {begin, end}, parts.data() + i * floats);
    }
    kernels.decode_sum(args, b, h, parts.data(), count, floats);
  });
  check(out, "out of decode_attention in parts", isa);
}

template <class T>
void bias_gelu(int64_t rows, int64_t channels, Isa isa) {
  const auto x = numbers<T>(rows * channels), dy = numbers<T>(rows * channels);
  const auto bias = numbers<float>(channels);
  std::vector<T> y(x.size()), dx(x.size());
  std::vector<float> partial(channels);
  for (const float* added : {bias.data(), static_cast<const float*>(nullptr)}) {
    float* sums = added ? partial.data() : nullptr;
    bias_gelu_forward(Forward<T>{x.data(), added, y.data(), rows, channels}, isa);
    bias_gelu_backward(Backward<T>{dy.data(), x.data(), added, dx.data(), sums, rows, channels}, isa);
    check(y, "y", isa);
    check(dx, "dx", isa);
    check(partial, "partial", isa);
  }
}

template <class T>
void dropped(int64_t channels, Isa isa) {
  const auto x = numbers<T>(6 * channels);
  const std::vector<int64_t> ids{1, -2};
  std::vector<T> y(x.size());
  dropout_kernel<T>(isa)(Dropout<T>{x.data(), y.data(), ids.data(), 3, channels, 77, 1u << 30, 5, 9, 2.0f, 0, 6});
  check(y, "y of dropout", isa);
}

template <class T>
void few_rows_linear(int64_t rows, int64_t inputs, int64_t outputs, Isa isa) {
  const auto x = numbers<T>(rows * inputs), weight = numbers<T>(outputs * inputs), bias = numbers<T>(outputs);
  std::vector<T> y(rows * outputs);
  const auto& kernels = few_rows_linear_kernels<T>(isa);
  const Scratch scratch((kernels.packed_bytes(rows, inputs) + 63) / 64 * 64);
  for (const T* added : {bias.data(), static_cast<const T*>(nullptr)}) {
    const FewRowsLinear<T> args{x.data(), weight.data(), added, y.data(), rows, inputs, outputs};
    kernels.pack(args, scratch.block.get());
    const int64_t middle = outputs < 16 ? outputs : 16;
    kernels.outputs(args, scratch.block.get(), middle, outputs);
    kernels.outputs(args, scratch.block.get(), 0, middle);
    check(y, "y of few_rows_linear", isa);
  }
}

template <class T>
void all(Isa isa) {
  for (const Case& c : {Case{1, 1, 16, true, false, false},
                        {7, 2, 48, true, true, true},
                        {64, 1, 64, true, false, true},
                        {131, 2, 80, true, true, false},
                        {200, 1, 128, true, false, false},
                        {70, 3, 256, false, false, true},
                        {131, 1, 64, false, false, false}}) {
    attention<T>(c, isa);
  }
  for (const int64_t queries : {1, 3, 70}) {
    for (const int64_t D : {16, 64, 80}) decode<T>(queries, 2, D, 7, isa);
  }
  for (int64_t rows = 1; rows <= kMaxFewRows; ++rows) {
    for (const int64_t inputs : {1, 32, 77, 1100}) few_rows_linear<T>(rows, inputs, 10 * rows + 1, isa);
  }
  for (const int64_t channels : {1, 15, 16, 33, 1050}) bias_gelu<T>(3, channels, isa);
  for (const int64_t channels : {1, 33, 256, 1030}) dropped<T>(channels, isa);
}

}  // namespace

int main() {
#ifdef GPTDIST_EMULATED
  const bool emulated = true;
#else
  const bool emulated = false;
#endif
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (isa > best_isa() && !(emulated && isa >= Isa::kAvx512)) continue;
    seed = 1;
    checked = 0;
    all<float>(isa);
    all<Bf16>(isa);
    std::printf("level %d\n", int(isa));
  }
}
