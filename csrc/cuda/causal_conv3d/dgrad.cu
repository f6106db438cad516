// causal_conv3d, gradient of the input: the forward kernel on the output's gradient, with transposed and
// mirrored weights and mirrored pads; a stride becomes a gap between the coordinates that exist.
//
// An axis that pads with zeros needs no more, and replicated frames only more terms for the first and the
// last frame (Source::before). Else, where elements are read several times (replicated or reflected rows and
// columns, upsampling, cached frames), the axis is computed in the padded domain, in scratch memory, and a
// second kernel gathers for each element of x and of the cache the positions that read it, in a fixed order:
// deterministic, at one read of the domain and one write of the gradient.
#include <algorithm>
#include <string>

#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {
namespace {

constexpr int kMostFrames = 12;  // entries of the frame table: what shared memory still holds beside any tile

// One axis of the domain in which the gradient is computed: `front` padded coordinates, `length` real ones,
// then the rest.
struct FoldAxis {
  int front, length, domain, upsample;
  PadMode mode;
};

struct FoldParams {
  const void* from;  // [B][domain T][domain H][domain W][C]
  void* to;
  int64_t to_stride[4];  // elements: batch, time, height, width
  FoldAxis axis[3];
  int size[3], channels;  // of the target
  int64_t positions;
  // timeline coordinate of the target's first upsampled frame; negative where leading frames were not read
  int first_frame;
  bool once;
};

// Calls visit(q) for each domain coordinate q whose source lies in [lo, hi], in ascending order: some of the
// padding before, the elements themselves, some of the padding after. One loop, so that three of them nested
// are one body.
template <class Visit>
__device__ inline void for_each_reader(const FoldAxis& a, int lo, int hi, Visit&& visit) {
  if (lo < 0) lo = 0;
  const int own = hi >= lo ? hi - lo + 1 : 0, back = a.domain - a.front - a.length;
  for (int k = 0; k < a.front + own + back; ++k) {
    int q = k;
    if (k >= a.front) q = k < a.front + own ? k + lo : k - own + a.length;
    const int i = pad_index(q - a.front, a.length, a.mode);
    if (lo <= i && i <= hi) visit(q);
  }
}

// One thread per 8 channels of a position, or fewer at the end: threadIdx.x counts channels, threadIdx.y
// positions.
template <class T>
__global__ void __launch_bounds__(256, 4) fold_kernel(const FoldParams p, bool vectors) {
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int c = int(blockIdx.y * blockDim.x + threadIdx.x) * 8, count = min(8, p.channels - c);
  if (m >= p.positions || count <= 0) return;
  const Position at = position_of(m, p.size);
  const int ut = p.axis[0].upsample, uh = p.axis[1].upsample, uw = p.axis[2].upsample;
  const int single = p.once && at.t > 0 ? ut - 1 : 0;  // copies that the first frame lacks
  const int t0 = p.first_frame + at.t * ut - single;
  const int t1 = t0 + (p.once && at.t == 0 ? 1 : ut) - 1;
  float sum[8] = {};
  for_each_reader(p.axis[0], t0, t1, [&](int t) {
    for_each_reader(p.axis[1], at.h * uh, at.h * uh + uh - 1, [&](int h) {
      for_each_reader(p.axis[2], at.w * uw, at.w * uw + uw - 1, [&](int w) {
        const T* from =
            static_cast<const T*>(p.from) +
            (((at.b * p.axis[0].domain + t) * p.axis[1].domain + h) * p.axis[2].domain + w) * p.channels + c;
        if (vectors) {
          Vector8<T> v;
          v.load(from);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[i] += ptx::to_float(v.value[i]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i < count) sum[i] += ptx::to_float(ptx::ld_global(from + i));
        }
      });
    });
  });
  T* to = static_cast<T*>(p.to) + at.b * p.to_stride[0] + at.t * p.to_stride[1] + at.h * p.to_stride[2] +
          at.w * p.to_stride[3] + c;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) ptx::st_global(to + i, ptx::from_float<T>(sum[i]));
}

