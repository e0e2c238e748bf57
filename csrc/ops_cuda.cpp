// The CUDA ops: argument checks, outputs, scratch memory and launches, through torch's stable ABI alone. The kernels'
// launchers (cuda/kernels.h) get pointers, sizes and a stream.
//
// ptxvm/test_device.cpp compiles this file once more, for CPU tensors and kernels that run on the PTX machine. All that
// differs is in the device header.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef GPTDIST_TEST_DEVICE
#include "ptxvm/test_device.h"
#else
#include "cuda_device.h"
#endif

#include "cuda/kernels.h"
#include "tensor_names.h"

namespace gptdist {
namespace {

using cuda::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;  // bytes: kernels read and write 16-byte vectors

std::string device_name(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another kind of device";
}

// One call of an op. Every tensor passes through here on its way to a pointer: its device, dtype and layout are checked,
// and the test device learns what the kernels may read and write.
class Call {
 public:
  // `x` decides the device.
  Call(const char* op, const Tensor& x) : op_(op), x_(x), scope_((check_device(op, x), x)) {}

  cuda::Stream stream() const { return scope_.stream(); }

  void launched(cuda::Error error) const { STD_TORCH_CHECK(error == nullptr, op_, ": ", error); }

  Dtype float_dtype(const Tensor& t, const char* name) const {
    switch (t.scalar_type()) {
      case ScalarType::Float: return Dtype::kFp32;
      case ScalarType::BFloat16: return Dtype::kBf16;
      case ScalarType::Half: return Dtype::kFp16;
      default: break;
    }
    STD_TORCH_CHECK(false, op_, ": ", name, " is ", dtype_name(t), ", expected float32, bfloat16 or float16");
  }

  // `dtype`, or fp32.
  Dtype dtype_or_fp32(const Tensor& t, const char* name, Dtype dtype, const char* of) const {
    const Dtype got = float_dtype(t, name);
    STD_TORCH_CHECK(got == dtype || got == Dtype::kFp32, op_, ": ", name, " is ", dtype_name(t), ", expected ", of,
                    "'s dtype or float32");
    return got;
  }

  void dtype(const Tensor& t, const char* name, ScalarType wanted, const char* wanted_name) const {
    STD_TORCH_CHECK(t.scalar_type() == wanted, op_, ": ", name, " is ", dtype_name(t), ", expected ", wanted_name);
  }

  void same_dtype(const Tensor& t, const char* name, const Tensor& like, const char* like_name) const {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op_, ": ", name, " is ", dtype_name(t), ", expected ",
                    dtype_name(like), " as ", like_name);
  }

  void elements(const Tensor& t, const char* name, int64_t wanted, const char* symbol) const {
    STD_TORCH_CHECK(t.numel() == wanted, op_, ": ", name, " has ", t.numel(), " elements, expected ", symbol, "=", wanted);
  }

  void same_shape(const Tensor& t, const char* name, const Tensor& like, const char* like_name) const {
    bool same = t.dim() == like.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
    STD_TORCH_CHECK(same, op_, ": ", name, " has shape ", shape_name(t), ", expected ", shape_name(like), " as ", like_name);
  }

  void rank(const Tensor& t, const char* name, int64_t dims, const char* wanted) const {
    STD_TORCH_CHECK(t.dim() == dims, op_, ": ", name, " has shape ", shape_name(t), ", expected ", wanted);
  }

  // Width of (..., C), within [least, most] and a multiple of kWidthStep.
  int32_t width(const Tensor& t, const char* name, int64_t least, int64_t most) const {
    STD_TORCH_CHECK(t.dim() > 0, op_, ": ", name, " is a scalar, expected (..., C)");
    const int64_t C = t.size(t.dim() - 1);
    STD_TORCH_CHECK(C >= least && C <= most && C % cuda::kWidthStep == 0, op_, ": ", name, " has C=", C,
                    ", expected a multiple of ", cuda::kWidthStep, " from ", least, " to ", most);
    return int32_t(C);
  }

  const void* read(const Tensor& t, const char* name) const { return checked(t, name, false); }
  void* write(const Tensor& t, const char* name) const { return checked(t, name, true); }

  const float* read_fp32(const Tensor& t, const char* name) const {
    dtype(t, name, ScalarType::Float, "float32");
    return static_cast<const float*>(read(t, name));
  }
  float* write_fp32(const Tensor& t, const char* name) const { return static_cast<float*>(write(t, name)); }

  const int64_t* read_int64(const Tensor& t, const char* name) const {
    dtype(t, name, ScalarType::Long, "int64");
    return static_cast<const int64_t*>(read(t, name));
  }

