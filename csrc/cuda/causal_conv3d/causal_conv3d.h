// causal_conv3d on CUDA GPUs from compute capability 8.0: forward, gradient of the input (dgrad), gradient of
// the weights and the bias (wgrad). Launchers only: they check, plan and enqueue; they never allocate, copy
// to the host or synchronize, so every call can be captured in a CUDA graph. Scratch memory comes from the
// caller, who asks for its size first.
#pragma once
#include "conv_problem.h"
#include "status.h"

namespace vtok::cuda {

// A tile shape and a number of K splits to insist on, for tests and for tuning; 0 leaves the choice to the
// plan.
struct ConvChoice {
  int tile_m = 0, tile_n = 0, splits = 0;
  // The sm90 kernel instead of the one for every GPU; and its blocks per cluster and stages of weights.
  bool sm90 = false;
  int cluster = 0, stages = 0;
  int64_t* report = nullptr;  // takes the sm90 plan: kSm90Report numbers, see run_conv_sm90
};
constexpr int kSm90Report = 10;

// x: float32, bfloat16 or float16; channel stride 1, or any strides through a slower gather. cache: the strides
// of x except for batch and time. bias: the type of x. residual and out: channel stride 1.
//
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
