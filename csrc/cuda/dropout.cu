// Dropout by position: y = keep ? x * scale : 0. Its backward is the same function of the gradient.
//
//   keep[b, t, c] = word >= threshold, word c % 4 of Philox4x32-7 with counter (c / 4, row_offset + t,
//   low 32 bits of sample_ids[b], site << 16) and the 64 bits of *key: gptdist/ops/random.py, bit for bit
//
// Memory, n = batch * positions * channels elements: reads n, writes n; the mask is never stored. A dropped NaN is 0.
//
// Launch: blocks of 256 threads on tiles of 32 vectors of 16 bytes x 8 positions, four positions in flight per thread
// (tiles_of in launch_plan.h). One Philox call serves four columns: a thread makes one (fp32) or two (16 bits) for a
// vector, about 15 integer instructions an element. At 16 bits that is close to what a B200 can issue while its memory
// streams, and half of what an H100 can.
// Where the channels are no multiple of 8, rows are not aligned to 16 bytes: kDropoutElements moves the four columns of
// a Philox call one by one. Models have channels that are multiples of 8; this path is for completeness.

#include "common/host.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "launch.h"

namespace gptdist::cuda {
namespace {

// Which of the columns 4 quad .. 4 quad + 3 are kept, times the scale, applied to four values.
__device__ __forceinline__ void drop_quad(uint32_t quad, uint32_t position, uint32_t sample, const Dropout& args,
                                          uint2 key, float* values) {
  const uint4 words = philox4x32(make_uint4(quad, position, sample, uint32_t(args.site) << 16), key);
  values[0] = words.x >= args.threshold ? values[0] * args.scale : 0.0f;
  values[1] = words.y >= args.threshold ? values[1] * args.scale : 0.0f;
  values[2] = words.z >= args.threshold ? values[2] * args.scale : 0.0f;
  values[3] = words.w >= args.threshold ? values[3] * args.scale : 0.0f;
}

}  // namespace

template <class T, int kVariant>
__global__ void __launch_bounds__(kTileThreads) dropout_kernel(const __grid_constant__ Dropout args) {
  constexpr int kVector = kVariant == kDropoutVectors ? vector_elements<T>() : 4;
  const uint32_t tiles_across = ((args.channels + kVector - 1) / kVector + blockDim.x - 1) / blockDim.x;
  const uint32_t positions_at_once = blockDim.y * kDropoutRows;
  const uint32_t position_blocks = (uint32_t(args.positions) + positions_at_once - 1) / positions_at_once;
  const uint32_t row_block = blockIdx.x / tiles_across, tile = blockIdx.x - row_block * tiles_across;
  const uint32_t batch = row_block / position_blocks, position_block = row_block - batch * position_blocks;
  const int32_t column = (tile * blockDim.x + threadIdx.x) * kVector;
  if (column >= args.channels) return;
  const int64_t position = int64_t(position_block) * positions_at_once + threadIdx.y;
  const int64_t offset = (batch * args.positions + position) * args.channels + column;
  const int64_t step = int64_t(blockDim.y) * args.channels;
  const T* x = static_cast<const T*>(args.x) + offset;
  T* y = static_cast<T*>(args.y) + offset;

  const auto drop = [&](int k, float (&values)[kVector], uint2 key, uint32_t sample) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      drop_quad(uint32_t(column + i) / 4, uint32_t(args.row_offset + position + k * blockDim.y), sample, args, key,
                values + i);
    }
  };
  if constexpr (kVariant == kDropoutVectors) {
    Vector<T, kVector> loaded[kDropoutRows];
#pragma unroll
    for (int k = 0; k < kDropoutRows; ++k) {
      loaded[k] = position + k * blockDim.y < args.positions ? Vector<T, kVector>::load(x + k * step)
                                                             : Vector<T, kVector>::zero();
    }
    const uint2 key = philox_key(*args.key);
    const uint32_t sample = uint32_t(args.sample_ids[batch]);
#pragma unroll
    for (int k = 0; k < kDropoutRows; ++k) {
      if (position + k * blockDim.y >= args.positions) break;
      float values[kVector];
      loaded[k].to_floats(values);
      drop(k, values, key, sample);
      Vector<T, kVector>::from_floats(values).store(y + k * step);
    }
  } else {
    const uint2 key = philox_key(*args.key);
    const uint32_t sample = uint32_t(args.sample_ids[batch]);
#pragma unroll
    for (int k = 0; k < kDropoutRows; ++k) {
      if (position + k * blockDim.y >= args.positions) break;
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = column + i < args.channels ? to_float(x[k * step + i]) : 0.0f;
      }
      drop(k, values, key, sample);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (column + i < args.channels) y[k * step + i] = from_float<T>(values[i]);
      }
    }
  }
}

// Launcher.

namespace {

template <class T>
Error launch_dropout(const Dropout& args, const LaunchPlan& plan, Stream stream) {
  if (plan.variant == kDropoutVectors) return launch(dropout_kernel<T, kDropoutVectors>, plan, args, stream);
  return launch(dropout_kernel<T, kDropoutElements>, plan, args, stream);
}

}  // namespace

Error dropout(const Dropout& args, Stream stream) {
  if (args.batch == 0 || args.positions == 0 || args.channels == 0) return nullptr;
  const LaunchPlan plan = plan_dropout(args);
  if (args.positions > INT32_MAX) {  // the mask's counters have 32 bits
    return error("dropout: %lld positions, expected at most %d", (long long)args.positions, INT32_MAX);
  }
  if (args.site < 0 || args.site >= 1 << 16) return error("dropout: site is %d, expected 0 to 65535", args.site);
  if (plan.grid[0] == 0) {
    return error("dropout: [%lld, %lld, %d] elements, more than a grid holds", (long long)args.batch,
                 (long long)args.positions, args.channels);
  }
  switch (args.dtype) {
    case Dtype::kFp32: return launch_dropout<float>(args, plan, stream);
    case Dtype::kBf16: return launch_dropout<Bf16>(args, plan, stream);
    case Dtype::kFp16: return launch_dropout<Fp16>(args, plan, stream);
  }
  return error("dropout: the type of x is %d, expected 0 (fp32), 1 (bf16) or 2 (fp16)", int(args.dtype));
}

}  // namespace gptdist::cuda
