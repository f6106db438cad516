// causal_conv3d forward, as sm80 and sm90 share it: the checks, and the call as tasks for one of their kernels.
#include <algorithm>
#include <string>

#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {
namespace {

Status check_output(const ConvProblem& problem, const Source& s) {
  const Tensor &out = problem.out, &residual = problem.residual;
  const int* spread = problem.depth_to_space;
  const int phases = spread[0] * spread[1] * spread[2];
  if (phases > 1 && problem.groups > 1) return Status::Unsupported("depth_to_space: with groups");
  const int64_t expected[5] = {problem.x.size[0], problem.weight.size[0] / phases,
                               int64_t(s.out[0]) * spread[0], int64_t(s.out[1]) * spread[1],
                               int64_t(s.out[2]) * spread[2]};
  for (int i = 0; i < 5; ++i)
    if (out.rank != 5 || out.size[i] != expected[i])
      return Status::Invalid("out: dimension " + std::to_string(i) + " must be " +
                             std::to_string(expected[i]));
  auto adjacent = [](const Tensor& t) { return t.size[1] <= 1 || t.stride[1] == 1; };
  if (!adjacent(out) || !adjacent(residual))
    return Status::Invalid("out, residual: the channel stride must be 1");
  return Status::Ok();
}

RelaidWeight weight_of(const ConvProblem& problem, const Source& s) {
  const Tensor& weight = problem.weight;
  const int* spread = problem.depth_to_space;
  RelaidWeight w = {};
  w.groups = problem.groups;
  w.outputs = int(weight.size[0]) / problem.groups;
  w.channels = int(weight.size[1]);
  w.phases = spread[0] * spread[1] * spread[2];
  w.phase_channels = w.outputs / w.phases;
  w.bias = problem.bias.data;
  w.from = {weight.data,
            w.outputs * weight.stride[0],
            weight.stride[0],
            weight.stride[1],
            {weight.stride[2], weight.stride[3], weight.stride[4]}};
  std::copy(s.kernel, s.kernel + 3, w.kernel);
  std::copy(s.kernel, s.kernel + 3, w.taps);
  return w;
}

Epilogue epilogue_of(const ConvProblem& problem, const RelaidWeight& w) {
  const Tensor &out = problem.out, &residual = problem.residual;
  const int bytes = element_size(problem.out.dtype), outputs = int(problem.weight.size[0]);
  Epilogue e = {};
  e.out = out.data;
  e.residual = residual.data;
  e.channels = outputs / w.phases;
  e.all_channels = outputs;
  e.silu = problem.silu;
  e.blend = problem.has_alpha;
  e.alpha = problem.alpha;
  std::copy(problem.depth_to_space, problem.depth_to_space + 3, e.spread);
  e.vectors = e.channels % 8 == 0 && w.outputs % 8 == 0 && aligned16(out.data) && aligned16(residual.data);
  const int axes[4] = {0, 2, 3, 4};
  for (int i = 0; i < 4; ++i) {
    e.out_stride[i] = out.stride[axes[i]];
    e.vectors = e.vectors && out.stride[axes[i]] * bytes % 16 == 0;
    if (residual) {
      e.residual_stride[i] = residual.stride[axes[i]];
      e.vectors = e.vectors && (residual.size[axes[i]] == 1 || residual.stride[axes[i]] * bytes % 16 == 0);
    }
  }
  return e;
}

// Along which axes the residual is upsampled on its way.
Status upsample_residual(const ConvProblem& problem, const Source& s, Epilogue* e) {
  const Tensor &out = problem.out, &residual = problem.residual;
  for (int axis = 0; axis < 3; ++axis) {
    const bool same = !residual || residual.size[2 + axis] == out.size[2 + axis];
    e->residual_upsample[axis] = same ? 1 : problem.upsample[axis];
    if (axis == 0) e->residual_once = !same && s.once;
    const int64_t single = axis == 0 && e->residual_once ? problem.upsample[0] - 1 : 0;
    if (residual && (residual.size[0] != out.size[0] || residual.size[1] != out.size[1] ||
                     residual.size[2 + axis] * e->residual_upsample[axis] - single != out.size[2 + axis]))
      return Status::Invalid("residual: must have the output's shape, before or after upsampling");
  }
  return Status::Ok();
}

}  // namespace

Status run_forward(const RunTask& run, const ConvProblem& problem, void* workspace_base,
                   int64_t* workspace_bytes) {
  ConvTask task = {};
  VTOK_RETURN_IF_ERROR(make_source(problem, &task.source));
  VTOK_RETURN_IF_ERROR(check_output(problem, task.source));
  task.chunks = bind_source(problem.x, problem.cache, problem.groups, &task.source);
  task.dtype = problem.out.dtype;
  task.operands = problem.x.dtype;
  task.tf32 = problem.allow_tf32;
  task.weight = weight_of(problem, task.source);
  task.epilogue = epilogue_of(problem, task.weight);
  VTOK_RETURN_IF_ERROR(upsample_residual(problem, task.source, &task.epilogue));
  // One after the other on the stream, and so in the same scratch memory.
  int64_t most = 0;
  // Sums of weights would be rounded to e4m3 otherwise than the weights.
  for (ConvTask& part : task.operands == DType::e4m3 ? std::vector<ConvTask>{task} : merge_taps(task)) {
    int64_t bytes_of_part = *workspace_bytes;
    Workspace workspace(workspace_base, &bytes_of_part);
    VTOK_RETURN_IF_ERROR(run(part, workspace));
    most = std::max(most, bytes_of_part);
  }
  *workspace_bytes = most;
  return Status::Ok();
}

}  // namespace vtok::cuda
