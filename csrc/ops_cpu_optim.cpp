// The CPU ops of the optimizer, on lists of tensors: argument checks and threads. See ops.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/adamw.h"
#include "cpu/grad_norm.h"
#include "ops_cpu.h"

namespace {

using namespace gptdist;
using gptdist::cpu::Dtype;
using Tensors = std::vector<Tensor>;

Dtype float_dtype(const char* op, const Tensor& x, const char* list, size_t i) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFp32;
    case ScalarType::BFloat16: return Dtype::kBf16;
    case ScalarType::Half: return Dtype::kFp16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", list, "[", i, "] must be float32, bfloat16 or float16");
}

const Tensor& readable(const char* op, const Tensor& x, const char* list, size_t i) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", list, "[", i, "] must be on the CPU");
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", list, "[", i, "] must be contiguous");
  return x;
}

// Tensors cut into chunks: chunk first_chunks[i] is the first of tensor i, first_chunks.back() is their number.
struct Chunks {
  int64_t size;  // elements of a chunk; a tensor's last may have fewer
  std::vector<int64_t> first_chunks;
  int64_t elements = 0;

  Chunks(const Tensors& tensors, int64_t chunk) : size(chunk), first_chunks{0} {
    for (const Tensor& x : tensors) {
      elements += x.numel();
      first_chunks.push_back(first_chunks.back() + (x.numel() + chunk - 1) / chunk);
    }
  }

  int64_t count() const { return first_chunks.back(); }

  // Calls body(chunk, tensor, its first element there) for all chunks, on threads.
  template <class Body>
  void parallel(const Body& body) const {
    if (count() == 0) return;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread * count() / elements);
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) - first_chunks.begin() - 1;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= first_chunks[i + 1]) ++i;  // empty tensors have no chunk
        body(chunk, i, (chunk - first_chunks[i]) * size);
      }
    });
  }
};

// Pointers and dtypes of tensor i, checked.
gptdist::cpu::AdamWChunk whole_tensor(const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                                      const Tensors& exp_avg_sq, const Tensors& shadows, size_t i) {
  const auto pointer = [&](const Tensors& list, const char* name) {
    const int64_t elements = readable("adamw_", list[i], name, i).numel();
    STD_TORCH_CHECK(elements == params[i].numel(), "adamw_: ", name, "[", i, "] has ", elements,
                    " elements, expected ", params[i].numel(), " as params[", i, "]");
    return list[i].data_ptr();
  };
  const auto fp32 = [&](const Tensors& list, const char* name) {
    STD_TORCH_CHECK(list[i].scalar_type() == ScalarType::Float, "adamw_: ", name, "[", i, "] must be float32");
    return static_cast<float*>(pointer(list, name));
  };
  gptdist::cpu::AdamWChunk whole{};
  whole.param = fp32(params, "params");
  whole.grad = pointer(grads, "grads");
  whole.grad_dtype = float_dtype("adamw_", grads[i], "grads", i);
  whole.exp_avg = fp32(exp_avg, "exp_avg");
  whole.exp_avg_sq = fp32(exp_avg_sq, "exp_avg_sq");
  whole.elements = params[i].numel();
  if (shadows.empty()) return whole;
  whole.shadow = pointer(shadows, "shadows");
  whole.shadow_dtype = float_dtype("adamw_", shadows[i], "shadows", i);
  STD_TORCH_CHECK(whole.shadow_dtype != Dtype::kFp32, "adamw_: shadows[", i, "] must be bfloat16 or float16");
  return whole;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }

gptdist::cpu::AdamWChunk chunk_of(gptdist::cpu::AdamWChunk t, int64_t first) {
  t.param += first;
  t.exp_avg += first;
  t.exp_avg_sq += first;
  t.grad = static_cast<const char*>(t.grad) + first * bytes_of(t.grad_dtype);
  if (t.shadow != nullptr) t.shadow = static_cast<char*>(t.shadow) + first * 2;
  t.elements = std::min(t.elements - first, gptdist::cpu::kAdamWChunk);
  return t;
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors shadows,
            std::optional<Tensor> grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
            int64_t step) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count &&
                      (shadows.empty() || shadows.size() == count),
                  "adamw_: the lists must have one tensor for each of the ", count, " params");
  STD_TORCH_CHECK(step >= 1, "adamw_: step is ", step, ", expected at least 1");
  float scale = 1.0f;
  if (grad_scale) {
    STD_TORCH_CHECK(grad_scale->is_cpu() && grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float,
                    "adamw_: grad_scale must be one float32 on the CPU");
    scale = *static_cast<const float*>(grad_scale->data_ptr());
  }
  std::vector<gptdist::cpu::AdamWChunk> wholes;
  for (size_t i = 0; i < count; ++i) wholes.push_back(whole_tensor(params, grads, exp_avg, exp_avg_sq, shadows, i));
  const gptdist::AdamWScalars scalars = gptdist::adamw_scalars(lr, beta1, beta2, eps, weight_decay, step);
  const gptdist::cpu::Isa isa = gptdist::cpu::active_isa();
  Chunks(params, gptdist::cpu::kAdamWChunk).parallel([&](int64_t, size_t i, int64_t first) {
    gptdist::cpu::adamw(chunk_of(wholes[i], first), scalars, scale, isa);
  });
}

// The norm over all tensors: (), fp32.
Tensor grad_norm(Tensors tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "grad_norm: the list is empty");
  std::vector<Dtype> dtypes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    dtypes.push_back(float_dtype("grad_norm", readable("grad_norm", tensors[i], "tensors", i), "tensors", i));
  }
  const Chunks chunks(tensors, gptdist::cpu::kNormChunk);
  std::vector<double> sums(chunks.count());
  const gptdist::cpu::Isa isa = gptdist::cpu::active_isa();
  chunks.parallel([&](int64_t chunk, size_t i, int64_t first) {
    const void* x = static_cast<const char*>(tensors[i].data_ptr()) + first * bytes_of(dtypes[i]);
    const int64_t elements = std::min(tensors[i].numel() - first, chunks.size);
    sums[chunk] = gptdist::cpu::sum_of_squares(x, dtypes[i], elements, isa);
  });
  double sum = 0.0;
  for (const double chunk_sum : sums) sum += chunk_sum;
  Tensor norm = torch::stable::new_empty(tensors[0], {}, ScalarType::Float);
  *static_cast<float*>(norm.data_ptr()) = float(std::sqrt(sum));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptdist_c, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
}
