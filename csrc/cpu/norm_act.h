// norm_act on a CPU: LayerNorm and RMSNorm over the channels of each position, GroupNorm over frames, then
// modulation and SiLU.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "status.h"
#include "tensor.h"

namespace vtok::cpu {

struct NormProblem {
  // all but x and out may be absent; scale and shift have x's sizes
  Tensor x, weight, bias, scale, shift, residual, out;
  bool channels_last = true;    // channel stride 1 everywhere; else everything is (B, C, T, H, W) contiguous
  bool centered = true;         // subtract the mean
  bool over_positions = false;  // statistics over positions too (GroupNorm); else at each position alone
  bool per_frame = false;
  int groups = 1;
  float eps = 1e-6f;
  bool silu = false;
  int threads = 1;
};

// y = silu((norm(x + residual) * weight + bias) * scale + shift), computed in float32 and rounded once.
Status norm_act(const NormProblem& problem);

// Moments of n values: their mean and the sum of squares about it (about zero where the mean is not
// subtracted).
struct Moments {
  double n, mean, m2;
};

// What the kernels see. A task is a range of positions of one frame.
struct NormPlan {
  DType dtype;
  const void *x, *residual, *scale, *shift;
  void* out;
  int64_t batch, channels, frames, height, width;
  int64_t x_stride[5], residual_stride[5], scale_stride[5], shift_stride[5], out_stride[5];
  const float *weight, *bias;  // (C) float32, ones and zeros where absent
  bool channels_last, centered, silu;
  int groups;
  float eps;
  int64_t chunk, chunks_per_frame;    // positions per task
  Moments* partial;                   // GroupNorm: (task, group)
  const float *mean, *gain, *offset;  // GroupNorm: (B, T or 1, C): y = (x - mean) * gain + offset
  bool per_frame;
};

struct NormTask {
  int64_t b, t, first, count;  // positions [first, first + count) of frame t, row by row
};

}  // namespace vtok::cpu

// Floats of scratch that one task needs.
VTOK_DECLARE(int64_t norm_scratch(const NormPlan& plan))
VTOK_DECLARE(void norm_positions(const NormPlan& plan, NormTask task, float* scratch))
VTOK_DECLARE(void group_moments(const NormPlan& plan, NormTask task, Moments* out, float* scratch))
VTOK_DECLARE(void group_apply(const NormPlan& plan, NormTask task))