  const int32_t* read_int32(const Tensor& t, const char* name) const {
    dtype(t, name, ScalarType::Int, "int32");
    return static_cast<const int32_t*>(read(t, name));
  }

  // From a multiple of the element's size, not of kAlignment.
  const void* read_unaligned(const Tensor& t, const char* name) const { return unaligned(t, name, false); }
  void* write_unaligned(const Tensor& t, const char* name) const { return unaligned(t, name, true); }

  // (rows, columns) whose rows may lie apart; see row_stride.
  const void* read_rows(const Tensor& t, const char* name) const { return checked_rows(t, name, false); }
  void* write_rows(const Tensor& t, const char* name) const { return checked_rows(t, name, true); }

  // Rows of whole 16-byte vectors that lie anywhere: the last dimension is contiguous, the others have any strides.
  const void* read_vectors(const Tensor& t, const char* name) const {
    check_place(t, name);
    const int64_t last = t.dim() - 1, step = kAlignment / int64_t(t.element_size());
    STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op_, ": ", name,
                    " has rows that are not contiguous: copy it");
    int64_t elements = t.numel() > 0 ? t.size(last) : 0;
    for (int64_t i = 0; i < last && elements > 0; ++i) {
      STD_TORCH_CHECK(t.size(i) == 1 || t.stride(i) % step == 0, op_, ": ", name, " has a stride of ", t.stride(i),
                      " elements, expected a multiple of ", step, ": copy it");
      elements += (t.size(i) - 1) * t.stride(i);
    }
    return pointer(t, name, elements, false, kAlignment);
  }

 private:
  static void check_device(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(on_device(x), op, ": the first tensor is on ", device_name(x), ", where these kernels do not run");
  }

  void* checked(const Tensor& t, const char* name, bool writable) const {
    check_place(t, name);
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " is not contiguous, expected rows one after the other: copy it");
    return pointer(t, name, t.numel(), writable, kAlignment);
  }

  void* unaligned(const Tensor& t, const char* name, bool writable) const {
    check_place(t, name);
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " is not contiguous: copy it");
    return pointer(t, name, t.numel(), writable, int64_t(t.element_size()));
  }

  void* checked_rows(const Tensor& t, const char* name, bool writable) const {
    check_place(t, name);
    const int64_t rows = t.size(0), columns = t.size(1);
    STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, op_, ": ", name, " has rows that are not contiguous: copy it");
    STD_TORCH_CHECK(rows <= 1 || t.stride(0) >= columns, op_, ": ", name, " has rows that overlap: copy it");
    return pointer(t, name, rows == 0 ? 0 : (rows - 1) * t.stride(0) + columns, writable, kAlignment);
  }

  void check_place(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x_.get_device_index(), op_, ": ", name, " is on ",
                    device_name(t), ", expected ", device_name(x_));
  }

  void* pointer(const Tensor& t, const char* name, int64_t elements, bool writable, int64_t alignment) const {
    void* data = t.data_ptr();
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % alignment == 0, op_, ": ", name,
                    " does not start at a multiple of ", alignment, " bytes: copy it");
    if (elements > 0) note_access(data, elements * int64_t(t.element_size()), writable, name);
    return data;
  }

  const char* op_;
  const Tensor& x_;
  DeviceScope scope_;
};

int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

