// attention on the CPU: argument checks, outputs, threads. Kernels: cpu/attention.h.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "ops_cpu.h"

namespace gptdist {


namespace {

using namespace cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// arguments

std::string shape_name(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

void check_shape(const Tensor& x, const char* name, const std::vector<int64_t>& wanted, const char* symbols) {
  bool same = x.dim() == int64_t(wanted.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == wanted[i];
  std::string text;
  for (int64_t size : wanted) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(same, "attention: ", name, " has shape ", shape_name(x), ", expected ", symbols, " = (", text, ")");
}

void check_type(const Tensor& x, const char* name, ScalarType wanted, const char* type) {
  STD_TORCH_CHECK(x.scalar_type() == wanted, "attention: ", name, " has another dtype than the expected ", type);
  STD_TORCH_CHECK(x.is_cpu(), "attention: ", name, " is on another device, expected cpu");
}

// The data of a contiguous tensor.
template <class U>
U* contiguous(const Tensor& x, const char* name, ScalarType wanted, const char* type) {
  check_type(x, name, wanted, type);
  STD_TORCH_CHECK(x.is_contiguous(), "attention: ", name, " is not contiguous: copy it");
  return static_cast<U*>(x.data_ptr());
}

// (B, T, Hkv, slots, D), of which D alone must be contiguous.
template <class U>
Heads<U> heads(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.stride(4) == 1 || x.size(4) <= 1, "attention: the last dimension of ", name, " has stride ", x.stride(4),
                  ", expected 1: copy it");
  return {static_cast<U*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

struct Dropout {
  double p;
  const std::optional<Tensor>&key, &sample_ids;
  int64_t site, head_offset;
};

AttentionDropout dropout_of(const Dropout& dropout, int64_t B, int64_t heads) {
  STD_TORCH_CHECK(dropout.p >= 0.0 && dropout.p < 1.0, "attention: dropout probability is ", dropout.p,
                  ", expected 0 <= p < 1");
  if (dropout.p == 0.0) return {};
  STD_TORCH_CHECK(dropout.key && dropout.sample_ids, "attention: dropout needs key and sample_ids");
  STD_TORCH_CHECK(dropout.site >= 0 && dropout.site < 1 << 16, "attention: site is ", dropout.site,
                  ", expected 0 <= site < 65536");
  STD_TORCH_CHECK(dropout.head_offset >= 0 && dropout.head_offset + heads <= 1 << 16, "attention: head_offset is ",
                  dropout.head_offset, ", expected no head beyond 65535");
  STD_TORCH_CHECK(dropout.key->numel() == 1, "attention: key has ", dropout.key->numel(), " elements, expected one");
  check_shape(*dropout.sample_ids, "sample_ids", {B}, "(B)");
  AttentionDropout found{};
  found.sample_ids = contiguous<const int64_t>(*dropout.sample_ids, "sample_ids", ScalarType::Long, "int64");
  found.key = uint64_t(*contiguous<const int64_t>(*dropout.key, "key", ScalarType::Long, "int64"));
  found.threshold = uint32_t(dropout.p * 4294967296.0);
  found.factor = float(1.0 / (1.0 - dropout.p));
  found.site = int32_t(dropout.site);
  found.head_offset = int32_t(dropout.head_offset);
  return found;
}

AttentionShape shape_of(const Tensor& qkv, bool causal, const std::optional<Tensor>& doc_start, const Dropout& dropout) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(3) >= 3, "attention: qkv has shape ", shape_name(qkv),
                  ", expected (B, T, Hkv, G+2, D) with G >= 1");
  const ScalarType type = qkv.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "attention: qkv has another dtype than the expected float32 or bfloat16");
  const int64_t D = qkv.size(4);
  STD_TORCH_CHECK(D > 0 && D <= kMaxHeadDim && D % kHeadDimStep == 0, "attention: qkv has D=", D,
                  ", expected a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim);
  STD_TORCH_CHECK(qkv.size(1) <= INT_MAX, "attention: qkv has T=", qkv.size(1), ", expected at most ", INT_MAX);
  AttentionShape shape{qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) - 2, D, causal, nullptr, {}};
  if (doc_start) {
    STD_TORCH_CHECK(causal, "attention: doc_start is given, but causal is false");
    check_shape(*doc_start, "doc_start", {shape.batch, shape.positions}, "(B, T)");
    shape.doc_start = contiguous<const int32_t>(*doc_start, "doc_start", ScalarType::Int, "int32");
  }
  shape.dropout = dropout_of(dropout, shape.batch, shape.kv_heads * shape.group);
  return shape;
}

// threads

// Scratch memory that stays with its thread: allocated once, and again where a larger task comes.
std::byte* scratch(size_t bytes) {
  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };
  static thread_local std::unique_ptr<std::byte, Free> block;
  static thread_local size_t held = 0;
  if (bytes > held) {
    block.reset();
    held = 0;
    block.reset(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
    if (!block) throw std::bad_alloc();
    held = bytes;
  }
  return block.get();
}

// Multiplications worth a thread's while: some 30 microseconds.
constexpr double kProductsPerThread = 1 << 21;

int64_t threads_for(double products) {
  return std::clamp(int64_t(products / kProductsPerThread), int64_t(1), int64_t(torch::stable::get_num_threads()));
}

// Calls run(i) for every task. Threads take the next one when they are done, so the longest should come first; each task
// owns what it writes.
template <class Run>
void run_tasks(int64_t tasks, int64_t threads, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(i);
  });
}

