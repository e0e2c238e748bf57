// Layer norm, alone or of a residual sum.
//
//   s = x + r, rounded to sum_dtype (or s = x);  mean, rstd = statistics of the rounded s
//   xhat = (s - mean) rstd,  rstd = (var + eps)^(-1/2),  y = xhat w + b
//   g = dy w,  dx = rstd (g - mean(g) - xhat mean(g xhat)) + ds,  dw = sum over rows of dy xhat,  db = ... of dy
//
// Memory, n = rows * width elements. Forward reads n (2n with a residual) and writes n (2n), and 8 bytes a row of
// statistics. Backward reads 2n (3n with ds), writes n, and 8 * width bytes for each of the P <= 216 partials, which
// the fold reads again. A row is read once: it stays in registers, as fp32 in the forward, packed in the backward. Only
// a backward wider than kBlockMaxWidth reads dy and s twice (the second time from L1 or L2). w and b: from L1 for each
// row in the forward, in registers for all rows in the backward.
//
// Launch, forward: a warp per row up to width 1024 (4 rows in a block of 128 threads), 16, 24 or 32 elements a thread;
// above that a block per row with 16 elements a thread, 96 to 1024 threads. A warp needs no barrier, and its ten
// shuffles are spread over many elements; beyond 32 elements a thread its registers would leave fewer than 16 warps on
// a multiprocessor. 24 exists for GPT-2's 768.
// Launch, backward: the same division, with P blocks that stay and walk the rows: a thread meets the same columns in
// every row, so dw and db are sums in its registers (2 * 16 to 2 * 32 of them). At the end the block's warps are added
// in ascending order through shared memory, and fold_partials adds the P blocks. P depends on the shape alone, and
// there are no atomics: the same bits on any GPU.
//
// Rejected, by what ptxas -v says (no kernel here spills a register, sm_80 to sm_120):
//   w and b loaded before the forward's second reduction: 96 registers instead of 48 at width 768 with fp32 parameters,
//   so half the warps; the widest backward with 512 threads of 32 elements: up to 21 registers spilled, where 1024
//   threads of 16, at distances known to the compiler, spill none.
//
// Accuracy: two-step variance (mean first, then squared deviations), fp32; each result is rounded once. The statistics
// are of the rounded s, so the backward, which reads s, sees exactly what was normalised.
//
// Vectors hold 16 bytes of the widest type that takes part (vector.cuh), so bf16 data with fp32 parameters moves in
// 8-byte accesses: twice the instructions, but every access covers whole sectors.

#include "common/fold_partials.cuh"
#include "common/host.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace gptdist::cuda {
namespace {

template <int kVariant>
constexpr bool kIsBlock = block_per_row(kVariant);

template <int kVariant>
constexpr int kElements = elements_per_thread(kVariant);

// The part of a row that one thread holds: vector k starts at column(k), and is inside where that is below the width.
struct RowShare {
  int32_t thread, threads;  // of those that share the row
  template <int kVector>
  __device__ __forceinline__ int32_t column(int k) const { return (k * threads + thread) * kVector; }
};

template <int kVariant>
__device__ __forceinline__ RowShare row_share() {
  if constexpr (kVariant == kWideBlock) return {int32_t(threadIdx.x), kWideThreads};
  else if constexpr (kVariant == kBlock) return {int32_t(threadIdx.x), int32_t(blockDim.x)};
  else return {int32_t(threadIdx.x) % kWarpSize, kWarpSize};
}

// The vector at row[column], zeros beyond the width.
template <int kVector, class T>
__device__ __forceinline__ Vector<T, kVector> load_inside(const T* row, int32_t column, int32_t width) {
  return column < width ? Vector<T, kVector>::load(row + column) : Vector<T, kVector>::zero();
}

template <bool kBlockPerRow>
__device__ __forceinline__ int64_t first_row() {
  if constexpr (kBlockPerRow) return blockIdx.x;
  else return int64_t(blockIdx.x) * kNormWarps + threadIdx.x / kWarpSize;
}

template <bool kBlockPerRow, class Sum>
__device__ __forceinline__ Sum row_sum(Sum x, Sum* scratch) {
  if constexpr (kBlockPerRow) return block_sum(x, scratch);
  else return warp_sum(x);
}

// sum / width to 1 ulp. A width needs none of a division's range checks, nor its slow path.
__device__ __forceinline__ float mean_of(float sum, int32_t width) {
  const float n = float(width), inverse = reciprocal_approx(n), quotient = sum * inverse;
  return quotient + (sum - quotient * n) * inverse;
}

}  // namespace

