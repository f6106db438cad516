// causal_conv3d on CUDA GPUs from compute capability 8.0: forward, gradient of the input (dgrad), gradient of
// the weights and the bias (wgrad). Launchers only: they check, plan and enqueue; they never allocate, copy
// to the host or synchronize, so every call can be captured in a CUDA graph. Scratch memory comes from the
// caller, who asks for its size first.
#pragma once
#include "status.h"
#include "tensor.h"

namespace vtok::cuda {

enum class PadMode : int { zeros = 0, replicate = 1, reflect = 2 };

struct ConvProblem {
  // (B, C, T, H, W): float32, bfloat16 or float16; channel stride 1, or any strides through a slower gather
  Tensor x;
  Tensor cache;   // (B, C, n, H, W) or absent: the frames before x; strides of x except for batch and time
  Tensor weight;  // (O, C/groups, kt, kh, kw), any strides
  Tensor bias;    // (O) or absent, contiguous
  // the output's shape, or the shape that `upsample` makes the output's, or absent; channel stride 1
  Tensor residual;
  Tensor out;  // (B, O/(rt*rh*rw), To*rt, Ho*rh, Wo*rw), channel stride 1
  int stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1};
  int groups = 1;
  int64_t pad[6] = {};  // front, back, top, bottom, left, right; in upsampled frames, rows, columns
  PadMode time_mode = PadMode::zeros, spatial_mode = PadMode::zeros;
  int upsample[3] = {1, 1, 1};
  bool upsample_first_frame_once = false;
  int depth_to_space[3] = {1, 1, 1};  // groups must be 1 where it is not (1, 1, 1)
  bool silu = false;
  bool has_alpha = false;
  float alpha = 0;
  bool allow_tf32 = false;  // float32 products in tf32 on the matrix units; else exact float32 multiply-adds
};

// A tile shape and a number of K splits to insist on, for tests and for tuning; 0 leaves the choice to the
// plan.
struct ConvChoice {
  int tile_m = 0, tile_n = 0, splits = 0;
  // The Hopper kernel instead of the one for every GPU; and its blocks per cluster and stages of weights.
  bool sm90 = false;
  int cluster = 0, stages = 0;
  int64_t* report = nullptr;  // takes the Hopper plan: kHopperReport numbers, see run_conv_sm90
};
constexpr int kHopperReport = 10;

// Each launcher with `workspace_bytes` set only reports how much scratch memory (16-byte aligned) the call
// needs.
Status causal_conv3d(const ConvProblem& problem, ConvChoice choice, void* workspace, int64_t* workspace_bytes,
                     void* stream);

// grad: (B, O, To, Ho, Wo), channel stride 1, the gradient of the convolution's own result (before bias,
// SiLU, blend and depth-to-space). The gradients are written, not accumulated; an absent one is not computed.
// problem.x and problem.cache give shapes only here; their gradients have channel stride 1.
Status causal_conv3d_dgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                           const Tensor& grad_cache, ConvChoice choice, void* workspace,
                           int64_t* workspace_bytes, void* stream);

// grad_weight: the shape of problem.weight, any strides; grad_bias: (O), contiguous, or absent.
Status causal_conv3d_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                           const Tensor& grad_bias, ConvChoice choice, void* workspace,
                           int64_t* workspace_bytes, void* stream);

}  // namespace vtok::cuda
