// What the kernels of fsq share: where positions are, under any strides, and rows of channels through shared
// memory.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/fsq/fsq.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace vtok::cuda {

constexpr int kFsqThreads = 256;
constexpr int kFsqAxes = 5;  // of the positions: all axes of a tensor but the channels

// The positions, axes outermost first. The tensors are numbered as a launcher names them: {z, codes, indices}
// and so on. Neighboring axes that all tensors walk with one step are one axis.
struct FsqPositions {
  int axes;
  int64_t size[kFsqAxes], step[kFsqAxes][3], channel_step[3];

  __host__ __device__ int64_t inner() const { return size[axes - 1]; }
  int64_t outer() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < axes; ++i) n *= size[i];
    return n;
  }
  bool adjacent(int tensor) const { return step[axes - 1][tensor] == 1; }

  // Offsets of position `at` of the innermost axis, where `outer` numbers the places of the others.
  __device__ void locate(int64_t outer, int64_t at, int64_t (&offset)[3]) const {
    for (int t = 0; t < 3; ++t) offset[t] = at * step[axes - 1][t];
    for (int i = axes - 2; i >= 0; --i) {
      const int64_t next = i ? outer / size[i] : 0, here = outer - next * size[i];
      for (int t = 0; t < 3; ++t) offset[t] += here * step[i][t];
      outer = next;
    }
  }
};

// `without`: the tensor that has no channels (indices), or -1.
inline FsqPositions fsq_positions(const Tensor& a, const Tensor& b, const Tensor& c, int dim, int without) {
  const Tensor* tensors[3] = {&a, &b, &c};
  const Tensor& shape = without == 0 ? b : a;
  FsqPositions p = {};
  for (int t = 0; t < 3; ++t) p.channel_step[t] = t == without ? 0 : tensors[t]->stride[dim];
  for (int i = 0; i < shape.rank; ++i) {
    if (i == dim || shape.size[i] == 1) continue;
    int64_t step[3];
    bool joins = p.axes > 0;
    for (int t = 0; t < 3; ++t) {
      step[t] = tensors[t]->stride[t == without && i > dim ? i - 1 : i];
      joins = joins && p.step[p.axes - 1][t] == shape.size[i] * step[t];
    }
    const int at = joins ? p.axes - 1 : p.axes++;
    p.size[at] = joins ? p.size[at] * shape.size[i] : shape.size[i];
    std::copy(step, step + 3, p.step[at]);
  }
  if (p.axes == 0) {  // a single position, which is next to itself in every way
    p.axes = 1;
    p.size[0] = 1;
    for (int t = 0; t < 3; ++t) p.step[0][t] = t == without || p.channel_step[t] != 1 ? 1 : shape.size[dim];
  }
  return p;
}

// Whether every run of adjacent elements starts at a multiple of 16 bytes; `channels`: whether each channel
// has runs of its own.
inline bool fsq_aligned(const FsqPositions& p, int tensor, const Tensor& t, bool channels) {
  const int64_t width = element_size(t.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
                 (!channels || p.channel_step[tensor] * width % 16 == 0);
  for (int i = 0; i + 1 < p.axes; ++i) aligned = aligned && p.step[i][tensor] * width % 16 == 0;
  return aligned;
}

// Blocks of `per_block` positions of the innermost axis, for each place of the others: blockIdx.x counts them
// within the places.
inline int64_t fsq_chunks(const FsqPositions& p, int64_t per_block) {
  return (p.inner() + per_block - 1) / per_block;
}

// A block copies `count` adjacent elements to shared memory; `from` is at a multiple of 16 bytes. Ends with a
// barrier.
template <class T>
__device__ void load_rows(uint32_t to, const T* from, int count) {
  constexpr int kV = 16 / sizeof(T);
  for (int i = threadIdx.x; i < count / kV; i += kFsqThreads)
    ptx::cp_async<16>(to + 16 * i, from + kV * i, true);
  ptx::cp_async_commit();
  for (int i = count / kV * kV + threadIdx.x; i < count; i += kFsqThreads)
    ptx::st_shared(to + i * uint32_t(sizeof(T)), ptx::ld_global(from + i));
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// The way back. Begins with a barrier.
template <class T>
__device__ void store_rows(T* to, uint32_t from, int count) {
  constexpr int kV = 16 / sizeof(T);
  __syncthreads();
  for (int i = threadIdx.x; i < count / kV; i += kFsqThreads)
    ptx::st_global(reinterpret_cast<uint4*>(to + kV * i), ptx::ld_shared<uint4>(from + 16 * i));
  for (int i = count / kV * kV + threadIdx.x; i < count; i += kFsqThreads)
    ptx::st_global(to + i, ptx::ld_shared<T>(from + i * uint32_t(sizeof(T))));
}

// Calls f with a value of the element type.
template <class F>
Status fsq_dispatch(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  return dtype == DType::bf16 ? f(__nv_bfloat16{}) : f(__half{});
}

inline bool fsq_same_shape(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.rank == b.rank && std::equal(a.size, a.size + a.rank, b.size);
}

inline Status fsq_check_channels(const Tensor& z, size_t channels, int dim, const char* name) {
  if (!is_float(z.dtype) || z.rank < 1 || dim < 0 || dim >= z.rank || z.size[dim] != int64_t(channels))
    return Status::Invalid(std::string(name) + ": expected float32, bfloat16 or float16 with " +
                           std::to_string(channels) + " channels");
  if (channels == 0 || channels > size_t(kFsqChannels))
    return Status::Unsupported("levels: " + std::to_string(channels) + " channels, at most " +
                               std::to_string(kFsqChannels));
  return Status::Ok();
}

}  // namespace vtok::cuda
