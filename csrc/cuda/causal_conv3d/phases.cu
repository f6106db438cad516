// Taps that read the same element are one tap with the sum of their weights. That is so for every output of
// one phase of a nearest upsampling: with a factor u, output u q + r reads at q + floor((r + tap - front) /
// u), so each of the u phases is a convolution of the small input with fewer taps (3 become 2 for u = 2: 27
// multiply-adds become 8 in a 3x3x3 over twice the frames, rows and columns). And it is so for all temporal
// taps over a single replicated frame, an image. The sums are made in float32 and rounded once.
#include <algorithm>

#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {
namespace {

int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Whether every tap of an upsampled axis can be read in the coordinates of the small input: padding must not
// look at the upsampled ones. Reflection does; so do zeros in front of a first frame that is not repeated.
bool has_phases(const Source& s, int axis) {
  const PadMode mode = axis == 0 ? s.time_mode : s.spatial_mode;
  if (s.upsample[axis] == 1 || s.kernel[axis] == 1 || s.stride[axis] != 1 || s.dilation[axis] != 1)
    return false;
  if (mode == PadMode::reflect) return false;
  return axis > 0 || !s.once || mode == PadMode::replicate || s.pad[0] <= 0;
}

// Phase r of the task along one axis.
ConvTask phase_of(ConvTask task, int axis, int r) {
  Source& s = task.source;
  RelaidWeight& w = task.weight;
  Epilogue& e = task.epilogue;
  const int u = s.upsample[axis], taps = s.kernel[axis];
  const bool once = axis == 0 && s.once;
  // A single first frame lacks u - 1 repetitions.
  int front = s.pad[axis] - (once ? u - 1 : 0), length = s.length[axis], cached = 0;
  if (axis == 0) {
    front += s.used_cache;
    cached = s.cached / u;
    length += (once ? u - 1 : 0) - s.used_cache;
  }
  const int first = floor_divide(r - front, u);
  w.folded = true;
  for (int tap = 0; tap < taps; ++tap) {
    const int merged = floor_divide(r + tap - front, u) - first;
    w.tap_begin[axis][merged + 1] = int8_t(tap + 1);
    s.kernel[axis] = w.kernel[axis] = merged + 1;
  }
  s.upsample[axis] = 1;
  s.pad[axis] = -first;
  s.length[axis] = length / u;
  if (axis == 0) {
    s.time_taps = s.kernel[0];
    s.once = false;
    s.cached = cached;
    s.used_cache = std::min(cached, std::max(-first, 0));
    s.pad[0] -= s.used_cache;
    s.length[0] += s.used_cache;
  }
  const int outputs = s.out[axis], bytes = element_size(task.dtype);
  s.out[axis] = (outputs - r + u - 1) / u;
  s.positions = s.positions / outputs * s.out[axis];

  const int at = axis + 1;  // strides begin with the batch
  e.out = static_cast<char*>(e.out) + r * e.out_stride[at] * bytes;
  e.out_stride[at] *= u;
  if (e.residual) {
    const bool upsampled = e.residual_upsample[axis] > 1;
    int skipped = r;
    if (upsampled) skipped = once && r > 0 ? 1 : 0;
    e.residual = static_cast<const char*>(e.residual) + skipped * e.residual_stride[at] * bytes;
    if (!upsampled) e.residual_stride[at] *= u;
    e.residual_upsample[axis] = 1;
    if (axis == 0) e.residual_once = false;
  }
  return task;
}

}  // namespace

std::vector<ConvTask> merge_taps(const ConvTask& task) {
  std::vector<ConvTask> tasks = {task};
  if (*std::max_element(task.source.kernel, task.source.kernel + 3) > kMaxMergedTaps) return tasks;
  // depth-to-space places its own phases
  if (task.epilogue.channels != task.epilogue.all_channels) return tasks;
  ConvTask& whole = tasks[0];
  Source& s = whole.source;
  for (int axis = 0; axis < 3; ++axis)
    for (int tap = 0; tap <= kMaxMergedTaps; ++tap) whole.weight.tap_begin[axis][tap] = int8_t(tap);
  if (s.length[0] == 1 && s.kernel[0] > 1 && s.time_mode == PadMode::replicate) {
    whole.weight.folded = true;
    whole.weight.tap_begin[0][1] = int8_t(s.kernel[0]);
    s.kernel[0] = s.time_taps = whole.weight.kernel[0] = 1;
    s.pad[0] = 0;
  }
  for (int axis = 0; axis < 3; ++axis) {
    if (!has_phases(s, axis)) continue;
    std::vector<ConvTask> phases;
    for (const ConvTask& t : tasks)
      for (int r = 0; r < std::min(t.source.upsample[axis], t.source.out[axis]); ++r)
        phases.push_back(phase_of(t, axis, r));
    tasks = phases;
  }
  return tasks;
}

}  // namespace vtok::cuda