Tensor new_fp32(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

Tensor zeros_fp32(const Tensor& like, int64_t elements) {
  return torch::stable::new_zeros(like, {elements}, ScalarType::Float);
}

// layer_norm

using NormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// (y, sum, mean, rstd); sum is x itself without a residual.
NormOutputs norm_forward(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                         const std::optional<Tensor>& bias, double eps) {
  const Call call(op, x);
  cuda::LayerNormForward args{};
  args.width = call.width(x, "x", cuda::kMinWidth, cuda::kMaxWidth);
  args.rows = x.numel() / args.width;
  args.eps = float(eps);
  args.dtype = call.float_dtype(x, "x");
  args.sum_dtype = args.dtype;
  args.parameter_dtype = call.dtype_or_fp32(weight, "weight", args.dtype, "x");
  call.elements(weight, "weight", args.width, "C");
  args.x = call.read(x, "x");
  args.weight = call.read(weight, "weight");
  if (bias) {
    call.elements(*bias, "bias", args.width, "C");
    call.same_dtype(*bias, "bias", weight, "weight");
    args.bias = call.read(*bias, "bias");
  }
  const auto statistics_shape = x.sizes().slice(0, x.dim() - 1);
  Tensor y = torch::stable::empty_like(x), sum = x;
  Tensor mean = new_fp32(x, statistics_shape), rstd = new_fp32(x, statistics_shape);
  if (residual) {
    call.same_shape(*residual, "residual", x, "x");
    args.sum_dtype = call.dtype_or_fp32(*residual, "residual", args.dtype, "x");
    args.residual = call.read(*residual, "residual");
    sum = torch::stable::empty_like(*residual);
    args.sum = call.write(sum, "sum");
  }
  args.y = call.write(y, "y");
  args.mean = call.write_fp32(mean, "mean");
  args.rstd = call.write_fp32(rstd, "rstd");
  if (args.rows > 0) call.launched(cuda::layer_norm_forward(args, call.stream()));
  return {y, sum, mean, rstd};
}

using NormGradients = std::tuple<Tensor, Tensor, Tensor>;

// (dx, dweight, dbias) of s, which is x or the sum; ds joins dx.
NormGradients norm_backward(const char* op, const Tensor& dy, const Tensor* ds, const Tensor& s, const char* s_name,
                            const Tensor& mean, const Tensor& rstd, const Tensor& weight, bool has_bias) {
  const Call call(op, dy);
  cuda::LayerNormBackward args{};
  args.width = call.width(dy, "dy", cuda::kMinWidth, cuda::kMaxWidth);
  args.rows = dy.numel() / args.width;
  args.dtype = call.float_dtype(dy, "dy");
  args.sum_dtype = call.dtype_or_fp32(s, s_name, args.dtype, "dy");
  args.parameter_dtype = call.dtype_or_fp32(weight, "weight", args.dtype, "dy");
  call.same_shape(s, s_name, dy, "dy");
  call.elements(weight, "weight", args.width, "C");
  call.elements(mean, "mean", args.rows, "rows");
  call.elements(rstd, "rstd", args.rows, "rows");
  args.dy = call.read(dy, "dy");
  args.s = call.read(s, s_name);
  args.weight = call.read(weight, "weight");
  args.mean = call.read_fp32(mean, "mean");
  args.rstd = call.read_fp32(rstd, "rstd");
  if (ds) {
    call.same_shape(*ds, "ds", s, s_name);
    call.same_dtype(*ds, "ds", s, s_name);
    args.ds = call.read(*ds, "ds");
  }
  Tensor dx = torch::stable::empty_like(s);
  if (args.rows == 0) return {dx, zeros_fp32(s, args.width), zeros_fp32(s, has_bias ? args.width : 0)};

  const int64_t partial_blocks = cuda::layer_norm_partials(args.rows, args.width);
  Tensor partials = new_fp32(s, {partial_blocks, 2, args.width});
  Tensor dweight = new_fp32(s, {args.width}), dbias = new_fp32(s, {has_bias ? args.width : 0});
  args.dx = call.write(dx, "dx");
  args.partials = call.write_fp32(partials, "partials");
  args.dweight = call.write_fp32(dweight, "dweight");
  args.dbias = has_bias ? call.write_fp32(dbias, "dbias") : nullptr;
  call.launched(cuda::layer_norm_backward(args, call.stream()));
  return {dx, dweight, dbias};
}

NormGradients layer_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                             const Tensor& weight, bool has_bias) {
  return norm_backward("layer_norm", dy, nullptr, x, "x", mean, rstd, weight, has_bias);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const auto [y, sum, mean, rstd] = norm_forward("layer_norm", x, nullptr, weight, bias, eps);
  return {y, mean, rstd};
}

NormOutputs residual_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps) {
  return norm_forward("residual_layer_norm", x, &residual, weight, bias, eps);
}

NormGradients residual_layer_norm_bwd(const Tensor& dy, const Tensor& ds, const Tensor& sum, const Tensor& mean,
                                      const Tensor& rstd, const Tensor& weight, bool has_bias) {
  return norm_backward("residual_layer_norm", dy, &ds, sum, "sum", mean, rstd, weight, has_bias);
}

// bias_gelu

// Checks bias and returns its pointer, nullptr without one.
const void* gelu_bias(const Call& call, const std::optional<Tensor>& bias, int32_t width, Dtype dtype,
                      Dtype& parameter_dtype) {
  parameter_dtype = dtype;
  if (!bias) return nullptr;
  call.elements(*bias, "bias", width, "C");
  parameter_dtype = call.dtype_or_fp32(*bias, "bias", dtype, "x");
  return call.read(*bias, "bias");
}