// T: x and y. S: residual and sum. P: weight and bias.
template <class T, class S, class P, bool kResidual, int kVariant>
__global__ void __launch_bounds__(layer_norm_threads(LayerNormVariant(kVariant), kMaxWidth))
layer_norm_forward_kernel(const __grid_constant__ LayerNormForward args) {
  constexpr bool kBlockPerRow = kIsBlock<kVariant>;
  constexpr int kVector = vector_elements<T, S, P>(), kVectors = kElements<kVariant> / kVector;
  __shared__ float scratch[2][kWarpSize];
  const RowShare share = row_share<kVariant>();
  const int64_t row = first_row<kBlockPerRow>();
  if (row >= args.rows) return;  // a whole warp
  const int32_t width = args.width;

  const T* x_row = static_cast<const T*>(args.x) + row * width;
  const S* residual_row = static_cast<const S*>(args.residual) + row * width;
  Vector<T, kVector> x[kVectors];
  Vector<S, kVector> residual[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {  // every load before the first use
    const int32_t column = share.column<kVector>(k);
    x[k] = load_inside<kVector>(x_row, column, width);
    if constexpr (kResidual) residual[k] = load_inside<kVector>(residual_row, column, width);
  }

  float s[kVectors][kVector];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    x[k].to_floats(s[k]);
    if constexpr (kResidual) {
      float r[kVector];
      residual[k].to_floats(r);
#pragma unroll
      for (int i = 0; i < kVector; ++i) s[k][i] += r[i];
      const Vector<S, kVector> rounded = Vector<S, kVector>::from_floats(s[k]);
      const int32_t column = share.column<kVector>(k);
      if (column < width) rounded.store(static_cast<S*>(args.sum) + row * width + column);
      rounded.to_floats(s[k]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += s[k][i];
  }
  const float mean = mean_of(row_sum<kBlockPerRow>(sum, scratch[0]), width);

  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const bool inside = share.column<kVector>(k) < width;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      s[k][i] = inside ? s[k][i] - mean : 0.0f;
      squares += s[k][i] * s[k][i];
    }
  }
  const float variance = mean_of(row_sum<kBlockPerRow>(squares, scratch[1]), width);
  const float rstd = rsqrtf(variance + args.eps);

#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int32_t column = share.column<kVector>(k);
    float w[kVector], b[kVector];
    load_inside<kVector>(static_cast<const P*>(args.weight), column, width).to_floats(w);
    load_inside<kVector>(static_cast<const P*>(args.bias), column, args.bias == nullptr ? 0 : width).to_floats(b);
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[k][i] = s[k][i] * rstd * w[i] + b[i];
    const Vector<T, kVector> y = Vector<T, kVector>::from_floats(s[k]);
    if (column < width) y.store(static_cast<T*>(args.y) + row * width + column);
  }
  if (share.thread == 0) {
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// Adds `sums` of the block's rows_at_once warps (or of its one row) in ascending order; writes partials[column].
template <int kVariant, int kVectors, int kVector>
__device__ __forceinline__ void store_partial(const float (&sums)[kVectors][kVector], float* shared, float* partials,
                                              int32_t width) {
  const RowShare share = row_share<kVariant>();
  float* own = shared + (kIsBlock<kVariant> ? 0 : int(threadIdx.x) / kWarpSize * width);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int32_t column = share.column<kVector>(k);
    if (column >= width) continue;
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      *reinterpret_cast<float4*>(own + column + i) =
          make_float4(sums[k][i], sums[k][i + 1], sums[k][i + 2], sums[k][i + 3]);
    }
  }
  __syncthreads();
  for (int32_t column = threadIdx.x; column < width; column += blockDim.x) {
    float sum = shared[column];
    if constexpr (!kIsBlock<kVariant>) {
#pragma unroll
      for (int warp = 1; warp < kNormWarps; ++warp) sum += shared[warp * width + column];
    }
    partials[column] = sum;
  }
}

