// y = gelu(x + b), tanh approximation.
//
//   h = x + b,  u = sqrt(2/pi) (h + 0.044715 h^3),  e = exp(-2u),  s = 1 / (1 + e)     [s = (1 + tanh u) / 2]
//   y  = h s
//   dx = dy (s + h s (e s) 2 u'),  2 u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 h^2)          [e s = 1 - s, uncancelled]
//   db = sum over rows of dx
//
// Memory, n = rows * width elements: forward reads n and writes n; backward reads 2n, writes n, and 4 * width bytes for
// each of the P <= 216 partials, which the fold reads again. h is recomputed in the backward, not stored.
//
// Launch: blocks of 256 threads on tiles of 32 vectors of 16 bytes x 8 rows (tiles_of in launch_plan.h; narrow rows
// get fewer vectors and more rows). A thread stays in its columns and holds their bias in registers. Forward: 4 rows
// in flight per thread, 16 KB per block. Backward: P row blocks, each thread walks rows, 2 at a time of two arrays;
// the sums of dx over rows stay in registers, are added over the block's threads in ascending order and folded by
// fold_partials. P depends on the shape alone: the same bits on any GPU.
//
// Accuracy: fp32 arithmetic, one rounding of the result. Error bounds beyond that rounding, eps = 2^-24, with ex2 off
// by 2^-22 and rcp by one ulp:
//   y:  |error| <= |y| eps (8 + 8 |u|) + |h| 2^-126   relative: the exponent's rounding grows with u, the tail survives
//   dx: |error| <= |dy| 16 eps                        absolute
// Two instructions per element (ex2, rcp) go through the special-function pipe, 16 lanes a clock and multiprocessor: 8
// elements, where an H100's memory feeds a forward in 2-byte elements 3.8 (3.35 TB/s, 132 multiprocessors, 1.7 GHz).
// tanh.approx.f32 is one instruction instead of two, and was rejected: its relative error of 2^-11 is half an ulp of
// fp16 near tanh = 1, and for negative h, where 1 + tanh cancels, it leaves no correct digit beyond h = -3.
//
// NaN gives NaN. As in PyTorch gelu(inf) = inf, gelu(-inf) = NaN (-inf * 0), and gradients at +-inf are NaN.