Status launch_fold(FoldParams p, const Tensor& target, cudaStream_t stream) {
  p.to = target.data;
  p.channels = int(target.size[1]);
  p.positions = target.size[0];
  p.to_stride[0] = target.stride[0];
  for (int i = 0; i < 3; ++i) {
    p.size[i] = int(target.size[2 + i]);
    p.to_stride[1 + i] = target.stride[2 + i];
    p.positions *= p.size[i];
  }
  if (p.positions == 0) return Status::Ok();
  const unsigned chunks = unsigned(p.channels + 7) / 8;
  unsigned across = 32;
  for (unsigned narrower : {16, 8})
    if (chunks <= narrower) across = narrower;
  const dim3 block(across, 256 / across);
  const dim3 grid(unsigned(divide_up(p.positions, block.y)), unsigned(divide_up(chunks, block.x)));
  const bool vectors = p.channels % 8 == 0;
  if (target.dtype == DType::f16) return VTOK_LAUNCH(fold_kernel<__half>, grid, block, 0, stream, p, vectors);
  if (target.dtype == DType::bf16)
    return VTOK_LAUNCH(fold_kernel<__nv_bfloat16>, grid, block, 0, stream, p, vectors);
  return VTOK_LAUNCH(fold_kernel<float>, grid, block, 0, stream, p, vectors);
}

// ---- the task ---------------------------------------------------------------------------------------------

Status check_gradients(const ConvProblem& problem, const Source& forward, const Tensor& grad,
                       const Tensor& grad_x, const Tensor& grad_cache) {
  const int64_t expected[5] = {problem.x.size[0], problem.weight.size[0], forward.out[0], forward.out[1],
                               forward.out[2]};
  for (int i = 0; i < 5; ++i)
    if (grad.rank != 5 || grad.size[i] != expected[i])
      return Status::Invalid("grad: must have the convolution's shape");
  if (problem.x.size[1] > 1 &&
      ((grad_x && grad_x.stride[1] != 1) || (grad_cache && grad_cache.stride[1] != 1)))
    return Status::Invalid("grad_x, grad_cache: the channel stride must be 1");
  return Status::Ok();
}

// The domain of each axis, and the convolution over it. True where an axis must be folded.
bool make_domain(const ConvProblem& problem, const Source& forward, Source* source, FoldParams* fold) {
  Source& s = *source;
  bool folds = forward.used_cache > 0 || forward.once;
  s.positions = problem.x.size[0];
  s.time_mode = s.spatial_mode = PadMode::zeros;
  for (int i = 0; i < 3; ++i) {
    const PadMode mode = i == 0 ? problem.time_mode : problem.spatial_mode;
    const int back = int(problem.pad[2 * i + 1]);
    bool padded = mode != PadMode::zeros && (forward.pad[i] > 0 || back > 0);
    if (i == 0) {
      s.before = s.after = 0;
      s.time_taps = forward.kernel[0];
      const int groups_of_taps = 1 + forward.pad[0] + back;
      if (padded && mode == PadMode::replicate && forward.upsample[0] == 1 && !problem.cache &&
          groups_of_taps * forward.kernel[0] <= kMostFrames) {
        padded = false;
        s.before = forward.pad[0];
        s.after = back;
      }
    }
    folds = folds || padded || forward.upsample[i] > 1;
    const int front = padded ? forward.pad[i] : 0;
    const int domain = forward.length[i] + (padded ? front + back : 0);
    fold->axis[i] = {front, forward.length[i], domain, forward.upsample[i], mode};
    s.kernel[i] = forward.kernel[i] * (i == 0 ? 1 + s.before + s.after : 1);
    s.stride[i] = 1;
    s.dilation[i] = forward.dilation[i];
    s.gap[i] = forward.stride[i];
    s.pad[i] = forward.dilation[i] * (forward.kernel[i] - 1) - (forward.pad[i] - front);
    s.length[i] = forward.out[i];
    s.upsample[i] = 1;
    s.out[i] = domain;
    s.positions *= domain;
  }
  return folds;
}

