// The library gptdist/_vm.so: the CUDA ops as gptdist_vm::*, on CPU tensors. Tensor code, launchers and kernels are the
// shipped ones: ops_cuda.cpp is compiled here as it stands, and linked with the objects that _C_cuda.so is made of.

#define GPTDIST_TEST_DEVICE
#include "ops_cuda.cpp"

#include <string_view>

#include "cuda/launch_plan.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(gptdist_vm, m) {
  for (const char* schema : gptdist::kSchemas) m.def(schema);
}

namespace {

using namespace gptdist::cuda;

template <class Args>
Args shaped(Dtype dtype, int64_t rows, int32_t width) {
  Args args{};
  args.dtype = dtype;
  args.rows = rows;
  if constexpr (requires { args.vocabulary; }) args.vocabulary = width;
  if constexpr (requires { args.width; }) args.width = width;
  return args;
}

Dropout shaped_dropout(Dtype dtype, int64_t batch, int64_t positions, int32_t channels) {
  Dropout args{};
  args.dtype = dtype;
  args.batch = batch;
  args.positions = positions;
  args.channels = channels;
  return args;
}

// `heads` heads of one batch row, without options.
template <class Args>
Args shaped_attention(Dtype dtype, int64_t heads, int64_t positions, int32_t head_dim) {
  Args args{};
  args.dtype = dtype;
  args.batch = args.group = 1;
  args.kv_heads = int32_t(heads);
  args.positions = int32_t(positions);
  args.head_dim = head_dim;
  return args;
}

// One tensor of `elements`.
template <class Args>
Args shaped_list(int64_t elements, int64_t chunk) {
  Args args{};
  args.count = 1;
  args.chunks = ceil_div(elements, chunk);
  return args;
}

// One query for each of `batch` rows whose table holds `positions` in pages of 16, one kv head.
DecodeAttention shaped_decode(Dtype dtype, int64_t batch, int64_t positions, int32_t head_dim) {
  DecodeAttention args{};
  args.dtype = dtype;
  args.batch = int32_t(batch);
  args.queries = args.kv_heads = args.group = 1;
  args.page = 16;
  args.table_pages = int32_t(positions / args.page);
  args.head_dim = head_dim;
  args.splits = decode_split_count(args);
  return args;
}

}  // namespace

// launch_plan.h for tests: the plan of the launcher `name` for batch * rows rows of `width` elements; of attention, for
// batch heads of `rows` positions, D = width; of adamw and grad_norm, for one tensor; see shaped_decode. Returns 0 if known.
extern "C" __attribute__((visibility("default"))) int gptdist_vm_plan(const char* name, int32_t dtype_number,
                                                                      int64_t batch, int64_t rows, int32_t width,
                                                                      LaunchPlan* plan) {
  const std::string_view launcher = name;
  const Dtype dtype = Dtype(dtype_number);
  const int64_t all = batch * rows;
  if (launcher == "layer_norm_forward")
    *plan = plan_layer_norm_forward(shaped<LayerNormForward>(dtype, all, width));
  else if (launcher == "layer_norm_backward")
    *plan = plan_layer_norm_backward(shaped<LayerNormBackward>(dtype, all, width));
  else if (launcher == "bias_gelu_forward")
    *plan = plan_bias_gelu_forward(shaped<BiasGeluForward>(dtype, all, width));
  else if (launcher == "bias_gelu_backward")
    *plan = plan_bias_gelu_backward(shaped<BiasGeluBackward>(dtype, all, width));
  else if (launcher == "cross_entropy_forward")
    *plan = plan_cross_entropy_forward(shaped<CrossEntropyForward>(dtype, all, width));
  else if (launcher == "cross_entropy_backward")
    *plan = plan_cross_entropy_backward(shaped<CrossEntropyBackward>(dtype, all, width));
  else if (launcher == "dropout")
    *plan = plan_dropout(shaped_dropout(dtype, batch, rows, width));
  else if (launcher == "attention_forward")
    *plan = plan_attention_forward(shaped_attention<AttentionForward>(dtype, batch, rows, width));
  else if (launcher == "attention_statistics")
    *plan = plan_attention_statistics(shaped_attention<AttentionBackward>(dtype, batch, rows, width));
  else if (launcher == "attention_dkv")
    *plan = plan_attention_dkv(shaped_attention<AttentionBackward>(dtype, batch, rows, width));
  else if (launcher == "attention_dq")
    *plan = plan_attention_dq(shaped_attention<AttentionBackward>(dtype, batch, rows, width));
  else if (launcher == "adamw")
    *plan = plan_adamw(shaped_list<AdamW>(all * width, kAdamWChunk));
  else if (launcher == "grad_norm")
    *plan = plan_grad_norm(shaped_list<GradNorm>(all * width, kNormChunk));
  else if (launcher == "grad_norm_fold")
    *plan = plan_grad_norm_fold(shaped_list<GradNorm>(all * width, kNormChunk));
  else if (launcher == "decode_attention")
    *plan = plan_decode_attention(shaped_decode(dtype, batch, rows, width));
  else if (launcher == "decode_merge")
    *plan = plan_decode_merge(shaped_decode(dtype, batch, rows, width));
  else if (launcher == "fold_partials")  // rows: how many sums of `width` elements
    *plan = plan_fold_partials(int32_t(all), width);
  else
    return 1;
  return 0;
}
