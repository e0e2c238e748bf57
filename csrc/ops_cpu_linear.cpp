// few_rows_linear on the CPU: argument checks, outputs, threads. Kernels: cpu/few_rows_linear.h.

#include <optional>
#include <vector>

#include "cpu/few_rows_linear.h"
#include "ops_cpu.h"

namespace {

using namespace gptdist;

// Tasks for each thread, so that one which the system holds up leaves its share to the others.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kOutputsStep = 24;  // the kernels' kTileOutputs

template <class T>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  const Shape shape = rows_and_channels(y);
  const cpu::FewRowsLinear<T> args{static_cast<const T*>(x.data_ptr()),
                                   static_cast<const T*>(weight.data_ptr()),
                                   bias ? static_cast<const T*>(bias->data_ptr()) : nullptr,
                                   static_cast<T*>(y.data_ptr()),
                                   shape.rows,
                                   weight.size(1),
                                   shape.channels};
  const auto& kernels = cpu::few_rows_linear_kernels<T>(active_isa());
  std::byte* packed = scratch(ceil_div(kernels.packed_bytes(args.rows, args.inputs), 64) * 64);
  kernels.pack(args, packed);
  const int64_t threads = threads_for_bytes(args.inputs * args.outputs * int64_t(sizeof(T)));
  const int64_t outputs = ceil_div(ceil_div(args.outputs, threads * kTasksPerThread), kOutputsStep) * kOutputsStep;
  run_tasks(ceil_div(args.outputs, outputs), threads, [&](int64_t i) {
    kernels.outputs(args, packed, i * outputs, std::min((i + 1) * outputs, args.outputs));
  });
}

// x: (..., in) of at most kMaxFewRows rows. weight: (out, in). bias: (out) or none. One dtype. Returns (..., out).
Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const CpuCall call("few_rows_linear");
  STD_TORCH_CHECK(x.dim() > 0, "few_rows_linear: x is a scalar, expected (..., in)");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), "few_rows_linear: weight has shape ",
                  shape_name(weight), ", expected (out, in=", x.size(x.dim() - 1), ")");
  STD_TORCH_CHECK(weight.size(1) > 0, "few_rows_linear: weight has shape ", shape_name(weight), ", expected in >= 1");
  const bool bf16 = call.is_bf16(x, "x");
  call.contiguous(x, "x");
  call.same_type(weight, "weight", x, "x");
  call.contiguous(weight, "weight");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "few_rows_linear: bias has shape ",
                    shape_name(*bias), ", expected (out=", weight.size(0), ")");
    call.same_type(*bias, "bias", x, "x");
    call.contiguous(*bias, "bias");
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  const Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const int64_t rows = rows_and_channels(y).rows;
  STD_TORCH_CHECK(rows <= cpu::kMaxFewRows, "few_rows_linear: x has ", rows, " rows, expected at most ",
                  cpu::kMaxFewRows);
  bf16 ? run<Bf16>(x, weight, bias, y) : run<float>(x, weight, bias, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear)); }
