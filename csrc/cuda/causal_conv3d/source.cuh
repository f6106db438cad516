// Where a convolution reads: padding, caching, upsampling and striding as coordinate arithmetic, done once
// per position of a tile and kept in two small tables in shared memory, so that a main loop adds two numbers
// and never sees a mode.
//   frame table [kt][rows]     uint64: the address of the source frame (in x or in the cache), 0 where the
//   tap reads zeros
//   plane table [kh*kw][rows]  uint32: the offset in the frame in units (one 16-byte chunk, or one element),
//   kNothing for zeros
// A source address is frame + plane * unit + channel; 64 bits everywhere.
#pragma once

#include <cstdint>

#include "cuda/causal_conv3d/causal_conv3d.h"
#include "cuda/ptx.cuh"

namespace vtok::cuda {

constexpr uint32_t kNothing = 0xffffffffu;

struct Source {
  const char* x;
  const char* cache;
  int64_t batch_bytes, frame_bytes, cache_batch_bytes, cache_frame_bytes, group_bytes;
  int64_t row_units, col_units;
  int unit_bytes, channel_bytes;
  int kernel[3], stride[3], dilation[3];
  int pad[3];  // before the axis; a crop where negative
  // > 1: only every gap-th coordinate exists, the others read zeros (the transpose of a strided convolution)
  int gap[3];
  int length[3];  // upsampled; the time axis with the cached frames that are used
  int upsample[3];
  int cached, used_cache;  // upsampled frames in the cache, and those of them that stand before x
  bool once;               // the first frame of x is not repeated in time
  // The transpose of a replicated border: the first output frame also takes the terms of `before` frames in
  // front of it, the last those of `after` frames. Then there are (1 + before + after) * time_taps entries
  // of the frame table, each group with the same weights.
  int before, after, time_taps;
  PadMode time_mode, spatial_mode;
  int out[3];         // To, Ho, Wo
  int64_t positions;  // B * To * Ho * Wo
};

struct Position {
  int64_t b;
  int t, h, w;
};

__device__ inline Position position_of(int64_t m, const int (&size)[3]) {
  Position p;
  if (m < (int64_t(1) << 31)) {  // 32-bit division is several times cheaper
    uint32_t r = uint32_t(m);
    p.w = r % uint32_t(size[2]);
    r /= uint32_t(size[2]);
    p.h = r % uint32_t(size[1]);
    r /= uint32_t(size[1]);
    p.t = r % uint32_t(size[0]);
    p.b = r / uint32_t(size[0]);
  } else {
    p.w = int(m % size[2]);
    m /= size[2];
    p.h = int(m % size[1]);
    m /= size[1];
    p.t = int(m % size[0]);
    p.b = m / size[0];
  }
  return p;
}

// Division by an upsampling factor, which is 1 almost always; a division costs some twenty instructions.
__device__ inline int divided(int i, int by) { return by == 1 ? i : i / by; }

// Where index i of an axis of n elements is read; -1 reads a zero.
__device__ inline int pad_index(int i, int n, PadMode mode) {
  if (i >= 0 && i < n) return i;
  if (mode == PadMode::replicate) return i < 0 ? 0 : n - 1;
  if (mode == PadMode::reflect) return i < 0 ? -i : 2 * (n - 1) - i;
  return -1;
}

// The (upsampled) coordinate that a tap reads for an output coordinate, or -1.
__device__ inline int tap_index(const Source& s, int axis, int out, int tap) {
  int i = out * s.stride[axis] + tap * s.dilation[axis] - s.pad[axis];
  if (s.gap[axis] > 1) {
    if (i % s.gap[axis] != 0) return -1;
    i /= s.gap[axis];
  }
  return pad_index(i, s.length[axis], axis == 0 ? s.time_mode : s.spatial_mode);
}

// The frame of the timeline (the used part of the cache, then x, upsampled) that temporal tap dt reads for
// output frame t, or -1.
__device__ inline int timeline_index(const Source& s, int t, int dt) {
  if (dt >= s.time_taps) {
    const int extra = dt / s.time_taps - 1;
    if (t != (extra < s.before ? 0 : s.out[0] - 1)) return -1;
    t = extra < s.before ? extra - s.before : s.out[0] + extra - s.before;
    dt %= s.time_taps;
  }
  return tap_index(s, 0, t, dt);
}

// The address of the frame that temporal tap dt reads, or 0.
__device__ inline uint64_t frame_address(const Source& s, const Position& p, int dt) {
  int i = timeline_index(s, p.t, dt);
  if (i < 0) return 0;
  if (i < s.used_cache)
    return reinterpret_cast<uint64_t>(s.cache) + p.b * s.cache_batch_bytes +
           divided(s.cached - s.used_cache + i, s.upsample[0]) * s.cache_frame_bytes;
  i -= s.used_cache;
  // where the first frame is there once, the second one starts at 1
  const int shift = s.once && i > 0 ? s.upsample[0] - 1 : 0;
  const int frame = divided(i + shift, s.upsample[0]);
  return reinterpret_cast<uint64_t>(s.x) + p.b * s.batch_bytes + frame * s.frame_bytes;
}

// The two tables of Rows consecutive positions.
template <int Rows>
struct SourceTable {
  uint32_t frames, planes;  // shared addresses

  __host__ __device__ static int bytes(const int (&kernel)[3]) {
    return Rows * (8 * kernel[0] + 4 * kernel[1] * kernel[2]);
  }
  __device__ SourceTable(uint32_t base, const Source& s)
      : frames(base), planes(base + Rows * 8 * s.kernel[0]) {}

  __device__ uint32_t frame_at(int dt, int row) const { return frames + (dt * Rows + row) * 8; }
  __device__ uint32_t plane_at(int tap, int row) const { return planes + (tap * Rows + row) * 4; }

  // Bit dt: some row reads through time tap dt. For whole warps, after the barrier.
  __device__ uint32_t alive(int time_taps, int lane) const {
    uint32_t bits = 0;
    for (int dt = 0; dt < time_taps; ++dt)
      for (int row = lane; row < Rows; row += 32)
        bits |= uint32_t(ptx::ld_shared<uint64_t>(frame_at(dt, row)) != 0) << dt;
    for (int step = 16; step > 0; step /= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, step);
    return bits;
  }

  // Called by all threads of a block, each for its share of the rows; a barrier must follow.
  __device__ void build(const Source& s, int64_t first, int group) const {
    for (int row = threadIdx.x; row < Rows; row += blockDim.x) {
      const int64_t m = first + row;
      const bool exists = m < s.positions;
      const Position p = position_of(exists ? m : 0, s.out);
      for (int dt = 0; dt < s.kernel[0]; ++dt) {
        const uint64_t frame = exists ? frame_address(s, p, dt) : 0;
        ptx::st_shared<uint64_t>(frame_at(dt, row), frame ? frame + group * s.group_bytes : 0);
      }
      for (int dh = 0; dh < s.kernel[1]; ++dh) {
        const int h = tap_index(s, 1, p.h, dh);
        for (int dw = 0; dw < s.kernel[2]; ++dw) {
          const int w = tap_index(s, 2, p.w, dw);
          const bool inside = h >= 0 && w >= 0;
          const int64_t offset =
              divided(h, s.upsample[1]) * s.row_units + divided(w, s.upsample[2]) * s.col_units;
          ptx::st_shared<uint32_t>(plane_at(dh * s.kernel[2] + dw, row),
                                   inside ? uint32_t(offset) : kNothing);
        }
      }
    }
  }
};

}  // namespace vtok::cuda