// T: dy. S: s, ds and dx. P: weight.
template <class T, class S, class P, int kVariant>
__global__ void __launch_bounds__(layer_norm_threads(LayerNormVariant(kVariant), kBlockMaxWidth))
layer_norm_backward_kernel(const __grid_constant__ LayerNormBackward args) {
  constexpr bool kBlockPerRow = kIsBlock<kVariant>, kReadTwice = kVariant == kWideBlock;
  constexpr int kVector = vector_elements<T, S, P>(), kVectors = kElements<kVariant> / kVector;
  extern __shared__ float4 dynamic_shared[];        // [rows at once, width] floats
  __shared__ float2 scratch[2][kWarpSize];          // two, used in turn: one barrier a row
  float* shared = reinterpret_cast<float*>(dynamic_shared);
  const RowShare share = row_share<kVariant>();
  const int32_t width = args.width;
  const int64_t row_step = int64_t(gridDim.x) * (kBlockPerRow ? 1 : kNormWarps);

  const P* weight_row = static_cast<const P*>(args.weight);
  Vector<P, kVector> weight[kVectors];
  if constexpr (!kReadTwice) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) weight[k] = load_inside<kVector>(weight_row, share.column<kVector>(k), width);
  }

  float dweight[kVectors][kVector] = {}, dbias[kVectors][kVector] = {};
  int turn = 0;
  for (int64_t row = first_row<kBlockPerRow>(); row < args.rows; row += row_step, turn ^= 1) {
    const T* dy_row = static_cast<const T*>(args.dy) + row * width;
    const S* s_row = static_cast<const S*>(args.s) + row * width;
    const S* ds_row = static_cast<const S*>(args.ds) + row * width;
    const int32_t ds_width = args.ds == nullptr ? 0 : width;
    const float mean = args.mean[row], rstd = args.rstd[row];

    // dy and xhat of one vector as floats.
    const auto unpack_row = [&](Vector<T, kVector> dy, Vector<S, kVector> s, float (&dy_values)[kVector],
                                float (&xhat)[kVector]) {
      dy.to_floats(dy_values);
      s.to_floats(xhat);
#pragma unroll
      for (int i = 0; i < kVector; ++i) xhat[i] = (xhat[i] - mean) * rstd;
    };

    Vector<T, kVector> dy[kVectors];
    Vector<S, kVector> s[kVectors], ds[kVectors];
    if constexpr (!kReadTwice) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        dy[k] = load_inside<kVector>(dy_row, share.column<kVector>(k), width);
        s[k] = load_inside<kVector>(s_row, share.column<kVector>(k), width);
      }
    }
    float2 sums = make_float2(0.0f, 0.0f);  // of g, of g xhat
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int32_t column = share.column<kVector>(k);
      if (kReadTwice && column >= width) continue;
      if constexpr (kReadTwice) {
        dy[k] = load_inside<kVector>(dy_row, column, width);
        s[k] = load_inside<kVector>(s_row, column, width);
        weight[k] = load_inside<kVector>(weight_row, column, width);
      }
      float dy_values[kVector], xhat[kVector], w[kVector];
      unpack_row(dy[k], s[k], dy_values, xhat);
      weight[k].to_floats(w);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float g = dy_values[i] * w[i];
        sums.x += g;
        sums.y += g * xhat[i];
        dweight[k][i] += dy_values[i] * xhat[i];
        dbias[k][i] += dy_values[i];
      }
    }
    if constexpr (!kReadTwice) {  // on their way while the row is summed
#pragma unroll
      for (int k = 0; k < kVectors; ++k) ds[k] = load_inside<kVector>(ds_row, share.column<kVector>(k), ds_width);
    }
    sums = row_sum<kBlockPerRow>(sums, scratch[turn]);
    const float mean_g = mean_of(sums.x, width), mean_g_xhat = mean_of(sums.y, width);

