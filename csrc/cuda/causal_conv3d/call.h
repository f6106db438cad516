// The launchers of causal_conv3d.h with the arguments in a row, as Python hands them over: through the
// bindings on a GPU, through the emulator in the tests. Both write the scratch memory they need (bytes) to
// `need`, one int64 on the CPU, and do nothing else where no workspace is given.
#pragma once
#include <algorithm>
#include <array>
#include <optional>

#include "cuda/causal_conv3d/causal_conv3d.h"

namespace vtok::cuda {

using Triple = std::array<int, 3>;

inline ConvProblem conv_problem(const Tensor& x, const Tensor& weight, const Tensor& cache, Triple stride,
                                Triple dilation, int groups, std::array<int64_t, 6> pad, int time_mode,
                                int spatial_mode, Triple upsample, bool once, bool tf32) {
  ConvProblem p;
  p.x = x, p.weight = weight, p.cache = cache;
  std::copy(stride.begin(), stride.end(), p.stride), std::copy(dilation.begin(), dilation.end(), p.dilation);
  std::copy(pad.begin(), pad.end(), p.pad), std::copy(upsample.begin(), upsample.end(), p.upsample);
  p.groups = groups, p.upsample_first_frame_once = once, p.allow_tf32 = tf32;
  p.time_mode = static_cast<PadMode>(time_mode), p.spatial_mode = static_cast<PadMode>(spatial_mode);
  return p;
}

inline Status causal_conv3d_call(Tensor x, Tensor weight, Tensor cache, Triple stride, Triple dilation,
                                 int groups, std::array<int64_t, 6> pad, int time_mode, int spatial_mode,
                                 Triple upsample, bool once, bool tf32, Tensor bias, Tensor residual,
                                 Tensor out, std::optional<float> alpha, bool silu, Triple depth_to_space,
                                 Triple choice, Tensor workspace, Tensor need, uint64_t stream) {
  ConvProblem p = conv_problem(x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode,
                               upsample, once, tf32);
  p.bias = bias, p.residual = residual, p.out = out;
  p.has_alpha = alpha.has_value(), p.alpha = alpha.value_or(0), p.silu = silu;
  std::copy(depth_to_space.begin(), depth_to_space.end(), p.depth_to_space);
  return causal_conv3d(p, {choice[0], choice[1], choice[2]}, workspace.data,
                       workspace ? nullptr : static_cast<int64_t*>(need.data),
                       reinterpret_cast<void*>(stream));
}

// The same and the input's gradient by the Hopper kernel. `need` may have room for its plan behind the number
// of bytes: that of the last of several launches.
using HopperChoice = std::array<int, 5>;  // rows and columns of the tile, splits, cluster, stages

inline ConvChoice hopper_choice(const HopperChoice& c, const Tensor& need) {
  ConvChoice choice = {c[0], c[1], c[2], true, c[3], c[4]};
  if (need.size[0] == 1 + kHopperReport) choice.report = static_cast<int64_t*>(need.data) + 1;
  return choice;
}

inline Status causal_conv3d_sm90_call(Tensor x, Tensor weight, Tensor cache, Triple stride, Triple dilation,
                                      int groups, std::array<int64_t, 6> pad, int time_mode, int spatial_mode,
                                      Triple upsample, bool once, bool tf32, Tensor bias, Tensor residual,
                                      Tensor out, std::optional<float> alpha, bool silu,
                                      Triple depth_to_space, HopperChoice choice, Tensor workspace,
                                      Tensor need, uint64_t stream) {
  ConvProblem p = conv_problem(x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode,
                               upsample, once, tf32);
  p.bias = bias, p.residual = residual, p.out = out;
  p.has_alpha = alpha.has_value(), p.alpha = alpha.value_or(0), p.silu = silu;
  std::copy(depth_to_space.begin(), depth_to_space.end(), p.depth_to_space);
  return causal_conv3d(p, hopper_choice(choice, need), workspace.data,
                       workspace ? nullptr : static_cast<int64_t*>(need.data),
                       reinterpret_cast<void*>(stream));
}

inline Status causal_conv3d_sm90_dgrad_call(Tensor x, Tensor weight, Tensor cache, Triple stride,
                                            Triple dilation, int groups, std::array<int64_t, 6> pad,
                                            int time_mode, int spatial_mode, Triple upsample, bool once,
                                            bool tf32, Tensor grad, Tensor grad_x, Tensor grad_cache,
                                            HopperChoice choice, Tensor workspace, Tensor need,
                                            uint64_t stream) {
  const ConvProblem p = conv_problem(x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode,
                                     upsample, once, tf32);
  return causal_conv3d_dgrad(p, grad, grad_x, grad_cache, hopper_choice(choice, need), workspace.data,
                             workspace ? nullptr : static_cast<int64_t*>(need.data),
                             reinterpret_cast<void*>(stream));
}

// The input's and the weights' gradients run one after the other and share the scratch memory.
inline Status causal_conv3d_backward_call(Tensor x, Tensor weight, Tensor cache, Triple stride,
                                          Triple dilation, int groups, std::array<int64_t, 6> pad,
                                          int time_mode, int spatial_mode, Triple upsample, bool once,
                                          bool tf32, Tensor grad, Tensor grad_x, Tensor grad_cache,
                                          Tensor grad_weight, Tensor grad_bias, Triple choice,
                                          Tensor workspace, Tensor need, uint64_t stream) {
  const ConvProblem p = conv_problem(x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode,
                                     upsample, once, tf32);
  const ConvChoice wish = {choice[0], choice[1], choice[2]};
  int64_t dgrad = 0, wgrad = 0;
  if (grad_x || grad_cache)
    VTOK_RETURN_IF_ERROR(causal_conv3d_dgrad(p, grad, grad_x, grad_cache, wish, workspace.data,
                                             workspace ? nullptr : &dgrad, reinterpret_cast<void*>(stream)));
  if (grad_weight)
    VTOK_RETURN_IF_ERROR(causal_conv3d_wgrad(p, grad, grad_weight, grad_bias, wish, workspace.data,
                                             workspace ? nullptr : &wgrad, reinterpret_cast<void*>(stream)));
  if (!workspace) *static_cast<int64_t*>(need.data) = std::max(dgrad, wgrad);
  return Status::Ok();
}

}  // namespace vtok::cuda