Tensor bias_gelu_fwd(const Tensor& x, const std::optional<Tensor>& bias) {
  const Call call("bias_gelu", x);
  cuda::BiasGeluForward args{};
  args.width = call.width(x, "x", cuda::kWidthStep, INT_MAX);
  args.rows = x.numel() / args.width;
  args.dtype = call.float_dtype(x, "x");
  args.x = call.read(x, "x");
  args.bias = gelu_bias(call, bias, args.width, args.dtype, args.parameter_dtype);
  Tensor y = torch::stable::empty_like(x);
  args.y = call.write(y, "y");
  if (args.rows > 0) call.launched(cuda::bias_gelu_forward(args, call.stream()));
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias) {
  const Call call("bias_gelu", dy);
  cuda::BiasGeluBackward args{};
  args.width = call.width(x, "x", cuda::kWidthStep, INT_MAX);
  args.rows = x.numel() / args.width;
  args.dtype = call.float_dtype(x, "x");
  call.same_shape(dy, "dy", x, "x");
  call.same_dtype(dy, "dy", x, "x");
  args.dy = call.read(dy, "dy");
  args.x = call.read(x, "x");
  args.bias = gelu_bias(call, bias, args.width, args.dtype, args.parameter_dtype);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t bias_width = bias ? args.width : 0;
  if (args.rows == 0) return {dx, zeros_fp32(x, bias_width)};

  Tensor dbias = new_fp32(x, {bias_width});
  Tensor partials = new_fp32(x, {bias ? cuda::bias_gelu_partials(args.rows, args.width) : 0, bias_width});
  args.dx = call.write(dx, "dx");
  if (bias) {
    args.partials = call.write_fp32(partials, "partials");
    args.dbias = call.write_fp32(dbias, "dbias");
  }
  call.launched(cuda::bias_gelu_backward(args, call.stream()));
  return {dx, dbias};
}

// cross_entropy

int32_t vocabulary(const Call& call, const char* op, const Tensor& logits, const Tensor& targets) {
  call.rank(logits, "logits", 2, "(N, V)");
  const int64_t V = logits.size(1);
  STD_TORCH_CHECK(V >= 1 && V <= INT_MAX, op, ": logits have V=", V, ", expected 1 to ", INT_MAX);
  call.elements(targets, "targets", logits.size(0), "N");
  return int32_t(V);
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  const Call call("cross_entropy", logits);
  cuda::CrossEntropyForward args{};
  args.vocabulary = vocabulary(call, "cross_entropy", logits, targets);
  args.rows = logits.size(0);
  args.row_stride = row_stride(logits);
  args.ignore_index = ignore_index;
  args.dtype = call.float_dtype(logits, "logits");
  args.logits = call.read_rows(logits, "logits");
  args.targets = call.read_int64(targets, "targets");
  Tensor loss = new_fp32(logits, {args.rows}), lse = new_fp32(logits, {args.rows});
  args.loss = call.write_fp32(loss, "loss");
  args.lse = call.write_fp32(lse, "lse");
  if (args.rows > 0) call.launched(cuda::cross_entropy_forward(args, call.stream()));
  return {loss, lse};
}

// Overwrites `dlogits`, which has the strides of `logits` or is `logits`.
void cross_entropy_backward(const Call& call, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                            const Tensor& lse, int64_t ignore_index, const Tensor& dlogits) {
  cuda::CrossEntropyBackward args{};
  args.vocabulary = vocabulary(call, "cross_entropy", logits, targets);
  args.rows = logits.size(0);
  args.row_stride = row_stride(logits);
  args.ignore_index = ignore_index;
  args.dtype = call.float_dtype(logits, "logits");
  call.elements(lse, "lse", args.rows, "N");
  call.elements(dloss, "dloss", args.rows, "N");
  args.logits = call.read_rows(logits, "logits");
  args.targets = call.read_int64(targets, "targets");
  args.lse = call.read_fp32(lse, "lse");
  args.dloss = call.read_fp32(dloss, "dloss");
  args.dlogits = call.write_rows(dlogits, "dlogits");
  if (args.rows > 0) call.launched(cuda::cross_entropy_backward(args, call.stream()));
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                         int64_t ignore_index) {
  const Call call("cross_entropy", logits);
  call.read(logits, "logits");  // contiguous, as the gradient will be
  Tensor dlogits = torch::stable::empty_like(logits);
  cross_entropy_backward(call, dloss, logits, targets, lse, ignore_index, dlogits);
  return dlogits;
}

void cross_entropy_bwd_(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                        int64_t ignore_index) {
  const Call call("cross_entropy", logits);
  cross_entropy_backward(call, dloss, logits, targets, lse, ignore_index, logits);
}

// dropout

