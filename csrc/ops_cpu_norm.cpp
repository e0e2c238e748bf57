// layer_norm and residual_layer_norm on the CPU: argument checks, outputs, threads. Kernels: cpu/layer_norm.h.

#include <optional>
#include <tuple>

#include "cpu/bias_gelu.h"
#include "cpu/layer_norm.h"
#include "ops_cpu.h"

namespace {

using namespace gptdist;

using NormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NormGradients = std::tuple<Tensor, Tensor, Tensor>;

// Checks what does not depend on dtypes; the width.
int64_t check_norm(const CpuCall& call, const Tensor& x, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0, "layer_norm: ", name, " is a scalar, expected (..., C)");
  call.contiguous(x, name);
  const int64_t width = x.size(x.dim() - 1);
  call.vector<float>(weight, "weight", width, "C");
  return width;
}

template <class X, class S, class Y>
void forward(const Tensor& x, const Tensor* residual, const float* weight, const float* bias, float eps, Tensor& y,
             Tensor& sum, Tensor& mean, Tensor& rstd) {
  const Shape shape = rows_and_channels(x);
  const Isa isa = active_isa();
  const cpu::NormForward<X, S, Y> whole{
      static_cast<const X*>(x.data_ptr()),
      residual ? static_cast<const S*>(residual->data_ptr()) : nullptr,
      weight,
      bias,
      static_cast<Y*>(y.data_ptr()),
      residual ? static_cast<S*>(sum.data_ptr()) : nullptr,
      static_cast<float*>(mean.data_ptr()),
      static_cast<float*>(rstd.data_ptr()),
      shape.rows,
      shape.channels,
      eps};
  parallel_blocks(shape, 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * shape.channels;
    cpu::NormForward<X, S, Y> part = whole;
    part.x += offset;
    part.y += offset;
    if (part.residual != nullptr) part.residual += offset, part.sum += offset;
    part.mean += begin;
    part.rstd += begin;
    part.rows = end - begin;
    cpu::norm_forward(part, isa);
  });
}

// (y, sum, mean, rstd); sum is x itself without a residual.
NormOutputs norm_forward(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                         const std::optional<Tensor>& bias, double eps, bool to_bf16) {
  const CpuCall call(op);
  const int64_t width = check_norm(call, x, "x", weight);
  const bool bf16 = call.is_bf16(x, "x");
  const float* weight_data = static_cast<const float*>(weight.data_ptr());
  const float* bias_data = bias ? call.vector<float>(*bias, "bias", width, "C") : nullptr;
  const auto statistics_shape = x.sizes().slice(0, x.dim() - 1);
  Tensor y = to_bf16 ? torch::stable::new_empty(x, x.sizes(), ScalarType::BFloat16) : torch::stable::empty_like(x);
  Tensor sum = x, mean = torch::stable::new_empty(x, statistics_shape, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, statistics_shape, ScalarType::Float);
  bool sum_bf16 = bf16;
  if (residual) {
    call.same_shape(*residual, "residual", x, "x");
    call.contiguous(*residual, "residual");
    sum_bf16 = call.is_bf16(*residual, "residual");
    STD_TORCH_CHECK(bf16 || !sum_bf16, op, ": residual is bfloat16, expected float32 as x");
    sum = torch::stable::empty_like(*residual);
  }
  if (x.numel() == 0) return {y, sum, mean, rstd};

  const auto run = [&](auto kernel) { kernel(x, residual, weight_data, bias_data, float(eps), y, sum, mean, rstd); };
  if (to_bf16) {
    STD_TORCH_CHECK(!bf16, op, ": x is bfloat16, expected float32");
    run(forward<float, float, Bf16>);
  } else if (!bf16) {
    run(forward<float, float, float>);
  } else if (sum_bf16) {
    run(forward<Bf16, Bf16, Bf16>);
  } else {
    run(forward<Bf16, float, Bf16>);
  }
  return {y, sum, mean, rstd};
}

// dx, and each block's partial sums of dweight and dbias: [2, blocks, C].
template <class Y, class S>
void backward(const Tensor& dy, const Tensor* ds, const Tensor& s, const float* mean, const float* rstd,
              const float* weight, Tensor& dx, float* partials) {
  const Shape shape = rows_and_channels(s);
  const Isa isa = active_isa();
  constexpr int64_t kBlock = cpu::kNormRowsPerPartial;
  const int64_t blocks = block_count(shape, kBlock);
  parallel_blocks(shape, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kBlock, offset = row * shape.channels;
      const int64_t rows = shape.rows - row < kBlock ? shape.rows - row : kBlock;
      cpu::norm_backward(
          cpu::NormBackward<Y, S>{static_cast<const Y*>(dy.data_ptr()) + offset,
                                  ds ? static_cast<const S*>(ds->data_ptr()) + offset : nullptr,
                                  static_cast<const S*>(s.data_ptr()) + offset, mean + row, rstd + row, weight,
                                  static_cast<S*>(dx.data_ptr()) + offset, partials + block * shape.channels,
                                  partials + (blocks + block) * shape.channels, rows, shape.channels},
          isa);
    }
  });
}

