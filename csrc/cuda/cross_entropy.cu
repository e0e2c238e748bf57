// Cross entropy of rows of logits against one target each.
//
//   lse = m + log(sum over v of exp(z[v] - m)),  m = max z,  loss = (m - z[t]) + log(sum)
//   dz = dloss (exp(z - lse) - onehot(t))
//
// Memory, n = rows * vocabulary elements: forward reads n, backward reads n and writes n; a target, loss, lse and dloss
// a row. Rows that are ignored are not read in the backward, only overwritten with zeros.
//
// Launch: a block per row, of 32 to 512 threads: one sweep of the block is 4 vectors a thread, 32 KB for 512 threads,
// and GPT-2's 50257 classes in bf16 are three sweeps and a vector. Two such blocks keep a multiprocessor's memory busy.
// Rows begin anywhere (an odd vocabulary): up to 15 elements at the head and 7 at the tail are read one by one, so that
// the body consists of 16-byte vectors from a 32-byte boundary on. (From a 16-byte boundary an access of a warp touches
// 17 sectors for the bytes of 16: at 50257 classes 6% more sectors, counted by ptxvm.)
//
// Online softmax: a thread keeps the largest logit so far and the sum of exp(z - max), and scales the sum when the
// maximum grows: once for every 4 vectors, not for every element. The threads' pairs are merged in a fixed order.
// The loss is (m - z[t]) + log(sum), not lse - z[t]: a small loss keeps its digits where m is large.
//
// Accuracy: fp32. exp is ex2((z - m) log2 e): the relative error of a term is below 2^-22 + 2^-23 |z - m|, of the sum
// about 2^-22 plus the additions' (at most vocabulary / threads + 20 in sequence).
//
// Special values, as torch.logsumexp has them: -inf (a padded class) has no weight and no gradient. A row of -inf only
// has lse -inf and loss NaN. +inf makes lse inf, and the loss inf, or NaN where the target is +inf. NaN spreads to the
// row. A target outside [0, vocabulary) that is not ignore_index makes the loss and the row's gradients NaN.

#include "common/host.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "launch.h"

namespace gptdist::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// A row as elements [0, head), vectors, elements [tail, length). The vectors begin at a multiple of 32 bytes; head and
// tail have fewer elements than a warp has threads.
struct Split {
  int32_t head, vectors, tail;
};

template <class T>
__device__ __forceinline__ Split split_row(const T* row, int32_t length) {
  constexpr int kVector = vector_elements<T>(), kSector = 32 / int(sizeof(T));
  const int32_t past_boundary = int32_t(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (kSector - 1);
  const int32_t head = min((kSector - past_boundary) & (kSector - 1), length);
  const int32_t vectors = (length - head) / kVector;
  return {head, vectors, head + vectors * kVector};
}

// The sum of exp(z - max) over the logits seen so far.
struct Online {
  float max = -INFINITY, sum = 0.0f;

  // What is subtracted from logits: max, or 0 where the difference would be inf - inf.
  static __device__ __forceinline__ float base_of(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }

  static __device__ __forceinline__ float exp_of(float z) { return exp2_approx(z * kLog2e); }

  // The sum as if `new_max` were subtracted.
  __device__ __forceinline__ float scaled_sum(float new_max) const { return sum * exp_of(max - base_of(new_max)); }

  template <int kVectors, int kVector>
  __device__ __forceinline__ void add(const float (&z)[kVectors][kVector]) {
    float new_max = max;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) new_max = fmaxf(new_max, z[k][i]);
    }
    const float base = base_of(new_max);
    float sums[kVectors] = {};  // apart, so that the additions need not wait for each other
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) sums[k] += exp_of(z[k][i] - base);
    }
    sum = scaled_sum(new_max);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) sum += sums[k];
    max = new_max;
  }

  __device__ __forceinline__ void add(float z) {
    const float one[1][1] = {{z}};
    add(one);
  }

  // Over the lanes of a warp; all lanes get the result.
  __device__ __forceinline__ Online over_warp() const {
    Online all;
    all.max = warp_max(max);
    all.sum = warp_sum(scaled_sum(all.max));
    return all;
  }
};

template <class T, int kCount>
__device__ __forceinline__ void add_vectors(Online& online, const T* body, int32_t first, int32_t step) {
  constexpr int kVector = vector_elements<T>();
  Vector<T, kVector> loaded[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) loaded[k] = Vector<T, kVector>::load(body + int64_t(first + k * step) * kVector);
  float z[kCount][kVector];
#pragma unroll
  for (int k = 0; k < kCount; ++k) loaded[k].to_floats(z[k]);
  online.add(z);
}

}  // namespace

template <class T>
__global__ void __launch_bounds__(kEntropyMaxThreads)
cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyForward args) {
  __shared__ float warp_max_of[kEntropyMaxThreads / kWarpSize], warp_sum_of[kEntropyMaxThreads / kWarpSize];
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
  const int32_t thread = threadIdx.x, threads = blockDim.x;

  // The target's logit, on its way while the row is read; one thread will want it.
  const int64_t target = args.targets[row];
  const bool ignored = target == args.ignore_index, in_range = target >= 0 && target < args.vocabulary;
  const float picked = thread == 0 && in_range ? to_float(logits[target]) : NAN;

  const Split split = split_row(logits, args.vocabulary);
  const T* body = logits + split.head;
  Online online;
  if (thread < split.head) online.add(to_float(logits[thread]));
  if (split.tail + thread < args.vocabulary) online.add(to_float(logits[split.tail + thread]));
  int32_t v = thread;
  for (; v + (kEntropyVectors - 1) * threads < split.vectors; v += kEntropyVectors * threads) {
    add_vectors<T, kEntropyVectors>(online, body, v, threads);
  }
  for (; v < split.vectors; v += threads) add_vectors<T, 1>(online, body, v, threads);

  const int warp = thread / kWarpSize, lane = thread % kWarpSize, warps = threads / kWarpSize;
  online = online.over_warp();
  if (lane == 0) {
    warp_max_of[warp] = online.max;
    warp_sum_of[warp] = online.sum;
  }
  __syncthreads();
  if (warp != 0) return;
  online = Online{};
  if (lane < warps) {
    online.max = warp_max_of[lane];
    online.sum = warp_sum_of[lane];
  }
  online = online.over_warp();
  if (lane != 0) return;
  const float log_sum = logf(online.sum);
  args.lse[row] = online.max + log_sum;
  args.loss[row] = ignored ? 0.0f : (online.max - picked) + log_sum;
}

