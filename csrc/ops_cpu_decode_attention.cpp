// decode_attention on the CPU: argument checks, outputs, threads. Kernels: cpu/attention.h.

#include "ops_cpu_attention.h"

namespace gptdist {
namespace {

using namespace cpu;

constexpr Refusal kRefuse{"decode_attention"};

// Queries of a kv head up to which the kernels that are bound by memory take them, four at a time. Beyond, packing
// tiles of keys costs less than it saves (1024 positions of 12 heads of 64 in bf16, on a Zen 4: 16 queries 2.0 ms, as
// tiles 0.9).
constexpr int64_t kFewQueries = 8;

struct Decode {
  const Tensor &q, &k_cache, &v_cache, &block_table, &lengths;
};

int64_t length_of(const AttentionShape& shape, int64_t b) { return shape.lengths[b] + shape.positions; }

// Whatever is read of the caches is there.
void check_pages(const AttentionShape& shape, const Tensor& cache, const int32_t* table, int64_t table_width) {
  const int64_t pages = cache.size(0), page = cache.size(1);
  for (int64_t b = 0; b < shape.batch; ++b) {
    STD_TORCH_CHECK(shape.lengths[b] >= 0, "decode_attention: lengths[", b, "] is ", shape.lengths[b],
                    ", expected 0 or more");
    const int64_t used = ceil_div(length_of(shape, b), page);
    STD_TORCH_CHECK(used <= table_width, "decode_attention: row ", b, " reaches ", length_of(shape, b),
                    " positions, its block table holds ", table_width * page);
    for (int64_t i = 0; i < used; ++i) {
      const int64_t found = table[b * table_width + i];
      STD_TORCH_CHECK(found >= 0 && found < pages, "decode_attention: block_table[", b, ", ", i, "] is ", found,
                      ", expected a page below ", pages);
    }
  }
}

AttentionShape shape_of(const Decode& in) {
  const Tensor &q = in.q, &cache = in.k_cache;
  STD_TORCH_CHECK(q.dim() == 5 && q.size(3) >= 1, "decode_attention: q has shape ", shape_name(q),
                  ", expected (B, Tq, Hkv, G, D) with G >= 1");
  kRefuse.float_type(q, "q");
  kRefuse.head_dim(q, "q");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(1) >= 1, "decode_attention: k_cache has shape ", shape_name(cache),
                  ", expected (pages, page, Hkv, D) with page >= 1");
  for (const auto& [tensor, name] : {std::pair{&in.k_cache, "k_cache"}, std::pair{&in.v_cache, "v_cache"}}) {
    kRefuse.type(*tensor, name, q.scalar_type(), "one of q");
    kRefuse.shape(*tensor, name, {cache.size(0), cache.size(1), q.size(2), q.size(4)}, "(pages, page, Hkv, D)");
  }
  STD_TORCH_CHECK(in.block_table.dim() == 2 && in.block_table.size(0) == q.size(0), "decode_attention: block_table has shape ",
                  shape_name(in.block_table), ", expected (B, P) with B=", q.size(0));
  kRefuse.shape(in.lengths, "lengths", {q.size(0)}, "(B)");
  const int64_t* lengths = kRefuse.contiguous<const int64_t>(in.lengths, "lengths", ScalarType::Long, "int64");
  const AttentionShape shape{q.size(0), q.size(1), q.size(2), q.size(3), q.size(4), true, nullptr, {}, lengths};
  const int32_t* table = kRefuse.contiguous<const int32_t>(in.block_table, "block_table", ScalarType::Int, "int32");
  if (q.numel() > 0) check_pages(shape, cache, table, in.block_table.size(1));
  return shape;
}

template <class T>
Pages<T> pages(const Tensor& cache, const char* name, const Tensor& table) {
  const T* data = kRefuse.rows<const T>(cache, name);
  const int32_t* pages = static_cast<const int32_t*>(table.data_ptr());
  return {data, cache.stride(0), cache.stride(1), cache.stride(2), cache.size(1), pages, table.size(1)};
}

template <class T>
void decode_prompt(const DecodeAttention<T>& args, int64_t keys) {
  const AttentionShape& shape = args.shape;
  const double queries = double(shape.positions) * shape.group;
  const int64_t threads = threads_for(2.0 * keys * shape.kv_heads * queries * shape.head_dim);
  const AttentionKernels<T>& kernels = attention_kernels<T>(active_isa());
  const int64_t pairs = shape.batch * shape.kv_heads;
  const Spans spans = forward_spans(shape, threads);
  const size_t bytes = kernels.forward_scratch(shape, std::min(spans.length, shape.positions));
  run_tasks(pairs * spans.count(), threads, [&](int64_t i) {
    const int64_t pair = i % pairs;
    kernels.decode(args, {pair / shape.kv_heads, pair % shape.kv_heads, spans[i / pairs]}, scratch(bytes));
  });
}

template <class T>
void decode_few(const DecodeAttention<T>& args, int64_t keys, int64_t longest, const Tensor& like) {
  const AttentionShape& shape = args.shape;
  const int64_t threads = threads_for_bytes(2 * keys * shape.kv_heads * shape.head_dim * int64_t(sizeof(T)));
  const AttentionKernels<T>& kernels = attention_kernels<T>(active_isa());
  const int64_t pairs = shape.batch * shape.kv_heads, segments = ceil_div(longest, kSegmentKeys);
  const int64_t floats = shape.positions * shape.group * part_floats(shape.head_dim);  // of a segment
  const Tensor memory = torch::stable::new_empty(like, {segments, pairs, floats}, ScalarType::Float);
  float* parts = static_cast<float*>(memory.data_ptr());
  run_tasks(segments * pairs, threads, [&](int64_t i) {
    const int64_t b = i % pairs / shape.kv_heads, begin = i / pairs * kSegmentKeys;
    const Span keys{begin, std::min(begin + kSegmentKeys, length_of(shape, b))};
    if (keys.begin < keys.end) kernels.decode_part(args, b, i % pairs % shape.kv_heads, keys, parts + i * floats);
  });
  run_tasks(pairs, threads, [&](int64_t i) {
    const int64_t b = i / shape.kv_heads, count = ceil_div(length_of(shape, b), kSegmentKeys);
    kernels.decode_sum(args, b, i % shape.kv_heads, parts + i * floats, count, pairs * floats);
  });
}

template <class T>
void decode(const AttentionShape& shape, const Decode& in, const Tensor& out) {
  const DecodeAttention<T> args{shape, kRefuse.heads<const T>(in.q, "q"),
                                pages<T>(in.k_cache, "k_cache", in.block_table),
                                pages<T>(in.v_cache, "v_cache", in.block_table), kRefuse.heads<T>(out, "out")};
  int64_t keys = 0, longest = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    keys += length_of(shape, b);
    longest = std::max(longest, length_of(shape, b));
  }
  const bool few = shape.positions * shape.group <= kFewQueries;
  few ? decode_few(args, keys, longest, out) : decode_prompt(args, keys);
}

// The context's last position of row b is that of its last query, lengths[b] + Tq - 1. Returns out like q.
Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                        const Tensor& lengths) {
  const Decode in{q, k_cache, v_cache, block_table, lengths};
  const AttentionShape shape = shape_of(in);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)});
  if (q.numel() == 0) return out;
  q.scalar_type() == ScalarType::Float ? decode<float>(shape, in, out) : decode<Bf16>(shape, in, out);
  return out;
}

}  // namespace
}  // namespace gptdist

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) { m.impl("decode_attention", TORCH_BOX(&gptdist::decode_attention)); }
