// cross_entropy on the CPU: argument checks, outputs, threads. Kernels: cpu/cross_entropy.h.

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cross_entropy.h"
#include "ops_cpu.h"

namespace {

using namespace gptdist;

int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1); }

// Checks logits (N, V), whose rows may lie apart, and targets; a target that is no column is an error.
const int64_t* check_rows(const CpuCall& call, const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  STD_TORCH_CHECK(logits.dim() == 2, "cross_entropy: logits has shape ", shape_name(logits), ", expected (N, V)");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary >= 1, "cross_entropy: logits have V=0, expected 1 or more");
  STD_TORCH_CHECK(logits.is_cpu(), "cross_entropy: logits is on another device, expected cpu");
  STD_TORCH_CHECK(vocabulary == 1 || logits.stride(1) == 1, "cross_entropy: logits has rows that are not contiguous: copy it");
  STD_TORCH_CHECK(rows <= 1 || logits.stride(0) >= vocabulary, "cross_entropy: logits has rows that overlap: copy it");
  const int64_t* data = call.vector<const int64_t>(targets, "targets", rows, "N");
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK((data[row] >= 0 && data[row] < vocabulary) || data[row] == ignore_index,
                    "cross_entropy: targets hold ", data[row], ", expected 0 <= target < ", vocabulary);
  }
  return data;
}

// Calls body(T{}, begin, end) on threads for ranges of rows; T is the logits' element.
template <class Body>
void parallel_rows(const Tensor& logits, bool bf16, const Body& body) {
  parallel_blocks({logits.size(0), logits.size(1)}, 1, [&](int64_t begin, int64_t end) {
    bf16 ? body(Bf16{}, begin, end) : body(float{}, begin, end);
  });
}

template <class T>
T* row_of(const Tensor& x, int64_t row) {
  return static_cast<T*>(x.data_ptr()) + row * row_stride(x);
}

// (loss, lse) of body(T{}, begin, end, targets, loss, lse) for ranges of rows, the pointers being those of row `begin`.
template <class Body>
std::tuple<Tensor, Tensor> losses_of(const Tensor& logits, const Tensor& targets, int64_t ignore_index, const Body& body) {
  const CpuCall call("cross_entropy");
  const int64_t* targets_data = check_rows(call, logits, targets, ignore_index);
  const bool bf16 = call.is_bf16(logits, "logits");
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  Tensor lse = torch::stable::empty_like(loss);
  float* loss_data = static_cast<float*>(loss.data_ptr());
  float* lse_data = static_cast<float*>(lse.data_ptr());
  parallel_rows(logits, bf16, [&](auto element, int64_t begin, int64_t end) {
    body(element, begin, end, targets_data + begin, loss_data + begin, lse_data + begin);
  });
  return {loss, lse};
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  const Isa isa = active_isa();
  return losses_of(logits, targets, ignore_index, [&](auto element, int64_t begin, int64_t end, auto... rows) {
    using T = decltype(element);
    cpu::cross_entropy_forward(cpu::CrossEntropyForward<T>{row_of<const T>(logits, begin), rows..., end - begin,
                                                           logits.size(1), row_stride(logits), ignore_index},
                               isa);
  });
}

// Overwrites `dlogits`, which has the strides of `logits` or is `logits`.
void backward(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse, int64_t ignore_index,
              const Tensor& dlogits) {
  const CpuCall call("cross_entropy");
  const int64_t* targets_data = check_rows(call, logits, targets, ignore_index);
  const bool bf16 = call.is_bf16(logits, "logits");
  const float* dloss_data = call.vector<float>(dloss, "dloss", logits.size(0), "N");
  const float* lse_data = call.vector<float>(lse, "lse", logits.size(0), "N");
  const Isa isa = active_isa();
  parallel_rows(logits, bf16, [&](auto element, int64_t begin, int64_t end) {
    using T = decltype(element);
    cpu::cross_entropy_backward(
        cpu::CrossEntropyBackward<T>{dloss_data + begin, row_of<const T>(logits, begin), targets_data + begin,
                                     lse_data + begin, row_of<T>(dlogits, begin), end - begin, logits.size(1),
                                     row_stride(logits), ignore_index},
        isa);
  });
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                         int64_t ignore_index) {
  CpuCall("cross_entropy").contiguous(logits, "logits");  // as the gradient will be
  Tensor dlogits = torch::stable::empty_like(logits);
  backward(dloss, logits, targets, lse, ignore_index, dlogits);
  return dlogits;
}

void cross_entropy_bwd_(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                        int64_t ignore_index) {
  backward(dloss, logits, targets, lse, ignore_index, logits);
}

// (loss, lse); the logits become their gradient for a dloss of 1.
std::tuple<Tensor, Tensor> cross_entropy_gradient_(const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  const Isa isa = active_isa();
  return losses_of(logits, targets, ignore_index, [&](auto element, int64_t begin, int64_t end, auto... rows) {
    using T = decltype(element);
    std::vector<float> scratch(logits.size(1));
    cpu::cross_entropy_gradient(
        cpu::CrossEntropyGradient<T>{row_of<T>(logits, begin), rows..., scratch.data(), end - begin, logits.size(1),
                                     row_stride(logits), ignore_index},
        isa);
  });
}

// out = (x + addend) scale. out, addend: fp32, and may be one tensor; x: fp32 or bf16; all of one shape, contiguous.
void scaled_sum_(const Tensor& out, const Tensor& x, const std::optional<Tensor>& addend, double scale) {
  const CpuCall call("scaled_sum_");
  const bool bf16 = call.is_bf16(x, "x");
  call.contiguous(x, "x");
  float* out_data = call.vector<float>(out, "out", x.numel(), "x's");
  const float* addend_data = addend ? call.vector<float>(*addend, "addend", x.numel(), "x's") : nullptr;
  const Isa isa = active_isa();
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T* x_data = static_cast<const T*>(x.data_ptr());
    torch::stable::parallel_for(0, x.numel(), kElementsPerThread, [&](int64_t begin, int64_t end) {
      const float* addend_part = addend_data ? addend_data + begin : nullptr;
      cpu::scaled_sum(cpu::ScaledSum<T>{x_data + begin, addend_part, out_data + begin, end - begin, float(scale)}, isa);
    });
  };
  bf16 ? run(Bf16{}) : run(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  m.impl("scaled_sum_", TORCH_BOX(&scaled_sum_));
}