RelaidWeight mirrored_weight(const ConvProblem& problem, const Source& forward) {
  const Tensor& weight = problem.weight;
  RelaidWeight w = {};
  w.groups = problem.groups;
  w.outputs = int(problem.x.size[1]) / w.groups;
  w.channels = int(weight.size[0]) / w.groups;
  w.phases = 1;
  w.phase_channels = w.outputs;
  int64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    last += (weight.size[2 + i] - 1) * weight.stride[2 + i];
    w.from.tap[i] = -weight.stride[2 + i];
    w.kernel[i] = w.taps[i] = forward.kernel[i];
  }
  w.from.data = static_cast<const char*>(weight.data) + last * element_size(weight.dtype);
  w.from.group = w.channels * weight.stride[0];
  w.from.n = weight.stride[1];
  w.from.channel = weight.stride[0];
  return w;
}

// Where the convolution's results go: to the domain in scratch memory, or to the gradient itself.
Epilogue results_to(const Tensor* grad_x, const ConvTask& task, int channels, Workspace& workspace) {
  const Source& s = task.source;
  const int bytes = element_size(task.dtype);
  Epilogue e = {};
  e.channels = e.all_channels = channels;
  for (int i = 0; i < 3; ++i) e.spread[i] = e.residual_upsample[i] = 1;
  if (grad_x) {
    const int axes[4] = {0, 2, 3, 4};
    for (int i = 0; i < 4; ++i) e.out_stride[i] = grad_x->stride[axes[i]];
    e.out = grad_x->data;
  } else {
    e.out = workspace.take(s.positions * channels * bytes);
    int64_t stride = channels;
    for (int i = 3; i > 0; --i) {
      e.out_stride[i] = stride;
      stride *= s.out[i - 1];
    }
    e.out_stride[0] = stride;
  }
  e.vectors = task.weight.outputs % 8 == 0 && aligned16(e.out);
  for (int64_t stride : e.out_stride) e.vectors = e.vectors && stride * bytes % 16 == 0;
  return e;
}

}  // namespace

Status run_dgrad(const RunTask& run, const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                 const Tensor& grad_cache, void* workspace_base, int64_t* workspace_bytes, void* stream) {
  Source forward;
  VTOK_RETURN_IF_ERROR(make_source(problem, &forward));
  VTOK_RETURN_IF_ERROR(check_gradients(problem, forward, grad, grad_x, grad_cache));

  ConvTask task = {};
  FoldParams fold = {};
  const bool folds = make_domain(problem, forward, &task.source, &fold) || grad_cache;
  task.chunks = bind_source(grad, {}, problem.groups, &task.source);
  task.dtype = task.operands = problem.x.dtype;
  task.tf32 = problem.allow_tf32;
  task.weight = mirrored_weight(problem, forward);
  Workspace workspace(workspace_base, workspace_bytes);
  task.epilogue = results_to(folds ? nullptr : &grad_x, task, int(problem.x.size[1]), workspace);
  VTOK_RETURN_IF_ERROR(run(task, workspace));
  if (workspace.only_counts() || !folds) return Status::Ok();

  fold.from = task.epilogue.out;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (grad_x) {
    fold.first_frame = forward.used_cache;
    fold.once = forward.once;
    VTOK_RETURN_IF_ERROR(launch_fold(fold, grad_x, cuda_stream));
  }
  if (grad_cache) {
    fold.first_frame = forward.used_cache - forward.cached;
    fold.once = false;
    VTOK_RETURN_IF_ERROR(launch_fold(fold, grad_cache, cuda_stream));
  }
  return Status::Ok();
}

}  // namespace vtok::cuda