#include "common/fold_partials.cuh"
#include "common/host.h"
#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace gptdist::cuda {
namespace {

constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
constexpr float kCubic = 0.044715f;
constexpr float kLog2e = 1.4426950408889634f;

// exp(-2u) as a power of two.
__device__ __forceinline__ float exp_minus_2u(float h, float h_squared) {
  constexpr float kLinear = -kTwoSqrt2OverPi * kLog2e;
  return exp2_approx(h * fmaf(kLinear * kCubic, h_squared, kLinear));
}

__device__ __forceinline__ float gelu(float h) {
  return h * reciprocal_approx(1.0f + exp_minus_2u(h, h * h));
}

__device__ __forceinline__ float gelu_slope(float h) {
  const float h_squared = h * h;
  const float e = exp_minus_2u(h, h_squared);
  const float s = reciprocal_approx(1.0f + e);
  // Beyond 2^126 s is 0 and e may be inf: the product must be finite, for h s makes it 0.
  const float es = fminf(e, 0x1p126f) * s;
  return fmaf(h * s * es, fmaf(3.0f * kTwoSqrt2OverPi * kCubic, h_squared, kTwoSqrt2OverPi), s);
}

// A thread's place in the tiles: its vector's first column, and the block of rows that its tile belongs to.
struct Place {
  int32_t column;
  int64_t row_block, row_blocks;
};

template <int kVector>
__device__ __forceinline__ Place place_in_tiles(int32_t width) {
  const uint32_t vectors = uint32_t(width) / kVector, tiles_across = (vectors + blockDim.x - 1) / blockDim.x;
  const uint32_t row_block = blockIdx.x / tiles_across, tile = blockIdx.x - row_block * tiles_across;
  return {int32_t((tile * blockDim.x + threadIdx.x) * kVector), row_block, gridDim.x / tiles_across};
}

template <class P, int kVector>
__device__ __forceinline__ void load_bias(const void* bias, int32_t column, float (&values)[kVector]) {
  if (bias != nullptr) {
    load_floats(static_cast<const P*>(bias) + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
  }
}

}  // namespace

// T: x and y. P: bias.
template <class T, class P>
__global__ void __launch_bounds__(kTileThreads)
bias_gelu_forward_kernel(const __grid_constant__ BiasGeluForward args) {
  constexpr int kVector = vector_elements<T>(), kRows = kGeluForwardRows;
  const Place place = place_in_tiles<kVector>(args.width);
  if (place.column >= args.width) return;
  const int64_t row = place.row_block * (blockDim.y * kRows) + threadIdx.y;
  const int64_t offset = row * args.width + place.column, step = int64_t(blockDim.y) * args.width;
  const T* x = static_cast<const T*>(args.x) + offset;
  T* y = static_cast<T*>(args.y) + offset;

  Vector<T, kVector> loaded[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    loaded[k] = row + k * blockDim.y < args.rows ? Vector<T, kVector>::load(x + k * step) : Vector<T, kVector>::zero();
  }
  float bias[kVector];
  load_bias<P>(args.bias, place.column, bias);
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    float values[kVector];
    loaded[k].to_floats(values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = gelu(values[i] + bias[i]);
    if (row + k * blockDim.y < args.rows) Vector<T, kVector>::from_floats(values).store(y + k * step);
  }
}

// T: dy, x and dx. P: bias.
template <class T, class P>
__global__ void __launch_bounds__(kTileThreads)
bias_gelu_backward_kernel(const __grid_constant__ BiasGeluBackward args) {
  constexpr int kVector = vector_elements<T>(), kRows = kGeluBackwardRows;
  __shared__ float4 shared[kTileThreads * kVector / 4];
  const Place place = place_in_tiles<kVector>(args.width);
  const bool inside = place.column < args.width;
  float bias[kVector] = {}, sums[kVector] = {};
  if (inside) load_bias<P>(args.bias, place.column, bias);

  const int64_t row_step = place.row_blocks * blockDim.y, step = row_step * args.width;
  const int64_t first_row = place.row_block * blockDim.y + threadIdx.y;
  int64_t offset = first_row * args.width + place.column;
  for (int64_t row = first_row; inside && row < args.rows; row += kRows * row_step, offset += kRows * step) {
    Vector<T, kVector> x[kRows], dy[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const bool there = row + k * row_step < args.rows;
      const int64_t at = offset + k * step;
      x[k] = there ? Vector<T, kVector>::load(static_cast<const T*>(args.x) + at) : Vector<T, kVector>::zero();
      dy[k] = there ? Vector<T, kVector>::load(static_cast<const T*>(args.dy) + at) : Vector<T, kVector>::zero();
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (row + k * row_step >= args.rows) continue;
      float h[kVector], dx[kVector];
      x[k].to_floats(h);
      dy[k].to_floats(dx);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dx[i] *= gelu_slope(h[i] + bias[i]);
        sums[i] += dx[i];
      }
      Vector<T, kVector>::from_floats(dx).store(static_cast<T*>(args.dx) + offset + k * step);
    }
  }
  if (args.partials == nullptr) return;

  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, tile_columns = blockDim.x * kVector;
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    shared[(thread * kVector + i) / 4] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __syncthreads();
  const float* shared_sums = reinterpret_cast<const float*>(shared);  // [threads_y, tile_columns]
  const int32_t first_column = place.column - int32_t(threadIdx.x) * kVector;
  if (thread >= tile_columns || first_column + thread >= args.width) return;  // a tile has at most 256
  float sum = shared_sums[thread];
  for (int32_t y = 1; y < int32_t(blockDim.y); ++y) sum += shared_sums[y * tile_columns + thread];
  args.partials[place.row_block * args.width + first_column + thread] = sum;
}

