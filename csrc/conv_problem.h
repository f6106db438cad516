// One call of causal_conv3d as data, the same for every device: Python's `Geometry`, field by field, and the
// tensors around it.
#pragma once
#include <array>
#include <optional>

#include "tensor.h"

namespace vtok {

using Triple = std::array<int, 3>;

enum class PadMode : int { zeros = 0, replicate = 1, reflect = 2 };

// Where the convolution reads. Triples are (time, height, width).
struct ConvGeometry {
  int stride[3] = {1, 1, 1};
  int dilation[3] = {1, 1, 1};
  int groups = 1;
  int64_t pad[6] = {};  // front, back, top, bottom, left, right; in upsampled frames, rows, columns
  PadMode time_mode = PadMode::zeros;
  PadMode spatial_mode = PadMode::zeros;
  int upsample[3] = {1, 1, 1};  // nearest, before the convolution
  // T frames become 1 + (T-1)*upsample[0]; only where there is no cache
  bool upsample_first_frame_once = false;
};

// Each device says which memory layouts it takes.
struct ConvProblem : ConvGeometry {
  Tensor x;       // (B, C, T, H, W)
  Tensor weight;  // (O, C/groups, kt, kh, kw), any strides, the type of x
  Tensor cache;   // (B, C, n, H, W) or absent: the frames before x
  Tensor bias;    // (O) or absent, contiguous
  // the output's shape, or the shape that `upsample` makes the output's, or absent
  Tensor residual;
  Tensor out;  // (B, O/(rt*rh*rw), To*rt, Ho*rh, Wo*rw) with depth_to_space = (rt, rh, rw)
  // alpha * residual + (1 - alpha) * activation(conv + bias); without alpha the residual is added
  bool has_alpha = false;
  float alpha = 0;
  bool silu = false;
  int depth_to_space[3] = {1, 1, 1};  // groups must be 1 where it is not (1, 1, 1); not on a CPU
  bool allow_tf32 = false;  // float32 products in tf32 on the matrix units; else exact float32 multiply-adds
};

inline ConvProblem conv_problem(const Tensor& x, const Tensor& weight, const Tensor& cache,
                                const ConvGeometry& geometry) {
  ConvProblem p;
  static_cast<ConvGeometry&>(p) = geometry;
  p.x = x;
  p.weight = weight;
  p.cache = cache;
  return p;
}

// The same call with everything that follows the sum.
inline ConvProblem with_epilogue(ConvProblem p, const Tensor& bias, const Tensor& residual, const Tensor& out,
                                 std::optional<float> alpha, bool silu, Triple depth_to_space) {
  p.bias = bias;
  p.residual = residual;
  p.out = out;
  p.has_alpha = alpha.has_value();
  p.alpha = alpha.value_or(0);
  p.silu = silu;
  for (int i = 0; i < 3; ++i) p.depth_to_space[i] = depth_to_space[i];
  return p;
}

}  // namespace vtok