#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int32_t column = share.column<kVector>(k);
      if (column >= width) continue;
      if constexpr (kReadTwice) {
        dy[k] = load_inside<kVector>(dy_row, column, width);
        s[k] = load_inside<kVector>(s_row, column, width);
        ds[k] = load_inside<kVector>(ds_row, column, ds_width);
        weight[k] = load_inside<kVector>(weight_row, column, width);
      }
      float dy_values[kVector], xhat[kVector], w[kVector], dx[kVector];
      unpack_row(dy[k], s[k], dy_values, xhat);
      weight[k].to_floats(w);
      ds[k].to_floats(dx);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dx[i] += rstd * (dy_values[i] * w[i] - mean_g - xhat[i] * mean_g_xhat);
      Vector<S, kVector>::from_floats(dx).store(static_cast<S*>(args.dx) + row * width + column);
    }
  }

  float* partials = args.partials + int64_t(blockIdx.x) * 2 * width;
  store_partial<kVariant>(dweight, shared, partials, width);
  if (args.dbias == nullptr) return;
  __syncthreads();
  store_partial<kVariant>(dbias, shared, partials + width, width);
}

// Launchers.

namespace {

Error check_width(int32_t width) {
  if (width >= kMinWidth && width <= kMaxWidth && width % kWidthStep == 0) return nullptr;
  return error("layer_norm: width is %d, expected a multiple of %d from %d to %d", width, kWidthStep, kMinWidth,
               kMaxWidth);
}

Error wrong_types(Dtype dtype, Dtype sum_dtype, Dtype parameter_dtype) {
  return error("layer_norm: types are %s, sum %s, parameters %s; expected the sum and the parameters in fp32 or in %s",
               name_of(dtype), name_of(sum_dtype), name_of(parameter_dtype), name_of(dtype));
}

template <class T, class S, class P, bool kResidual>
Error launch_forward(const LayerNormForward& args, Stream stream) {
  const LaunchPlan plan = plan_layer_norm_forward(args);
  if (plan.grid[0] == 0) return error("layer_norm: %lld rows, more than a grid holds", (long long)args.rows);
  switch (plan.variant) {
    case kWarp16: return launch(layer_norm_forward_kernel<T, S, P, kResidual, kWarp16>, plan, args, stream);
    case kWarp24: return launch(layer_norm_forward_kernel<T, S, P, kResidual, kWarp24>, plan, args, stream);
    case kWarp32: return launch(layer_norm_forward_kernel<T, S, P, kResidual, kWarp32>, plan, args, stream);
    default: return launch(layer_norm_forward_kernel<T, S, P, kResidual, kBlock>, plan, args, stream);
  }
}

template <class T, class S, class P>
Error launch_backward(const LayerNormBackward& args, Stream stream) {
  const LaunchPlan plan = plan_layer_norm_backward(args);
  Error failure = nullptr;
  switch (plan.variant) {
    case kWarp16: failure = launch(layer_norm_backward_kernel<T, S, P, kWarp16>, plan, args, stream); break;
    case kWarp24: failure = launch(layer_norm_backward_kernel<T, S, P, kWarp24>, plan, args, stream); break;
    case kWarp32: failure = launch(layer_norm_backward_kernel<T, S, P, kWarp32>, plan, args, stream); break;
    case kBlock: failure = launch(layer_norm_backward_kernel<T, S, P, kBlock>, plan, args, stream); break;
    default: failure = launch(layer_norm_backward_kernel<T, S, P, kWideBlock>, plan, args, stream); break;
  }
  if (failure != nullptr) return failure;
  return fold_partials({args.partials, {args.dweight, args.dbias}, int32_t(plan.grid[0]), 2, args.width}, stream);
}

}  // namespace