// (dx, dweight, dbias) of s, which is x or the sum; ds joins dx.
NormGradients norm_backward(const char* op, const Tensor& dy, const Tensor* ds, const Tensor& s, const char* s_name,
                            const Tensor& mean, const Tensor& rstd, const Tensor& weight, bool has_bias) {
  const CpuCall call(op);
  const int64_t width = check_norm(call, s, s_name, weight);
  const Shape shape = rows_and_channels(s);
  const bool bf16 = call.is_bf16(dy, "dy"), sum_bf16 = call.is_bf16(s, s_name);
  STD_TORCH_CHECK(bf16 || !sum_bf16, op, ": ", s_name, " is bfloat16, expected float32 as dy");
  call.same_shape(dy, "dy", s, s_name);
  call.contiguous(dy, "dy");
  const float* mean_data = call.vector<float>(mean, "mean", shape.rows, "rows");
  const float* rstd_data = call.vector<float>(rstd, "rstd", shape.rows, "rows");
  if (ds) {
    call.same_shape(*ds, "ds", s, s_name);
    call.contiguous(*ds, "ds");
    STD_TORCH_CHECK(ds->scalar_type() == s.scalar_type(), op, ": ds is ", dtype_name(ds->scalar_type()), ", expected ",
                    dtype_name(s.scalar_type()), " as ", s_name);
  }
  Tensor dx = torch::stable::empty_like(s);
  Tensor dweight = torch::stable::new_zeros(s, {width}, ScalarType::Float);
  Tensor dbias = torch::stable::new_zeros(s, {has_bias ? width : 0}, ScalarType::Float);
  if (s.numel() == 0) return {dx, dweight, dbias};

  const int64_t blocks = block_count(shape, cpu::kNormRowsPerPartial);
  Tensor partials = torch::stable::new_empty(s, {2, blocks, width}, ScalarType::Float);
  float* partial_data = static_cast<float*>(partials.data_ptr());
  const float* weight_data = static_cast<const float*>(weight.data_ptr());
  const auto run = [&](auto kernel) { kernel(dy, ds, s, mean_data, rstd_data, weight_data, dx, partial_data); };
  if (!bf16) {
    run(backward<float, float>);
  } else if (sum_bf16) {
    run(backward<Bf16, Bf16>);
  } else {
    run(backward<Bf16, float>);
  }
  cpu::fold_partials(partial_data, blocks, width, 0, width, static_cast<float*>(dweight.data_ptr()));
  if (has_bias) {
    cpu::fold_partials(partial_data + blocks * width, blocks, width, 0, width, static_cast<float*>(dbias.data_ptr()));
  }
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias, double eps) {
  const auto [y, sum, mean, rstd] = norm_forward("layer_norm", x, nullptr, weight, bias, eps, false);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_to_bf16_fwd(const Tensor& x, const Tensor& weight,
                                                          const std::optional<Tensor>& bias, double eps) {
  const auto [y, sum, mean, rstd] = norm_forward("layer_norm", x, nullptr, weight, bias, eps, true);
  return {y, mean, rstd};
}

NormOutputs residual_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps) {
  return norm_forward("residual_layer_norm", x, &residual, weight, bias, eps, false);
}

NormGradients layer_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                             const Tensor& weight, bool has_bias) {
  return norm_backward("layer_norm", dy, nullptr, x, "x", mean, rstd, weight, has_bias);
}

NormGradients residual_layer_norm_bwd(const Tensor& dy, const Tensor& ds, const Tensor& sum, const Tensor& mean,
                                      const Tensor& rstd, const Tensor& weight, bool has_bias) {
  return norm_backward("residual_layer_norm", dy, &ds, sum, "sum", mean, rstd, weight, has_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_to_bf16_fwd", TORCH_BOX(&layer_norm_to_bf16_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("residual_layer_norm_fwd", TORCH_BOX(&residual_layer_norm_fwd));
  m.impl("residual_layer_norm_bwd", TORCH_BOX(&residual_layer_norm_bwd));
}
