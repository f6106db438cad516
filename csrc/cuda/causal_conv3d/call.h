// The launchers of causal_conv3d.h with the arguments in a row, as Python hands them over: through the
// bindings on a GPU, through the emulator in the tests. All write the scratch memory they need (bytes) to
// `need`, one int64 on the CPU, and launch nothing where the workspace is smaller or absent.
#pragma once
#include <algorithm>

#include "cuda/causal_conv3d/causal_conv3d.h"
#include "cuda/device.h"

namespace vtok::cuda {

// Where a launcher finds the size of the workspace, and leaves what it needs.
inline int64_t* bytes_of(const Tensor& workspace, const Tensor& need) {
  auto* bytes = static_cast<int64_t*>(need.data);
  *bytes = workspace ? workspace.size[0] : 0;
  return bytes;
}

// ---- every GPU from sm_80 on ------------------------------------------------------------------------------

inline Sm80Choice sm80_choice(const Triple& c) { return {c[0], c[1], c[2]}; }

inline Status causal_conv3d_sm80_call(Tensor x, Tensor weight, Tensor cache, ConvGeometry geometry, bool tf32,
                                      Tensor bias, Tensor residual, Tensor out, std::optional<float> alpha,
                                      bool silu, Triple depth_to_space, Triple choice, Tensor workspace,
                                      Tensor need, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  ConvProblem p = with_epilogue(conv_problem(x, weight, cache, geometry), bias, residual, out, alpha, silu,
                                depth_to_space);
  p.allow_tf32 = tf32;
  return causal_conv3d_sm80(p, sm80_choice(choice), workspace.data, bytes_of(workspace, need),
                            stream_of(queue));
}

// The input's and the weights' gradients run one after the other and share the scratch memory.
inline Status causal_conv3d_sm80_backward_call(Tensor x, Tensor weight, Tensor cache, ConvGeometry geometry,
                                               bool tf32, Tensor grad, Tensor grad_x, Tensor grad_cache,
                                               Tensor grad_weight, Tensor grad_bias, Triple choice,
                                               Tensor workspace, Tensor need, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  ConvProblem p = conv_problem(x, weight, cache, geometry);
  p.allow_tf32 = tf32;
  int64_t* need_bytes = bytes_of(workspace, need);
  int64_t dgrad = *need_bytes, wgrad = *need_bytes;
  if (grad_x || grad_cache)
    VTOK_RETURN_IF_ERROR(causal_conv3d_sm80_dgrad(p, grad, grad_x, grad_cache, sm80_choice(choice),
                                                  workspace.data, &dgrad, stream_of(queue)));
  if (grad_weight)
    VTOK_RETURN_IF_ERROR(causal_conv3d_sm80_wgrad(p, grad, grad_weight, grad_bias, sm80_choice(choice),
                                                  workspace.data, &wgrad, stream_of(queue)));
  *need_bytes = std::max(grad_x || grad_cache ? dgrad : 0, grad_weight ? wgrad : 0);
  return Status::Ok();
}

// ---- sm_90a only ------------------------------------------------------------------------------------------

using Quintuple = std::array<int, 5>;  // rows and columns of the tile, splits, cluster, stages

// `need` may have room for the plan after the number of bytes: that of the last of several launches.
inline Sm90Choice sm90_choice(const Quintuple& c, const Tensor& need) {
  Sm90Choice choice = {c[0], c[1], c[2], c[3], c[4]};
  if (need.size[0] == 1 + kSm90Report) choice.report = static_cast<int64_t*>(need.data) + 1;
  return choice;
}

inline Status causal_conv3d_sm90_call(Tensor x, Tensor weight, Tensor cache, ConvGeometry geometry,
                                      Tensor bias, Tensor residual, Tensor out, std::optional<float> alpha,
                                      bool silu, Triple depth_to_space, Quintuple choice, Tensor workspace,
                                      Tensor need, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  const ConvProblem p = with_epilogue(conv_problem(x, weight, cache, geometry), bias, residual, out, alpha,
                                      silu, depth_to_space);
  return causal_conv3d_sm90(p, sm90_choice(choice, need), workspace.data, bytes_of(workspace, need),
                            stream_of(queue));
}

inline Status causal_conv3d_sm90_e4m3_call(Tensor x, Tensor weight, Tensor cache, ConvGeometry geometry,
                                           Tensor bias, Tensor residual, Tensor out,
                                           std::optional<float> alpha, bool silu, Triple depth_to_space,
                                           Tensor x_scale, Quintuple choice, Tensor workspace, Tensor need,
                                           Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  const ConvProblem p = with_epilogue(conv_problem(x, weight, cache, geometry), bias, residual, out, alpha,
                                      silu, depth_to_space);
  return causal_conv3d_sm90_e4m3(p, x_scale, sm90_choice(choice, need), workspace.data,
                                 bytes_of(workspace, need), stream_of(queue));
}

inline Status causal_conv3d_sm90_dgrad_call(Tensor x, Tensor weight, Tensor cache, ConvGeometry geometry,
                                            Tensor grad, Tensor grad_x, Tensor grad_cache, Quintuple choice,
                                            Tensor workspace, Tensor need, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  return causal_conv3d_sm90_dgrad(conv_problem(x, weight, cache, geometry), grad, grad_x, grad_cache,
                                  sm90_choice(choice, need), workspace.data, bytes_of(workspace, need),
                                  stream_of(queue));
}

}  // namespace vtok::cuda