Error layer_norm_forward(const LayerNormForward& args, Stream stream) {
  if (const Error wrong = check_width(args.width)) return wrong;
  if (args.rows == 0) return nullptr;
  constexpr Dtype fp32 = Dtype::kFp32, bf16 = Dtype::kBf16, fp16 = Dtype::kFp16;
  if (args.residual == nullptr) {
    switch (types(args.dtype, args.parameter_dtype)) {
      case types(fp32, fp32): return launch_forward<float, float, float, false>(args, stream);
      case types(bf16, fp32): return launch_forward<Bf16, Bf16, float, false>(args, stream);
      case types(bf16, bf16): return launch_forward<Bf16, Bf16, Bf16, false>(args, stream);
      case types(fp16, fp32): return launch_forward<Fp16, Fp16, float, false>(args, stream);
      case types(fp16, fp16): return launch_forward<Fp16, Fp16, Fp16, false>(args, stream);
      default: return wrong_types(args.dtype, args.dtype, args.parameter_dtype);
    }
  }
  switch (types(args.dtype, args.sum_dtype, args.parameter_dtype)) {
    case types(fp32, fp32, fp32): return launch_forward<float, float, float, true>(args, stream);
    case types(bf16, fp32, fp32): return launch_forward<Bf16, float, float, true>(args, stream);
    case types(bf16, fp32, bf16): return launch_forward<Bf16, float, Bf16, true>(args, stream);
    case types(bf16, bf16, fp32): return launch_forward<Bf16, Bf16, float, true>(args, stream);
    case types(bf16, bf16, bf16): return launch_forward<Bf16, Bf16, Bf16, true>(args, stream);
    case types(fp16, fp32, fp32): return launch_forward<Fp16, float, float, true>(args, stream);
    case types(fp16, fp32, fp16): return launch_forward<Fp16, float, Fp16, true>(args, stream);
    case types(fp16, fp16, fp32): return launch_forward<Fp16, Fp16, float, true>(args, stream);
    case types(fp16, fp16, fp16): return launch_forward<Fp16, Fp16, Fp16, true>(args, stream);
    default: return wrong_types(args.dtype, args.sum_dtype, args.parameter_dtype);
  }
}

int32_t layer_norm_partials(int64_t rows, int32_t width) { return layer_norm_partial_count(rows, width); }

Error layer_norm_backward(const LayerNormBackward& args, Stream stream) {
  if (const Error wrong = check_width(args.width)) return wrong;
  if (args.rows == 0) return nullptr;
  constexpr Dtype fp32 = Dtype::kFp32, bf16 = Dtype::kBf16, fp16 = Dtype::kFp16;
  switch (types(args.dtype, args.sum_dtype, args.parameter_dtype)) {
    case types(fp32, fp32, fp32): return launch_backward<float, float, float>(args, stream);
    case types(bf16, fp32, fp32): return launch_backward<Bf16, float, float>(args, stream);
    case types(bf16, fp32, bf16): return launch_backward<Bf16, float, Bf16>(args, stream);
    case types(bf16, bf16, fp32): return launch_backward<Bf16, Bf16, float>(args, stream);
    case types(bf16, bf16, bf16): return launch_backward<Bf16, Bf16, Bf16>(args, stream);
    case types(fp16, fp32, fp32): return launch_backward<Fp16, float, float>(args, stream);
    case types(fp16, fp32, fp16): return launch_backward<Fp16, float, Fp16>(args, stream);
    case types(fp16, fp16, fp32): return launch_backward<Fp16, Fp16, float>(args, stream);
    case types(fp16, fp16, fp16): return launch_backward<Fp16, Fp16, Fp16>(args, stream);
    default: return wrong_types(args.dtype, args.sum_dtype, args.parameter_dtype);
  }
}

}  // namespace gptdist::cuda