Tensor dropout(const Tensor& x, double p, const Tensor& key, const Tensor& sample_ids, int64_t site,
               int64_t row_offset) {
  const Call call("dropout", x);
  call.rank(x, "x", 3, "(B, T, C)");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: probability is ", p, ", expected 0 <= p < 1");
  STD_TORCH_CHECK(site >= 0 && site < 1 << 16, "dropout: site is ", site, ", expected 0 <= site < 65536");
  STD_TORCH_CHECK(row_offset >= 0 && row_offset <= INT_MAX, "dropout: row_offset is ", row_offset, ", expected 0 to ",
                  INT_MAX);
  STD_TORCH_CHECK(x.size(2) <= INT_MAX, "dropout: x has C=", x.size(2), ", expected at most ", INT_MAX);
  call.elements(key, "key", 1, "one");
  call.elements(sample_ids, "sample_ids", x.size(0), "B");
  cuda::Dropout args{};
  args.dtype = call.float_dtype(x, "x");
  args.batch = x.size(0);
  args.positions = x.size(1);
  args.channels = int32_t(x.size(2));
  args.threshold = uint32_t(p * 4294967296.0);  // floor(p 2^32)
  args.scale = float(1.0 / (1.0 - p));
  args.site = int32_t(site);
  args.row_offset = int32_t(row_offset);
  args.x = call.read(x, "x");
  args.key = call.read_int64(key, "key");
  args.sample_ids = call.read_int64(sample_ids, "sample_ids");
  Tensor y = torch::stable::empty_like(x);
  args.y = call.write(y, "y");
  if (x.numel() > 0) call.launched(cuda::dropout(args, call.stream()));
  return y;
}

// attention

struct Documents {
  const std::optional<Tensor>& starts;
  bool causal;
};

struct AttentionMask {  // dropout's
  double p;
  const std::optional<Tensor>&key, &sample_ids;
  int64_t site, head_offset;
};

// The shape of qkv (B, T, Hkv, G+2, D), what a query sees, and dropout: the same in both passes.
template <class Args>
void set_attention(const Call& call, const Tensor& qkv, const Documents& documents, const AttentionMask& mask, Args& args) {
  call.rank(qkv, "qkv", 5, "(B, T, Hkv, G+2, D)");
  const int64_t B = qkv.size(0), T = qkv.size(1), H = qkv.size(2), slots = qkv.size(3), D = qkv.size(4);
  args.dtype = call.float_dtype(qkv, "qkv");
  STD_TORCH_CHECK(args.dtype != Dtype::kFp32, "attention: qkv is float32, expected bfloat16 or float16");
  STD_TORCH_CHECK(D == 64 || D == 128, "attention: qkv has D=", D, ", expected 64 or 128");
  STD_TORCH_CHECK(slots >= 3, "attention: qkv has G+2=", slots, ", expected at least 3");
  STD_TORCH_CHECK(B <= INT_MAX && T <= INT_MAX && H * slots * D <= INT_MAX, "attention: qkv has shape ", shape_name(qkv),
                  ", expected B, T and Hkv (G+2) D of at most ", INT_MAX);
  args.batch = int32_t(B);
  args.positions = int32_t(T);
  args.kv_heads = int32_t(H);
  args.group = int32_t(slots - 2);
  args.head_dim = int32_t(D);
  args.qkv_stride = int32_t(H * slots * D);
  args.out_stride = int32_t(H * (slots - 2) * D);
  args.softmax_scale = float(1.0 / std::sqrt(double(D)));
  args.qkv = call.read(qkv, "qkv");
  args.causal = documents.causal;
  if (documents.starts) {
    STD_TORCH_CHECK(documents.causal, "attention: doc_start is given, but causal is false");
    call.elements(*documents.starts, "doc_start", B * T, "B*T");
    args.doc_start = call.read_int32(*documents.starts, "doc_start");
  }
  STD_TORCH_CHECK(mask.p >= 0.0 && mask.p < 1.0, "attention: dropout probability is ", mask.p, ", expected 0 <= p < 1");
  if (mask.p == 0.0) return;
  STD_TORCH_CHECK(mask.key && mask.sample_ids, "attention: dropout needs key and sample_ids");
  STD_TORCH_CHECK(mask.site >= 0 && mask.site < 1 << 16, "attention: site is ", mask.site, ", expected 0 <= site < 65536");
  STD_TORCH_CHECK(mask.head_offset >= 0 && mask.head_offset + H * (slots - 2) <= 1 << 16, "attention: head_offset is ",
                  mask.head_offset, ", expected no head beyond 65535");
  call.elements(*mask.key, "key", 1, "one");
  call.elements(*mask.sample_ids, "sample_ids", B, "B");
  args.dropout.key = call.read_int64(*mask.key, "key");
  args.dropout.sample_ids = call.read_int64(*mask.sample_ids, "sample_ids");
  args.dropout.threshold = uint32_t(mask.p * 4294967296.0);  // floor(p 2^32)
  args.dropout.scale = float(1.0 / (1.0 - mask.p));
  args.dropout.site = int32_t(mask.site);
  args.dropout.head_offset = int32_t(mask.head_offset);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, bool causal, const std::optional<Tensor>& doc_start, double p,
                                         const std::optional<Tensor>& key, const std::optional<Tensor>& sample_ids,
                                         int64_t site, int64_t head_offset) {
  const Call call("attention", qkv);
  cuda::AttentionForward args{};
  set_attention(call, qkv, {doc_start, causal}, {p, key, sample_ids, site, head_offset}, args);
  const int64_t B = args.batch, T = args.positions, H = args.kv_heads, G = args.group;
  Tensor out = torch::stable::new_empty(qkv, {B, T, H, G, args.head_dim}), lse = new_fp32(qkv, {B, H, G, T});
  args.out = call.write(out, "out");
  args.lse = call.write_fp32(lse, "lse");
  if (qkv.numel() > 0) call.launched(cuda::attention_forward(args, call.stream()));
  return {out, lse};
}

