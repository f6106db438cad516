// causal_conv3d on CUDA GPUs from compute capability 8.0: forward, gradient of the input (dgrad), gradient of
// the weights and the bias (wgrad). Launchers only: they check, plan and enqueue; they never allocate, copy
// to the host or synchronize, so every call can be captured in a CUDA graph. Scratch memory comes from the
// caller, who asks for its size first.
#pragma once
#include "conv_problem.h"
#include "status.h"

namespace vtok::cuda {

// What to insist on, for tests and for tuning: a tile shape, a number of K splits. 0 leaves the choice to the
// plan.
struct Sm80Choice {
  int tile_m = 0, tile_n = 0, splits = 0;
};

struct Sm90Choice {
  int tile_m = 0, tile_n = 0, splits = 0, cluster = 0, stages = 0;  // blocks per cluster, stages of weights
  // takes the plan, kSm90Report numbers: tile_m, tile_n, splits, cluster, stages of weights, stages of patches,
  // the tile's frames, rows and columns, the cycles predicted; units of work (of a cluster, one tile each), and
  // the cycles that one would keep the tensor cores, shared memory and L2 busy, before splits
  int64_t* report = nullptr;
};
constexpr int kSm90Report = 14;

// Which of the two runs a call is the caller's choice. Those of sm90 are only in a build that has 90a, and
// return Unsupported, with the reason, where their kernel cannot run a call.
//
// x: float32, bfloat16 or float16; channel stride 1, or any strides through a slower gather. cache: the strides
// of x except for batch and time. bias: the type of x. residual and out: channel stride 1.
//
// *workspace_bytes is the size of the scratch memory (16-byte aligned), and becomes the size that the call
// needs. Where that is more, or where there is no memory, nothing is launched.
Status causal_conv3d_sm80(const ConvProblem& problem, Sm80Choice choice, void* workspace,
                          int64_t* workspace_bytes, void* stream);
Status causal_conv3d_sm90(const ConvProblem& problem, Sm90Choice choice, void* workspace,
                          int64_t* workspace_bytes, void* stream);
// The same with operands of e4m3: x and the cache divided by x_scale, one float32, a power of two, on the device;
// each output's weights by a power of two that brings the largest to between 224 and 448. Rounded to nearest even,
// 448 at most. No upsampling, no groups; input channels a multiple of 16.
Status causal_conv3d_sm90_e4m3(const ConvProblem& problem, const Tensor& x_scale, Sm90Choice choice,
                               void* workspace, int64_t* workspace_bytes, void* stream);

// grad: (B, O, To, Ho, Wo), channel stride 1, the gradient of the convolution's own result (before bias,
// SiLU, blend and depth-to-space). The gradients are written, not accumulated; an absent one is not computed.
// problem.x and problem.cache give shapes only here; their gradients have channel stride 1.
Status causal_conv3d_sm80_dgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                                const Tensor& grad_cache, Sm80Choice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream);
Status causal_conv3d_sm90_dgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                                const Tensor& grad_cache, Sm90Choice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream);

// grad_weight: the shape of problem.weight, any strides; grad_bias: (O), contiguous, or absent. That of sm90:
// sm90_wgrad.h.
Status causal_conv3d_sm80_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                                const Tensor& grad_bias, Sm80Choice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream);

}  // namespace vtok::cuda
