// What happens to a finished sum before it is stored: SiLU, depth-to-space, residual or blend, one rounding.
// The bias is not part of it: an accumulator starts as its channel's bias.
//
// With depth-to-space the weight rows are rearranged so that kernel channel n = phase * (O/phases) + c holds
// the public channel c
// * phases + phase: eight neighboring n are then eight neighboring channels of one output pixel, and the
//   rearrangement costs
// nothing.
#pragma once
#include "cuda/causal_conv3d/source.cuh"

namespace vtok::cuda {

// Eight neighboring channels, moved in 16-byte pieces.
template <class T>
struct alignas(16) Vector8 {
  static constexpr int kPieces = sizeof(T) * 8 / 16;
  T value[8];

  __device__ void load(const T* from) {
    uint4 piece[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = ptx::ld_global(reinterpret_cast<const uint4*>(from) + i);
    memcpy(value, piece, sizeof(value));
  }
  __device__ void store(T* to) const {
    uint4 piece[kPieces];
    memcpy(piece, value, sizeof(value));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) ptx::st_global(reinterpret_cast<uint4*>(to) + i, piece[i]);
  }
};

struct Epilogue {
  void* out;
  const void* residual;                       // or null
  int64_t out_stride[4], residual_stride[4];  // elements: batch, time, height, width
  int residual_upsample[3];  // the residual is read at the output's coordinate divided by this
  bool residual_once;
  int spread[3];               // depth-to-space factors
  int channels, all_channels;  // O / (rt*rh*rw), those of one pixel of the output, and O
  bool vectors;  // eight channels at a time: strides, channel counts and addresses allow 16-byte accesses
  bool silu, blend;
  float alpha;
};

// Where a position begins in the output and in the residual, in elements.
struct RowOffsets {
  int64_t out, residual;
};

__device__ inline RowOffsets row_offsets(const Epilogue& e, const Position& p) {
  const int t = p.t * e.spread[0], h = p.h * e.spread[1], w = p.w * e.spread[2];
  RowOffsets r = {};
  r.out = p.b * e.out_stride[0] + t * e.out_stride[1] + h * e.out_stride[2] + w * e.out_stride[3];
  if (e.residual) {
    const int rt = !e.residual_once ? divided(t, e.residual_upsample[0])
                   : t == 0         ? 0
                                    : 1 + (t - 1) / e.residual_upsample[0];
    r.residual = p.b * e.residual_stride[0] + rt * e.residual_stride[1] +
                 divided(h, e.residual_upsample[1]) * e.residual_stride[2] +
                 divided(w, e.residual_upsample[2]) * e.residual_stride[3];
  }
  return r;
}

// Where kernel channel n lies within a pixel, or within the pixels that depth-to-space makes of one.
__device__ inline int64_t channel_offset(const Epilogue& e, int n, const int64_t (&stride)[4]) {
  if (e.channels == e.all_channels) return n;
  const int phase = n / e.channels, k = phase % e.spread[2], j = phase / e.spread[2] % e.spread[1];
  return n - phase * e.channels + phase / (e.spread[2] * e.spread[1]) * stride[1] + j * stride[2] +
         k * stride[3];
}

__device__ inline float finish(const Epilogue& e, float v, float residual) {
  if (e.silu) v = ptx::silu(v);
  if (!e.residual) return v;
  return e.blend ? e.alpha * residual + (1 - e.alpha) * v : v + residual;
}

// Finishes and stores the sums of kernel channels n to n + 7 of one position; e.vectors must hold.
template <class T>
__device__ inline void store_eight(const Epilogue& e, const float (&v)[8], RowOffsets row, int n) {
  Vector8<T> r{}, y;
  if (e.residual)
    r.load(static_cast<const T*>(e.residual) + row.residual + channel_offset(e, n, e.residual_stride));
#pragma unroll
  for (int i = 0; i < 8; ++i) y.value[i] = ptx::from_float<T>(finish(e, v[i], ptx::to_float(r.value[i])));
  y.store(static_cast<T*>(e.out) + row.out + channel_offset(e, n, e.out_stride));
}

// The same for one channel, of any alignment.
template <class T>
__device__ inline void store_one(const Epilogue& e, float v, RowOffsets row, int n) {
  float r = 0;
  if (e.residual)
    r = ptx::to_float(ptx::ld_global(static_cast<const T*>(e.residual) + row.residual +
                                     channel_offset(e, n, e.residual_stride)));
  ptx::st_global(static_cast<T*>(e.out) + row.out + channel_offset(e, n, e.out_stride),
                 ptx::from_float<T>(finish(e, v, r)));
}

}  // namespace vtok::cuda