Tensor attention_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse, bool causal,
                     const std::optional<Tensor>& doc_start, double p, const std::optional<Tensor>& key,
                     const std::optional<Tensor>& sample_ids, int64_t site, int64_t head_offset) {
  const Call call("attention", qkv);
  cuda::AttentionBackward args{};
  set_attention(call, qkv, {doc_start, causal}, {p, key, sample_ids, site, head_offset}, args);
  const int64_t rows = int64_t(args.batch) * args.positions * args.kv_heads * args.group;
  call.elements(out, "out", rows * args.head_dim, "B*T*Hkv*G*D");
  call.same_dtype(out, "out", qkv, "qkv");
  call.same_shape(dout, "dout", out, "out");
  call.same_dtype(dout, "dout", qkv, "qkv");
  call.elements(lse, "lse", rows, "B*Hkv*G*T");
  args.dout = call.read(dout, "dout");
  args.out = call.read(out, "out");
  args.lse = call.read_fp32(lse, "lse");
  Tensor statistics = new_fp32(qkv, {rows, 2}), dqkv = torch::stable::empty_like(qkv);
  args.statistics = call.write_fp32(statistics, "statistics");
  args.dqkv = call.write(dqkv, "dqkv");
  if (qkv.numel() > 0) call.launched(cuda::attention_backward(args, call.stream()));
  return dqkv;
}

// lists of tensors

using Tensors = std::vector<Tensor>;

// A list of an op's tensors and their names in errors: "params[3]".
class NamedList {
 public:
  NamedList(const Tensors& tensors, const char* name) : tensors_(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) names_.push_back(std::string(name) + "[" + std::to_string(i) + "]");
  }
  size_t size() const { return tensors_.size(); }
  const Tensor& operator[](size_t i) const { return tensors_[i]; }
  const char* name(size_t i) const { return names_[i].c_str(); }  // lives as long as the list

 private:
  const Tensors& tensors_;
  std::vector<std::string> names_;
};

// Where a list's table lies on the device: see kernels.h.
template <class Entry>
struct Table {
  Tensor memory;
  const int64_t* first_chunks;
  const Entry* entries;
  int64_t chunks;
  int32_t count;
};

template <class Entry>
Table<Entry> upload_table(const Call& call, const Tensor& like, const std::vector<Entry>& entries, int64_t chunk) {
  static_assert(sizeof(Entry) % sizeof(int64_t) == 0, "entries begin after a number of int64");
  const int64_t count = int64_t(entries.size()), entry_words = int64_t(sizeof(Entry) / sizeof(int64_t));
  Tensor host = host_table(count * (1 + entry_words));
  int64_t* words = static_cast<int64_t*>(host.data_ptr());
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    words[i] = chunks;
    chunks += (entries[i].elements + chunk - 1) / chunk;
  }
  std::memcpy(words + count, entries.data(), count * sizeof(Entry));
  Tensor memory = upload(host, like);
  const int64_t* first_chunks = call.read_int64(memory, "table");
  return {memory, first_chunks, reinterpret_cast<const Entry*>(first_chunks + count), chunks, int32_t(count)};
}

// adamw_

