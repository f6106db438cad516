// Rounding to e4m3 what the sm90 convolution multiplies. Scales are powers of two: a float of three bits of
// fraction is as exact with them as with any others, and what is divided by one is multiplied by it again without
// an error. Bytes are the bound: 3 for each element of x, 2 + 1, where the convolution then reads 1 and not 2.
#include "cuda/causal_conv3d/sm90_e4m3.h"

#include <algorithm>

#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {
namespace {

constexpr int kThreads = 256, kPiece = 16;  // channels that a thread rounds at a time
constexpr float kLargest = 448;

struct Rows {  // batch, time, height; elements from one to the next
  const void* from;
  void* to;
  int size[3], columns, pieces;  // pieces: of a column's channels
  int64_t stride[3], column_stride;
};

template <class T>
__device__ uint4 rounded(const Vector8<T> (&v)[2], float inverse) {
  uint16_t pairs[kPiece / 2];
#pragma unroll
  for (int i = 0; i < kPiece / 2; ++i) {
    const T* pair = v[i / 4].value + i % 4 * 2;
    pairs[i] = ptx::to_e4m3x2(ptx::to_float(pair[0]) * inverse, ptx::to_float(pair[1]) * inverse);
  }
  uint4 bytes;
  memcpy(&bytes, pairs, sizeof(bytes));
  return bytes;
}

// A row of columns and their channels at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) narrow_rows_kernel(const Rows r, const float* scale) {
  const float inverse = 1 / ptx::ld_global(scale);
  const int rows = r.size[0] * r.size[1] * r.size[2], of_row = r.columns * r.pieces;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int h = row % r.size[2], t = row / r.size[2] % r.size[1], b = row / r.size[2] / r.size[1];
    const T* from = static_cast<const T*>(r.from) + b * r.stride[0] + t * r.stride[1] + h * r.stride[2];
    uint4* to = static_cast<uint4*>(r.to) + int64_t(row) * of_row;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < of_row; i += gridDim.x * kThreads) {
      const T* at = from + i / r.pieces * r.column_stride + i % r.pieces * kPiece;
      Vector8<T> v[2];
      v[0].load(at);
      v[1].load(at + 8);
      ptx::st_global(to + i, rounded(v, inverse));
    }
  }
}

// The power of two that brings `largest` to between 224 and 448.
__device__ float power_of_two(float largest) {
  const float wanted = largest / kLargest;
  if (!(wanted > 0 && wanted < INFINITY)) return 1;         // zeros; or nothing can help
  const uint32_t exponent = __float_as_uint(wanted) >> 23;  // of the power of two that is not above it
  return __uint_as_float(max(exponent + 1, 1u) << 23);
}

// A block per output. The weights are read twice, the second time from the cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    narrow_weight_kernel(const RelaidWeight w, uint8_t* to, float* scales) {
  const int n = blockIdx.x, plane = w.taps[1] * w.taps[2], taps = w.taps[0] * plane;
  const T* from = static_cast<const T*>(w.from.data) + n * w.from.n;
  auto value = [&](int tap, int c) {
    const int t = tap / plane, h = tap % plane / w.taps[2], v = tap % w.taps[2];
    return ptx::to_float(ptx::ld_global(from + c * w.from.channel + t * w.from.tap[0] + h * w.from.tap[1] +
                                        v * w.from.tap[2]));
  };
  const uint32_t shared = ptx::smem_base();
  float largest = 0;
  for (int i = threadIdx.x; i < taps * w.channels; i += kThreads)
    largest = fmaxf(largest, fabsf(value(i % taps, i / taps)));
  ptx::st_shared(shared + 4 * threadIdx.x, largest);
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) largest = fmaxf(largest, ptx::ld_shared<float>(shared + 4 * i));
  const float scale = power_of_two(largest), inverse = 1 / scale;
  if (threadIdx.x == 0) ptx::st_global(scales + n, scale);
  auto* pairs = reinterpret_cast<uint16_t*>(to + int64_t(n) * taps * w.channels);
  for (int i = threadIdx.x; i < taps * w.channels / 2; i += kThreads) {
    const int tap = 2 * i / w.channels, c = 2 * i % w.channels;
    ptx::st_global(pairs + i, ptx::to_e4m3x2(value(tap, c) * inverse, value(tap, c + 1) * inverse));
  }
}

Status narrow_rows(const Tensor& t, void* to, const float* scale, cudaStream_t stream) {
  Rows r = {t.data,
            to,
            {int(t.size[0]), int(t.size[2]), int(t.size[3])},
            int(t.size[4]),
            int(t.size[1] / kPiece),
            {t.stride[0], t.stride[2], t.stride[3]},
            t.stride[4]};
  const int64_t rows = t.size[0] * t.size[2] * t.size[3];
  if (rows >= int64_t(1) << 31) return Status::Unsupported("sm90: more rows than the kernel counts");
  const dim3 grid(unsigned(divide_up(int64_t(r.columns) * r.pieces, kThreads)),
                  unsigned(std::min<int64_t>(rows, 65535)));
  if (t.dtype == DType::f16)
    return VTOK_LAUNCH(narrow_rows_kernel<__half>, grid, dim3(kThreads), 0, stream, r, scale);
  return VTOK_LAUNCH(narrow_rows_kernel<__nv_bfloat16>, grid, dim3(kThreads), 0, stream, r, scale);
}

Status readable(const Tensor& t, const char* name) {
  bool adjacent = t.stride[1] == 1 && aligned16(t.data);
  for (int i : {0, 2, 3, 4}) adjacent = adjacent && (t.size[i] == 1 || t.stride[i] % 8 == 0);
  if (adjacent) return Status::Ok();
  return Status::Invalid(std::string(name) + ": the channel stride must be 1, others multiples of 16 bytes");
}

}  // namespace

Tensor as_e4m3(const Tensor& t) {
  Tensor narrow = t;
  if (!t) return narrow;
  narrow.data = nullptr;
  narrow.dtype = DType::e4m3;
  int64_t step = 1;
  for (int axis : {1, 4, 3, 2, 0}) {
    narrow.stride[axis] = step;
    step *= t.size[axis];
  }
  return narrow;
}

Status narrow_inputs(const NarrowInputs& inputs, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  VTOK_RETURN_IF_ERROR(readable(inputs.x, "x"));
  VTOK_RETURN_IF_ERROR(narrow_rows(inputs.x, inputs.x_to, inputs.x_scale, stream));
  if (!inputs.cache) return Status::Ok();
  VTOK_RETURN_IF_ERROR(readable(inputs.cache, "cache"));
  return narrow_rows(inputs.cache, inputs.cache_to, inputs.x_scale, stream);
}

Status narrow_weight(const RelaidWeight& w, DType dtype, void* to, float* scale, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const dim3 grid(unsigned(w.outputs)), block(kThreads);
  auto* bytes = static_cast<uint8_t*>(to);
  if (dtype == DType::f16)
    return VTOK_LAUNCH(narrow_weight_kernel<__half>, grid, block, 4 * kThreads, stream, w, bytes, scale);
  return VTOK_LAUNCH(narrow_weight_kernel<__nv_bfloat16>, grid, block, 4 * kThreads, stream, w, bytes, scale);
}

}  // namespace vtok::cuda