// Launchers.

namespace {

Error check(Dtype dtype, int64_t rows, int32_t width, const LaunchPlan& plan) {
  if (width <= 0 || width % kWidthStep != 0) {
    return error("bias_gelu: width is %d, expected a multiple of %d", width, kWidthStep);
  }
  if (plan.grid[0] == 0) {
    return error("bias_gelu: %lld rows of %d %s elements, more than a grid holds", (long long)rows, width,
                 name_of(dtype));
  }
  return nullptr;
}

Error wrong_types(Dtype dtype, Dtype parameter_dtype) {
  return error("bias_gelu: x is %s and bias %s, expected the bias in fp32 or in x's type", name_of(dtype),
               name_of(parameter_dtype));
}

template <class T, class P>
Error launch_backward(const BiasGeluBackward& args, const LaunchPlan& plan, Stream stream) {
  const Error failure = launch(bias_gelu_backward_kernel<T, P>, plan, args, stream);
  if (failure != nullptr || args.partials == nullptr) return failure;
  return fold_partials({args.partials, {args.dbias, nullptr}, bias_gelu_partial_count(args.rows), 1, args.width},
                       stream);
}

}  // namespace

Error bias_gelu_forward(const BiasGeluForward& args, Stream stream) {
  if (args.rows == 0) return nullptr;
  const LaunchPlan plan = plan_bias_gelu_forward(args);
  if (const Error wrong = check(args.dtype, args.rows, args.width, plan)) return wrong;
  constexpr Dtype fp32 = Dtype::kFp32, bf16 = Dtype::kBf16, fp16 = Dtype::kFp16;
  switch (types(args.dtype, args.bias == nullptr ? args.dtype : args.parameter_dtype)) {
    case types(fp32, fp32): return launch(bias_gelu_forward_kernel<float, float>, plan, args, stream);
    case types(bf16, fp32): return launch(bias_gelu_forward_kernel<Bf16, float>, plan, args, stream);
    case types(bf16, bf16): return launch(bias_gelu_forward_kernel<Bf16, Bf16>, plan, args, stream);
    case types(fp16, fp32): return launch(bias_gelu_forward_kernel<Fp16, float>, plan, args, stream);
    case types(fp16, fp16): return launch(bias_gelu_forward_kernel<Fp16, Fp16>, plan, args, stream);
    default: return wrong_types(args.dtype, args.parameter_dtype);
  }
}

int32_t bias_gelu_partials(int64_t rows, int32_t) { return bias_gelu_partial_count(rows); }

Error bias_gelu_backward(const BiasGeluBackward& args, Stream stream) {
  if (args.rows == 0) return nullptr;
  const LaunchPlan plan = plan_bias_gelu_backward(args);
  if (const Error wrong = check(args.dtype, args.rows, args.width, plan)) return wrong;
  constexpr Dtype fp32 = Dtype::kFp32, bf16 = Dtype::kBf16, fp16 = Dtype::kFp16;
  switch (types(args.dtype, args.bias == nullptr ? args.dtype : args.parameter_dtype)) {
    case types(fp32, fp32): return launch_backward<float, float>(args, plan, stream);
    case types(bf16, fp32): return launch_backward<Bf16, float>(args, plan, stream);
    case types(bf16, bf16): return launch_backward<Bf16, Bf16>(args, plan, stream);
    case types(fp16, fp32): return launch_backward<Fp16, float>(args, plan, stream);
    case types(fp16, fp16): return launch_backward<Fp16, Fp16>(args, plan, stream);
    default: return wrong_types(args.dtype, args.parameter_dtype);
  }
}

}  // namespace gptdist::cuda