// Pointers and dtypes of tensor i, checked.
cuda::AdamWTensor adamw_tensor(const Call& call, const NamedList& params, const NamedList& grads,
                               const NamedList& exp_avg, const NamedList& exp_avg_sq, const NamedList& shadows,
                               size_t i) {
  const auto same_elements = [&](const NamedList& list) {
    call.elements(list[i], list.name(i), params[i].numel(), params.name(i));
    return list[i];
  };
  const auto write_fp32 = [&](const NamedList& list) {
    call.dtype(same_elements(list), list.name(i), ScalarType::Float, "float32");
    return static_cast<float*>(call.write_unaligned(list[i], list.name(i)));
  };
  cuda::AdamWTensor t{};
  t.param = write_fp32(params);
  t.exp_avg = write_fp32(exp_avg);
  t.exp_avg_sq = write_fp32(exp_avg_sq);
  t.grad_dtype = call.float_dtype(same_elements(grads), grads.name(i));
  t.grad = call.read_unaligned(grads[i], grads.name(i));
  t.elements = params[i].numel();
  if (shadows.size() == 0) return t;
  t.shadow_dtype = call.float_dtype(same_elements(shadows), shadows.name(i));
  STD_TORCH_CHECK(t.shadow_dtype != Dtype::kFp32, "adamw_: ", shadows.name(i),
                  " is float32, expected bfloat16 or float16");
  t.shadow = call.write_unaligned(shadows[i], shadows.name(i));
  return t;
}

void adamw_(Tensors param_list, Tensors grad_list, Tensors exp_avg_list, Tensors exp_avg_sq_list, Tensors shadow_list,
            std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
            int64_t step) {
  if (param_list.empty()) return;
  const Call call("adamw_", param_list[0]);
  const NamedList params(param_list, "params"), grads(grad_list, "grads"), exp_avg(exp_avg_list, "exp_avg"),
      exp_avg_sq(exp_avg_sq_list, "exp_avg_sq"), shadows(shadow_list, "shadows");
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count &&
                      (shadows.size() == count || shadows.size() == 0),
                  "adamw_: got ", grads.size(), " grads, ", exp_avg.size(), " exp_avg, ", exp_avg_sq.size(),
                  " exp_avg_sq and ", shadows.size(), " shadows, expected ", count, " of each (or no shadows)");
  STD_TORCH_CHECK(step >= 1, "adamw_: step is ", step, ", expected at least 1");
  std::vector<cuda::AdamWTensor> entries;
  for (size_t i = 0; i < count; ++i) {
    const cuda::AdamWTensor t = adamw_tensor(call, params, grads, exp_avg, exp_avg_sq, shadows, i);
    if (t.elements > 0) entries.push_back(t);
  }
  cuda::AdamW args{};
  if (grad_scale) {
    call.elements(*grad_scale, "grad_scale", 1, "one");
    call.dtype(*grad_scale, "grad_scale", ScalarType::Float, "float32");
    args.grad_scale = static_cast<const float*>(call.read_unaligned(*grad_scale, "grad_scale"));
  }
  if (entries.empty()) return;
  const Table table = upload_table(call, params[0], entries, cuda::kAdamWChunk);
  args.first_chunks = table.first_chunks;
  args.tensors = table.entries;
  args.chunks = table.chunks;
  args.count = table.count;
  args.scalars = adamw_scalars(lr, beta1, beta2, eps, weight_decay, step);
  call.launched(cuda::adamw(args, call.stream()));
}

// grad_norm

Tensor grad_norm(Tensors list) {
  STD_TORCH_CHECK(!list.empty(), "grad_norm: the list is empty, expected a tensor at least");
  const Call call("grad_norm", list[0]);
  const NamedList tensors(list, "tensors");
  std::vector<cuda::NormTensor> entries;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Dtype dtype = call.float_dtype(tensors[i], tensors.name(i));
    const void* x = call.read_unaligned(tensors[i], tensors.name(i));
    if (tensors[i].numel() > 0) entries.push_back({x, tensors[i].numel(), dtype});
  }
  if (entries.empty()) return torch::stable::new_zeros(tensors[0], {}, ScalarType::Float);

  const Table table = upload_table(call, tensors[0], entries, cuda::kNormChunk);
  Tensor partials = torch::stable::new_empty(tensors[0], {table.chunks}, ScalarType::Double);
  Tensor norm = new_fp32(tensors[0], {});
  cuda::GradNorm args{};
  args.first_chunks = table.first_chunks;
  args.tensors = table.entries;
  args.chunks = table.chunks;
  args.count = table.count;
  args.partials = static_cast<double*>(call.write(partials, "partials"));
  args.norm = call.write_fp32(norm, "norm");
  call.launched(cuda::grad_norm(args, call.stream()));
  return norm;
}

// decode_attention