template <class T>
__global__ void __launch_bounds__(kEntropyMaxThreads)
cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackward args) {
  constexpr int kVector = vector_elements<T>();
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
  T* dlogits = static_cast<T*>(args.dlogits) + row * args.row_stride;
  const int32_t thread = threadIdx.x, threads = blockDim.x;
  const Split split = split_row(dlogits, args.vocabulary);
  T* dbody = dlogits + split.head;

  const int64_t target = args.targets[row];
  if (target == args.ignore_index) {
    if (thread < split.head) dlogits[thread] = from_float<T>(0.0f);
    if (split.tail + thread < args.vocabulary) dlogits[split.tail + thread] = from_float<T>(0.0f);
    for (int32_t v = thread; v < split.vectors; v += threads) {
      Vector<T, kVector>::zero().store(dbody + int64_t(v) * kVector);
    }
    return;
  }
  const bool in_range = target >= 0 && target < args.vocabulary;
  const int32_t own_class = in_range ? int32_t(target) : -1;
  const float dloss = in_range ? args.dloss[row] : NAN, lse = args.lse[row];

  const auto probability = [&](float z) { return exp2_approx((z - lse) * kLog2e); };
  // Whoever reads an element also writes it, so dlogits may be logits.
  const auto one = [&](int32_t v) {
    const float p = probability(to_float(logits[v]));
    dlogits[v] = from_float<T>(dloss * (v == own_class ? p - 1.0f : p));
  };
  if (thread < split.head) one(thread);
  if (split.tail + thread < args.vocabulary) one(split.tail + thread);

  const T* body = logits + split.head;
  for (int32_t first = thread; first < split.vectors; first += kEntropyVectors * threads) {
    Vector<T, kVector> loaded[kEntropyVectors];
#pragma unroll
    for (int k = 0; k < kEntropyVectors; ++k) {
      const int32_t v = first + k * threads;
      loaded[k] = v < split.vectors ? Vector<T, kVector>::load(body + int64_t(v) * kVector)
                                    : Vector<T, kVector>::zero();
    }
#pragma unroll
    for (int k = 0; k < kEntropyVectors; ++k) {
      const int32_t v = first + k * threads;
      if (v >= split.vectors) break;
      float z[kVector];
      loaded[k].to_floats(z);
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = probability(z[i]);
      // The target is in one vector of the row: one comparison a vector, not one an element.
      const uint32_t own = uint32_t(own_class - split.head - v * kVector);
      if (own < uint32_t(kVector)) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] = uint32_t(i) == own ? z[i] - 1.0f : z[i];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] *= dloss;
      Vector<T, kVector>::from_floats(z).store(dbody + int64_t(v) * kVector);
    }
  }
}

// Launchers.

namespace {

Error check(int64_t rows, int64_t row_stride, int32_t vocabulary, const LaunchPlan& plan) {
  if (vocabulary < 1 || row_stride < vocabulary) {
    return error("cross_entropy: rows are %lld elements apart, expected at least the vocabulary of %d, and that 1",
                 (long long)row_stride, vocabulary);
  }
  if (plan.grid[0] == 0) return error("cross_entropy: %lld rows, more than a grid holds", (long long)rows);
  return nullptr;
}

Error wrong_type(Dtype dtype) {
  return error("cross_entropy: the type of the logits is %d, expected 0 (fp32), 1 (bf16) or 2 (fp16)", int(dtype));
}

}  // namespace

Error cross_entropy_forward(const CrossEntropyForward& args, Stream stream) {
  if (args.rows == 0) return nullptr;
  const LaunchPlan plan = plan_cross_entropy_forward(args);
  if (const Error wrong = check(args.rows, args.row_stride, args.vocabulary, plan)) return wrong;
  switch (args.dtype) {
    case Dtype::kFp32: return launch(cross_entropy_forward_kernel<float>, plan, args, stream);
    case Dtype::kBf16: return launch(cross_entropy_forward_kernel<Bf16>, plan, args, stream);
    case Dtype::kFp16: return launch(cross_entropy_forward_kernel<Fp16>, plan, args, stream);
  }
  return wrong_type(args.dtype);
}

Error cross_entropy_backward(const CrossEntropyBackward& args, Stream stream) {
  if (args.rows == 0) return nullptr;
  const LaunchPlan plan = plan_cross_entropy_backward(args);
  if (const Error wrong = check(args.rows, args.row_stride, args.vocabulary, plan)) return wrong;
  switch (args.dtype) {
    case Dtype::kFp32: return launch(cross_entropy_backward_kernel<float>, plan, args, stream);
    case Dtype::kBf16: return launch(cross_entropy_backward_kernel<Bf16>, plan, args, stream);
    case Dtype::kFp16: return launch(cross_entropy_backward_kernel<Fp16>, plan, args, stream);
  }
  return wrong_type(args.dtype);
}

}  // namespace gptdist::cuda
