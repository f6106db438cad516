// causal_conv3d's gradient of the weights and the bias on sm_90a: sm90_wgrad.cu.
#pragma once
#include "cuda/causal_conv3d/call.h"

namespace vtok::cuda {

// Columns of the tile (384 or 192 for kernels of height 3, else 256 or 128), K splits and blocks per cluster
// to insist on; 0 leaves the choice to the plan.
struct Sm90WgradChoice {
  int columns = 0, splits = 0, cluster = 0;
  // takes kSm90WgradReport numbers: those three, tiles whole and split, stages, cycles predicted
  int64_t* report = nullptr;
};
constexpr int kSm90WgradReport = 7;

// As causal_conv3d_sm80_wgrad; Unsupported, with the reason, where the kernel cannot run it. Only in a build that
// has 90a.
Status causal_conv3d_sm90_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                                const Tensor& grad_bias, Sm90WgradChoice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream);

// `need` may have room for the report after the number of bytes. In the place of the weight stands its gradient:
// no weight is read, and a problem wants a tensor of that shape.
inline Status causal_conv3d_sm90_wgrad_call(Tensor x, Tensor grad_weight, Tensor cache, ConvGeometry geometry,
                                            Tensor grad, Tensor grad_bias, Triple choice, Tensor workspace,
                                            Tensor need, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  Sm90WgradChoice wanted = {choice[0], choice[1], choice[2]};
  if (need.size[0] == 1 + kSm90WgradReport) wanted.report = static_cast<int64_t*>(need.data) + 1;
  return causal_conv3d_sm90_wgrad(conv_problem(x, grad_weight, cache, geometry), grad, grad_weight, grad_bias,
                                  wanted, workspace.data, bytes_of(workspace, need), stream_of(queue));
}

}  // namespace vtok::cuda