// The shapes of q and the caches, and how q lies.
void set_decode_shape(const Call& call, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      cuda::DecodeAttention& args) {
  call.rank(q, "q", 5, "(B, Tq, Hkv, G, D)");
  call.rank(k_cache, "k_cache", 4, "(pages, page, Hkv, D)");
  const int64_t B = q.size(0), Tq = q.size(1), H = q.size(2), G = q.size(3), D = q.size(4);
  const int64_t pages = k_cache.size(0), page = k_cache.size(1);
  args.dtype = call.float_dtype(q, "q");
  STD_TORCH_CHECK(args.dtype != Dtype::kFp32, "decode_attention: q is float32, expected bfloat16 or float16");
  STD_TORCH_CHECK(D == 64 || D == 128, "decode_attention: q has D=", D, ", expected 64 or 128");
  STD_TORCH_CHECK(G >= 1, "decode_attention: q has G=0, expected at least 1");
  STD_TORCH_CHECK(k_cache.size(2) == H && k_cache.size(3) == D, "decode_attention: k_cache has shape ",
                  shape_name(k_cache), ", expected (pages, page, ", H, ", ", D, ")");
  STD_TORCH_CHECK(page >= 1 && (page & (page - 1)) == 0, "decode_attention: k_cache has pages of ", page,
                  " positions, expected a power of two");
  STD_TORCH_CHECK(B <= INT_MAX && H * D <= INT_MAX && Tq <= INT_MAX / G && B * H <= INT_MAX,
                  "decode_attention: q has shape ", shape_name(q), ", expected B Hkv, Hkv D and Tq G of at most ",
                  INT_MAX);
  STD_TORCH_CHECK(pages >= 1 && pages <= INT_MAX / page, "decode_attention: k_cache has ", pages, " pages of ", page,
                  ", expected 1 to ", INT_MAX, " positions");
  args.batch = int32_t(B);
  args.queries = int32_t(Tq);
  args.kv_heads = int32_t(H);
  args.group = int32_t(G);
  args.head_dim = int32_t(D);
  args.pages = int32_t(pages);
  args.page = int32_t(page);
  args.softmax_scale = float(1.0 / std::sqrt(double(D)));
  for (int i = 0; i < 4; ++i) args.q_strides[i] = q.size(i) > 1 ? q.stride(i) : 0;
  call.same_dtype(k_cache, "k_cache", q, "q");
  call.same_shape(v_cache, "v_cache", k_cache, "k_cache");
  call.same_dtype(v_cache, "v_cache", q, "q");
  args.q = call.read_vectors(q, "q");
  args.k_cache = call.read(k_cache, "k_cache");
  args.v_cache = call.read(v_cache, "v_cache");
}

Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                        const Tensor& lengths) {
  const Call call("decode_attention", q);
  cuda::DecodeAttention args{};
  set_decode_shape(call, q, k_cache, v_cache, args);
  const int64_t B = args.batch, T = args.queries, H = args.kv_heads, G = args.group, D = args.head_dim;
  call.rank(block_table, "block_table", 2, "(B, P)");
  call.elements(block_table, "block_table", B * block_table.size(1), "B*P");
  call.elements(lengths, "lengths", B, "B");
  const int64_t most = cuda::kMaxDecodePositions, table_pages = block_table.size(1);
  STD_TORCH_CHECK(table_pages >= 1 && table_pages <= most / args.page && T <= most, "decode_attention: ", T,
                  " queries, tables of ", table_pages, " pages of ", args.page, ", expected 1 to ", most,
                  " positions");
  args.table_pages = int32_t(table_pages);
  args.block_table = call.read_int32(block_table, "block_table");
  args.lengths = call.read_int64(lengths, "lengths");
  args.splits = cuda::decode_attention_splits(args);
  const int64_t parts = args.splits > 1 ? args.splits : 0;
  Tensor out = torch::stable::new_empty(q, {B, T, H, G, D});
  Tensor partial_out = new_fp32(q, {parts, B, H, T, G, D}), partial_state = new_fp32(q, {parts, B, H, T, G, 2});
  args.out = call.write(out, "out");
  if (parts > 0) {
    args.partial_out = call.write_fp32(partial_out, "partial_out");
    args.partial_state = call.write_fp32(partial_state, "partial_state");
  }
  if (out.numel() > 0) call.launched(cuda::decode_attention(args, call.stream()));
  return out;
}

std::tuple<int64_t, int64_t> cuda_versions() {
  int runtime = 0, driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != 0) runtime = 0;
  if (cudaDriverGetVersion(&driver) != 0) driver = 0;
  return {runtime, driver};
}

}  // namespace

GPTDIST_CUDA_LIBRARY(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("residual_layer_norm_fwd", TORCH_BOX(&residual_layer_norm_fwd));
  m.impl("residual_layer_norm_bwd", TORCH_BOX(&residual_layer_norm_bwd));
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_));
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

GPTDIST_ANY_LIBRARY(m) { m.impl("cuda_versions", TORCH_BOX(&cuda_versions)); }

}  // namespace gptdist
