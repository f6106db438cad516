// causal_conv3d's gradient of the weights and the bias on Hopper: causal_conv3d_sm90_wgrad.cu.
#pragma once
#include "cuda/causal_conv3d/call.h"

namespace vtok::cuda {

// Columns of the tile (384 or 192 for kernels of height 3, else 256 or 128), K splits and blocks per cluster
// to insist on; 0 leaves the choice to the plan.
struct HopperWgradChoice {
  int columns = 0, splits = 0, cluster = 0;
  // takes kHopperWgradReport numbers: those three, tiles whole and split, stages, cycles predicted
  int64_t* report = nullptr;
};
constexpr int kHopperWgradReport = 7;

// As causal_conv3d_wgrad; Unsupported, with the reason, where the kernel cannot run it. Only in a build that
// has 90a.
Status causal_conv3d_sm90_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                                const Tensor& grad_bias, HopperWgradChoice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream);

// `need` may have room for the report behind the number of bytes.
inline Status causal_conv3d_sm90_wgrad_call(Tensor x, Tensor weight, Tensor cache, Triple stride,
                                            Triple dilation, int groups, std::array<int64_t, 6> pad,
                                            int time_mode, int spatial_mode, Triple upsample, bool once,
                                            bool tf32, Tensor grad, Tensor grad_weight, Tensor grad_bias,
                                            Triple choice, Tensor workspace, Tensor need, uint64_t stream) {
  const ConvProblem p = conv_problem(x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode,
                                     upsample, once, tf32);
  HopperWgradChoice wish = {choice[0], choice[1], choice[2]};
  if (need.size[0] == 1 + kHopperWgradReport) wish.report = static_cast<int64_t*>(need.data) + 1;
  return causal_conv3d_sm90_wgrad(p, grad, grad_weight, grad_bias, wish, workspace.data,
                                  workspace ? nullptr : static_cast<int64_t*>(need.data),
                                  reinterpret_cast<void*>(stream));
}

}  // namespace vtok::cuda
