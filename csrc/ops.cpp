// The library gptdist_c: its schemas, and bias_gelu on the CPU. ops*.cpp alone know tensors, and only through torch's
// stable ABI, so that one build serves every later torch. Kernels are torch-free: pointers and sizes.

#include <optional>
#include <tuple>

#include "cpu/bias_gelu.h"
#include "ops_cpu.h"
#include "schemas.h"

namespace {

using namespace gptdist;

constexpr int64_t kRowsPerPartial = gptdist::cpu::kRowsPerPartial;

// Select an instruction set (0 portable, 1 AVX2, 2 AVX-512, 3 with bf16 products; any other value leaves it) no higher than
// the processor's best. Returns the one in use. For tests and diagnosis.
int64_t cpu_isa(int64_t level) {
  if (level >= 0 && level <= int64_t(gptdist::cpu::best_isa())) active_isa() = Isa(level);
  return int64_t(active_isa().load());
}

void check_bias(const std::optional<Tensor>& bias, int64_t channels) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous(), "bias_gelu: bias must be contiguous fp32");
  STD_TORCH_CHECK(bias->numel() == channels, "bias_gelu: bias has ", bias->numel(), " elements, expected C=", channels);
}

const float* bias_pointer(const std::optional<Tensor>& bias) {
  return bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
}

template <class T>
void forward(const Tensor& x, const std::optional<Tensor>& bias, Tensor& y) {
  const Shape shape = rows_and_channels(x);
  const Isa isa = active_isa();
  const T* x_data = static_cast<const T*>(x.data_ptr());
  T* y_data = static_cast<T*>(y.data_ptr());
  const float* bias_data = bias_pointer(bias);
  parallel_blocks(shape, 1, [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * shape.channels;
    gptdist::cpu::bias_gelu_forward({x_data + offset, bias_data, y_data + offset, end - begin, shape.channels}, isa);
  });
}

template <class T>
void backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias, Tensor& dx, float* partials) {
  const Shape shape = rows_and_channels(x);
  const Isa isa = active_isa();
  const T* dy_data = static_cast<const T*>(dy.data_ptr());
  const T* x_data = static_cast<const T*>(x.data_ptr());
  T* dx_data = static_cast<T*>(dx.data_ptr());
  const float* bias_data = bias_pointer(bias);
  parallel_blocks(shape, kRowsPerPartial, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * kRowsPerPartial;
      const int64_t rows = shape.rows - row < kRowsPerPartial ? shape.rows - row : kRowsPerPartial;
      const int64_t offset = row * shape.channels;
      float* partial = partials ? partials + block * shape.channels : nullptr;
      gptdist::cpu::bias_gelu_backward(
          {dy_data + offset, x_data + offset, bias_data, dx_data + offset, partial, rows, shape.channels}, isa);
    }
  });
}

// x: [..., C] contiguous fp32 or bf16. bias: [C] fp32 or none. Returns y like x.
Tensor bias_gelu_fwd(const Tensor& x, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "bias_gelu: x must be contiguous, (..., C)");
  check_bias(bias, x.size(x.dim() - 1));
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  switch (x.scalar_type()) {
    case ScalarType::Float: forward<float>(x, bias, y); break;
    case ScalarType::BFloat16: forward<Bf16>(x, bias, y); break;
    default: STD_TORCH_CHECK(false, "bias_gelu: x must be fp32 or bf16");
  }
  return y;
}

// Returns (dx like x, dbias [C] fp32; dbias is empty without a bias). Both are overwritten fresh buffers.
std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && dy.is_contiguous(), "bias_gelu: x and dy must be contiguous, (..., C)");
  STD_TORCH_CHECK(dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(), "bias_gelu: dy must match x");
  check_bias(bias, x.size(x.dim() - 1));
  const Shape shape = rows_and_channels(x);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dbias = torch::stable::new_zeros(x, {bias ? shape.channels : 0}, ScalarType::Float);
  if (x.numel() == 0) return {dx, dbias};

  const int64_t blocks = block_count(shape, kRowsPerPartial);
  Tensor partials = torch::stable::new_empty(x, {bias ? blocks : 0, shape.channels}, ScalarType::Float);
  float* partial_data = bias ? static_cast<float*>(partials.data_ptr()) : nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Float: backward<float>(dy, x, bias, dx, partial_data); break;
    case ScalarType::BFloat16: backward<Bf16>(dy, x, bias, dx, partial_data); break;
    default: STD_TORCH_CHECK(false, "bias_gelu: x must be fp32 or bf16");
  }
  if (bias) {
    float* dbias_data = static_cast<float*>(dbias.data_ptr());
    const int64_t grain = kElementsPerThread / blocks + 1;
    torch::stable::parallel_for(0, shape.channels, grain, [&](int64_t begin, int64_t end) {
      gptdist::cpu::fold_partials(partial_data, blocks, shape.channels, begin, end, dbias_data);
    });
  }
  return {dx, dbias};
}

}  // namespace


STABLE_TORCH_LIBRARY(gptdist_c, m) {
  for (const char* schema : gptdist::kSchemas) m.def(schema);
  m.def("cpu_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