// Scores that are computed, times D.
double score_products(const AttentionShape& shape) {
  const double scores = double(shape.batch) * shape.kv_heads * shape.group * shape.positions * shape.positions;
  return scores * shape.head_dim * (shape.causal ? 0.5 : 1.0);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Spans of a sequence, the last one first: it sees the most keys.
struct Spans {
  int64_t positions, length;

  int64_t count() const { return ceil_div(positions, length); }
  Span operator[](int64_t i) const {
    const int64_t begin = (count() - 1 - i) * length;
    return {begin, std::min(begin + length, positions)};
  }
};

// Positions of a forward task: 256, for which a tile of keys is packed once; fewer where threads would idle. Its bits do
// not depend on it.
Spans forward_spans(const AttentionShape& shape, int64_t threads) {
  int64_t length = 4 * kTileQueries;
  while (length > kTileQueries && shape.batch * shape.kv_heads * ceil_div(shape.positions, length) < 4 * threads) length /= 2;
  return {shape.positions, length};
}

// forward

template <class T>
void forward(const AttentionForward<T>& args) {
  const AttentionShape& shape = args.shape;
  const AttentionKernels<T>& kernels = attention_kernels<T>(cpu::active_isa());
  const int64_t threads = threads_for(2 * score_products(shape)), pairs = shape.batch * shape.kv_heads;
  const Spans spans = forward_spans(shape, threads);
  const size_t bytes = kernels.forward_scratch(shape, std::min(spans.length, shape.positions));
  run_tasks(pairs * spans.count(), threads, [&](int64_t i) {
    const int64_t pair = i % pairs;
    kernels.forward(args, {pair / shape.kv_heads, pair % shape.kv_heads, spans[i / pairs]}, scratch(bytes));
  });
}

template <class T>
void forward_of(const AttentionShape& shape, const Tensor& qkv, const Tensor& out, const Tensor& lse) {
  forward<T>({shape, heads<const T>(qkv, "qkv"), heads<T>(out, "out"), static_cast<float*>(lse.data_ptr())});
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, bool causal, const std::optional<Tensor>& doc_start, double p,
                                         const std::optional<Tensor>& key, const std::optional<Tensor>& sample_ids,
                                         int64_t site, int64_t head_offset) {
  const AttentionShape shape = shape_of(qkv, causal, doc_start, {p, key, sample_ids, site, head_offset});
  const int64_t B = shape.batch, T = shape.positions, H = shape.kv_heads, G = shape.group;
  Tensor out = torch::stable::new_empty(qkv, {B, T, H, G, shape.head_dim});
  Tensor lse = torch::stable::new_empty(qkv, {B, H, G, T}, ScalarType::Float);
  if (qkv.numel() == 0) return {out, lse};
  const bool fp32 = qkv.scalar_type() == ScalarType::Float;
  fp32 ? forward_of<float>(shape, qkv, out, lse) : forward_of<Bf16>(shape, qkv, out, lse);
  return {out, lse};
}

// backward

// fp32 sums of dq that a task which has all queries may hold.
constexpr int64_t kMostDq = 1 << 21;

// One kind of task computes dq, dk and dv of a kv head with five products. Two kinds, dq of some positions (three
// products) and dk, dv of a tile of keys (four), are more work in smaller parts.
bool split_backward(const AttentionShape& shape, int64_t threads) {
  const int64_t pairs = shape.batch * shape.kv_heads;
  return shape.group * shape.positions * shape.head_dim > kMostDq ||
         5.0 * ceil_div(pairs, threads) > 7.0 * double(pairs) / double(threads);
}

template <class T>
void backward(const AttentionBackward<T>& args) {
  const AttentionShape& shape = args.shape;
  const AttentionKernels<T>& kernels = attention_kernels<T>(cpu::active_isa());
  const int64_t threads = threads_for(5 * score_products(shape)), pairs = shape.batch * shape.kv_heads;
  const Span all{0, shape.positions};
  const Spans queries = forward_spans(shape, threads), keys{shape.positions, kTileKeys};
  run_tasks(pairs * queries.count(), threads, [&](int64_t i) {
    kernels.delta(args, i % pairs / shape.kv_heads, i % pairs % shape.kv_heads, queries[i / pairs]);
  });
  if (!split_backward(shape, threads)) {
    const size_t bytes = kernels.backward_scratch(shape, shape.positions);
    run_tasks(pairs, threads, [&](int64_t i) {
      kernels.backward(args, {i / shape.kv_heads, i % shape.kv_heads, all, all, true, true}, scratch(bytes));
    });
    return;
  }
  const size_t bytes = kernels.backward_scratch(shape, std::min(queries.length, shape.positions));
  const int64_t dkv_tasks = pairs * keys.count();
  run_tasks(dkv_tasks + pairs * queries.count(), threads, [&](int64_t i) {
    const bool dkv = i < dkv_tasks;
    const int64_t at = dkv ? i : i - dkv_tasks, b = at % pairs / shape.kv_heads, h = at % pairs % shape.kv_heads;
    BackwardTask task{b, h, all, all, !dkv, dkv};
    if (dkv) {  // the first tile of keys is seen by the most queries
      task.keys = keys[keys.count() - 1 - at / pairs];
      if (shape.causal) task.queries.begin = task.keys.begin;
    } else {
      task.queries = queries[at / pairs];
    }
    kernels.backward(args, task, scratch(bytes));
  });
}

template <class T>
void backward_of(const AttentionShape& shape, const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                 const Tensor& delta, const Tensor& dqkv) {
  backward<T>({shape, heads<const T>(dout, "dout"), heads<const T>(qkv, "qkv"), heads<const T>(out, "out"),
               static_cast<const float*>(lse.data_ptr()), static_cast<float*>(delta.data_ptr()), heads<T>(dqkv, "dqkv")});
}

Tensor attention_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, bool causal,
                     const std::optional<Tensor>& doc_start, double p, const std::optional<Tensor>& key,
                     const std::optional<Tensor>& sample_ids, int64_t site, int64_t head_offset) {
  const AttentionShape shape = shape_of(qkv, causal, doc_start, {p, key, sample_ids, site, head_offset});
  const int64_t B = shape.batch, T = shape.positions, H = shape.kv_heads, G = shape.group, D = shape.head_dim;
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, std::pair{&out, "out"}}) {
    check_shape(*tensor, name, {B, T, H, G, D}, "(B, T, Hkv, G, D)");
    check_type(*tensor, name, qkv.scalar_type(), "one, qkv's");
  }
  check_shape(lse, "lse", {B, H, G, T}, "(B, Hkv, G, T)");
  contiguous<const float>(lse, "lse", ScalarType::Float, "float32");
  Tensor dqkv = torch::stable::new_empty(qkv, {B, T, H, G + 2, D});
  if (qkv.numel() == 0) return dqkv;
  const Tensor delta = torch::stable::new_empty(qkv, {B, H, G, T}, ScalarType::Float);
  const bool fp32 = qkv.scalar_type() == ScalarType::Float;
  fp32 ? backward_of<float>(shape, dout, qkv, out, lse, delta, dqkv)
       : backward_of<Bf16>(shape, dout, qkv, out, lse, delta, dqkv);
  return dqkv;
}

}  // namespace
}  // namespace gptdist

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&gptdist::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&gptdist::attention_bwd));
}
