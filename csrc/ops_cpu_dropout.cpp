// dropout on the CPU: argument checks, output, threads. Kernel: cpu/dropout.h.

#include <climits>

#include "cpu/dropout.h"
#include "ops_cpu.h"

namespace {

using namespace gptdist;

template <class T>
void drop(cpu::Dropout<T> whole, const Tensor& x, Tensor& y) {
  const cpu::DropoutKernel<T> kernel = cpu::dropout_kernel<T>(active_isa());
  whole.x = static_cast<const T*>(x.data_ptr());
  whole.y = static_cast<T*>(y.data_ptr());
  parallel_blocks(rows_and_channels(x), 1, [&](int64_t begin, int64_t end) {
    cpu::Dropout<T> part = whole;
    part.begin = begin;
    part.end = end;
    kernel(part);
  });
}

// x (B, T, C) contiguous fp32 or bf16, key an int64 scalar, sample_ids int64 (B,). Returns y like x.
Tensor dropout(const Tensor& x, double p, const Tensor& key, const Tensor& sample_ids, int64_t site,
               int64_t row_offset) {
  const CpuCall call("dropout");
  STD_TORCH_CHECK(x.dim() == 3, "dropout: x has shape ", shape_name(x), ", expected (B, T, C)");
  call.contiguous(x, "x");
  const bool bf16 = call.is_bf16(x, "x");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: probability is ", p, ", expected 0 <= p < 1");
  STD_TORCH_CHECK(site >= 0 && site < 1 << 16, "dropout: site is ", site, ", expected 0 <= site < 65536");
  STD_TORCH_CHECK(row_offset >= 0 && row_offset <= INT_MAX, "dropout: row_offset is ", row_offset, ", expected 0 to ",
                  INT_MAX);
  const int64_t* ids = call.vector<int64_t>(sample_ids, "sample_ids", x.size(0), "B");
  const uint64_t words = uint64_t(*call.vector<int64_t>(key, "key", 1, "1"));
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const auto whole = [&](auto element) {
    return cpu::Dropout<decltype(element)>{nullptr, nullptr, ids, x.size(1), x.size(2), words,
                                           uint32_t(p * 4294967296.0), uint32_t(site), uint32_t(row_offset),
                                           float(1.0 / (1.0 - p)), 0, 0};
  };
  bf16 ? drop(whole(Bf16{}), x, y) : drop(whole(float{}), x, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
}
