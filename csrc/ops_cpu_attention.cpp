// attention on the CPU: argument checks, outputs, threads. Kernels: cpu/attention.h.

#include <optional>
#include <tuple>

#include "ops_cpu_attention.h"

namespace gptdist {
namespace {

using namespace cpu;

constexpr Refusal kRefuse{"attention"};

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
  kRefuse.shape(*dropout.sample_ids, "sample_ids", {B}, "(B)");
  AttentionDropout found{};
  found.sample_ids = kRefuse.contiguous<const int64_t>(*dropout.sample_ids, "sample_ids", ScalarType::Long, "int64");
  found.key = uint64_t(*kRefuse.contiguous<const int64_t>(*dropout.key, "key", ScalarType::Long, "int64"));
  found.threshold = uint32_t(dropout.p * 4294967296.0);
  found.factor = float(1.0 / (1.0 - dropout.p));
  found.site = int32_t(dropout.site);
  found.head_offset = int32_t(dropout.head_offset);
  return found;
}

AttentionShape shape_of(const Tensor& qkv, bool causal, const std::optional<Tensor>& doc_start, const Dropout& dropout) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(3) >= 3, "attention: qkv has shape ", shape_name(qkv),
                  ", expected (B, T, Hkv, G+2, D) with G >= 1");
  kRefuse.float_type(qkv, "qkv");
  kRefuse.head_dim(qkv, "qkv");
  STD_TORCH_CHECK(qkv.size(1) <= INT_MAX, "attention: qkv has T=", qkv.size(1), ", expected at most ", INT_MAX);
  AttentionShape shape{};
  shape.batch = qkv.size(0);
  shape.positions = qkv.size(1);
  shape.kv_heads = qkv.size(2);
  shape.group = qkv.size(3) - 2;
  shape.head_dim = qkv.size(4);
  shape.causal = causal;
  if (doc_start) {
    STD_TORCH_CHECK(causal, "attention: doc_start is given, but causal is false");
    kRefuse.shape(*doc_start, "doc_start", {shape.batch, shape.positions}, "(B, T)");
    shape.doc_start = kRefuse.contiguous<const int32_t>(*doc_start, "doc_start", ScalarType::Int, "int32");
  }
  shape.dropout = dropout_of(dropout, shape.batch, shape.kv_heads * shape.group);
  return shape;
}

// Scores that are computed, times D.
double score_products(const AttentionShape& shape) {
  const double scores = double(shape.batch) * shape.kv_heads * shape.group * shape.positions * shape.positions;
  return scores * shape.head_dim * (shape.causal ? 0.5 : 1.0);
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
  forward<T>(
      {shape, kRefuse.heads<const T>(qkv, "qkv"), kRefuse.heads<T>(out, "out"), static_cast<float*>(lse.data_ptr())});
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, bool causal, const std::optional<Tensor>& doc_start,
                                         double p, const std::optional<Tensor>& key,
                                         const std::optional<Tensor>& sample_ids, int64_t site, int64_t head_offset) {
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
void backward_of(const AttentionShape& shape, const Tensor& dout, const Tensor& qkv, const Tensor& out,
                 const Tensor& lse, const Tensor& delta, const Tensor& dqkv) {
  backward<T>({shape, kRefuse.heads<const T>(dout, "dout"), kRefuse.heads<const T>(qkv, "qkv"),
               kRefuse.heads<const T>(out, "out"), static_cast<const float*>(lse.data_ptr()),
               static_cast<float*>(delta.data_ptr()), kRefuse.heads<T>(dqkv, "dqkv")});
}

Tensor attention_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, bool causal,
                     const std::optional<Tensor>& doc_start, double p, const std::optional<Tensor>& key,
                     const std::optional<Tensor>& sample_ids, int64_t site, int64_t head_offset) {
  const AttentionShape shape = shape_of(qkv, causal, doc_start, {p, key, sample_ids, site, head_offset});
  const int64_t B = shape.batch, T = shape.positions, H = shape.kv_heads, G = shape.group, D = shape.head_dim;
  for (const auto& [tensor, name] : {std::pair{&dout, "dout"}, std::pair{&out, "out"}}) {
    kRefuse.shape(*tensor, name, {B, T, H, G, D}, "(B, T, Hkv, G, D)");
    kRefuse.type(*tensor, name, qkv.scalar_type(), "one of qkv");
  }
  kRefuse.shape(lse, "lse", {B, H, G, T}, "(B, Hkv, G, T)");
  kRefuse.contiguous<const float>(lse, "lse", ScalarType::Float, "float32");
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
