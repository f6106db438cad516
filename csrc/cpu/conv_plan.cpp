#include <algorithm>
#include <string>

#include "cpu/conv_plan.h"

namespace vtok::cpu {
namespace {

// Where index i of an axis of n elements is read under a padding mode; -1 reads a zero.
int64_t source_index(int64_t i, int64_t n, PadMode mode) {
  if (i >= 0 && i < n) return i;
  switch (mode) {
    case PadMode::zeros: return -1;
    case PadMode::replicate: return i < 0 ? 0 : n - 1;
    case PadMode::reflect: return i < 0 ? -i : 2 * (n - 1) - i;
  }
  return -1;
}

std::vector<int32_t> tap_table(int64_t out, int taps, int stride, int dilation, int64_t pad, int64_t n,
                               int upsample, PadMode mode) {
  std::vector<int32_t> table(out * taps);
  for (int64_t o = 0; o < out; ++o)
    for (int k = 0; k < taps; ++k) {
      int64_t source = source_index(o * stride + int64_t(k) * dilation - pad, n * upsample, mode);
      table[o * taps + k] = static_cast<int32_t>(source < 0 ? -1 : source / upsample);
    }
  return table;
}

int64_t out_size(int64_t n, int64_t pads, int kernel, int dilation, int stride) {
  int64_t span = n + pads - int64_t(dilation) * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// What the tables and kernels take for granted; vtok_fast.ops has said the same in more words.
Status check_options(const ConvProblem& p) {
  constexpr int64_t kLargestStep = 1 << 16, kLargestPad = int64_t(1) << 31, kLargestAxis = 1 << 27;
  auto is_mode = [](PadMode mode) { return mode >= PadMode::zeros && mode <= PadMode::reflect; };
  if (!is_mode(p.time_mode) || !is_mode(p.spatial_mode))
    return Status::Invalid("time_mode, spatial_mode: not a mode");
  for (int ratio : p.depth_to_space)
    if (ratio != 1) return Status::Unsupported("depth_to_space: not in the CPU kernels");
  for (int i = 0; i < 3; ++i)
    for (int64_t step : {p.stride[i], p.dilation[i], p.upsample[i]})
      if (step < 1 || step > kLargestStep)
        return Status::Invalid("stride, dilation, upsample: expected 1 to 2**16");
  const int64_t cached = p.cache ? p.cache.size[2] * p.upsample[0] : 0;
  for (int i = 0; i < 3; ++i) {
    int64_t n = p.x.size[2 + i] * p.upsample[i], front = p.pad[2 * i], back = p.pad[2 * i + 1];
    if (front < 0 || back < 0 || front >= kLargestPad || back >= kLargestPad)
      return Status::Invalid("pad: expected 0 to 2**31 - 1");
    if (n < 1 || p.weight.size[2 + i] < 1) return Status::Invalid("x, weight: an axis is empty");
    if (i == 0 && !p.cache && p.upsample_first_frame_once) n -= p.upsample[0] - 1;
    const int64_t used = i == 0 ? std::min(cached, front) : 0;
    if ((i ? p.spatial_mode : p.time_mode) == PadMode::reflect && std::max(front - used, back) >= n + used)
      return Status::Invalid("pad: reflect needs pads smaller than the axis");
    if (std::max({n + used, p.out.size[2 + i], p.weight.size[2 + i]}) > kLargestAxis ||
        p.out.size[2 + i] * p.weight.size[2 + i] > kLargestAxis)
      return Status::Invalid("x, out: an axis is too long");
  }
  return Status::Ok();
}

// The timeline of source frames: the cache's where it is used, then those of x, all upsampled.
struct Timeline {
  int64_t cached, used_cache, frames;
  int upsample;
  bool once;  // the first frame of x is not repeated

  explicit Timeline(const ConvProblem& p)
      : cached(p.cache ? p.cache.size[2] * p.upsample[0] : 0),
        // A cache stands before x and replaces front padding frame by frame; only what it lacks is padded.
        used_cache(std::min(cached, p.pad[0])), upsample(p.upsample[0]),
        once(p.upsample_first_frame_once && !p.cache && p.x.size[2] > 0) {
    frames = p.x.size[2] * upsample;
    if (once) frames -= upsample - 1;
  }

  // Of x before upsampling, for the upsampled frame i.
  int64_t own_frame(int64_t i) const { return once ? (i + upsample - 1) / upsample : i / upsample; }
  FrameTap source(int64_t i) const {
    if (i < used_cache) return {(cached - used_cache + i) / upsample, true, 0};
    return {own_frame(i - used_cache), false, 0};
  }
};

// Which source frames an output frame sums, with which taps; taps of the same source frame become one term.
void plan_frames(const ConvProblem& p, const Timeline& time, ConvPlan* plan) {
  const int64_t length = time.used_cache + time.frames;
  plan->frame_begin.assign(1, 0);
  for (int64_t t = 0; t < plan->To; ++t) {
    const size_t begin = plan->frame_taps.size();
    std::vector<uint64_t> masks;
    for (int k = 0; k < plan->kt; ++k) {
      const int64_t at = t * p.stride[0] + int64_t(k) * p.dilation[0] - p.pad[0] + time.used_cache;
      const int64_t i = source_index(at, length, p.time_mode);
      if (i < 0) continue;
      const FrameTap tap = time.source(i);
      size_t j = begin;
      while (j < plan->frame_taps.size() &&
             (plan->frame_taps[j].frame != tap.frame || plan->frame_taps[j].from_cache != tap.from_cache))
        ++j;
      if (j == plan->frame_taps.size()) {
        plan->frame_taps.push_back(tap);
        masks.push_back(0);
      }
      masks[j - begin] |= uint64_t(1) << k;
    }
    for (size_t j = 0; j < masks.size(); ++j) {
      auto found = std::find(plan->variants.begin(), plan->variants.end(), masks[j]);
      plan->frame_taps[begin + j].variant = int(found - plan->variants.begin());
      if (found == plan->variants.end()) plan->variants.push_back(masks[j]);
    }
    plan->frame_begin.push_back(int64_t(plan->frame_taps.size()));
  }
}

// A residual of the output's own shape is read as it is; one of the shape before upsampling is upsampled like x.
Status plan_residual(const ConvProblem& p, const Timeline& time, ConvPlan* plan) {
  const Tensor& r = p.residual;
  auto divisor = [&](int axis, int64_t out, int up) { return r.size[axis] == out ? 1 : up; };
  const int dt = divisor(2, plan->To, p.upsample[0]), dh = divisor(3, plan->Ho, p.upsample[1]),
            dw = divisor(4, plan->Wo, p.upsample[2]);
  for (int64_t t = 0; t < plan->To; ++t) plan->residual_frame.push_back(dt > 1 ? time.own_frame(t) : t);
  for (int64_t h = 0; h < plan->Ho; ++h) plan->residual_row.push_back(int32_t(h / dh));
  for (int64_t w = 0; w < plan->Wo; ++w) plan->residual_col.push_back(int32_t(w / dw));
  if (r.size[0] != plan->batch || r.size[1] != plan->out_channels ||
      (plan->To && plan->residual_frame.back() + 1 != r.size[2]) ||
      (plan->Ho && plan->residual_row.back() + 1 != r.size[3]) ||
      (plan->Wo && plan->residual_col.back() + 1 != r.size[4]))
    return Status::Invalid("residual: must have the output's shape, before or after upsampling");
  return Status::Ok();
}

}  // namespace

Status make_plan(const ConvProblem& p, int threads, ConvPlan* plan) {
  if (p.x.rank != 5 || p.weight.rank != 5 || p.out.rank != 5 || (p.cache && p.cache.rank != 5) ||
      (p.residual && p.residual.rank != 5))
    return Status::Invalid("x, weight, out, cache and residual must have 5 dimensions");
  VTOK_RETURN_IF_ERROR(check_options(p));
  plan->threads = std::clamp(threads, 1, 1024);
  plan->batch = p.x.size[0];
  plan->channels = p.x.size[1];
  plan->T = p.x.size[2];
  plan->H = p.x.size[3];
  plan->W = p.x.size[4];
  plan->out_channels = p.weight.size[0];
  plan->kt = int(p.weight.size[2]);
  plan->kh = int(p.weight.size[3]);
  plan->kw = int(p.weight.size[4]);
  if (plan->kt > 64)
    return Status::Unsupported("weight: at most 64 temporal taps, got " + std::to_string(plan->kt));
  if (p.groups < 1 || plan->out_channels % p.groups || p.weight.size[1] * p.groups != plan->channels)
    return Status::Invalid("weight: expected (O, " + std::to_string(plan->channels) +
                           " / groups, kt, kh, kw)");

  const Timeline time(p);
  plan->To = out_size(time.frames, p.pad[0] + p.pad[1], plan->kt, p.dilation[0], p.stride[0]);
  plan->Ho = out_size(plan->H * p.upsample[1], p.pad[2] + p.pad[3], plan->kh, p.dilation[1], p.stride[1]);
  plan->Wo = out_size(plan->W * p.upsample[2], p.pad[4] + p.pad[5], plan->kw, p.dilation[2], p.stride[2]);
  const int64_t expected[5] = {plan->batch, plan->out_channels, plan->To, plan->Ho, plan->Wo};
  for (int i = 0; i < 5; ++i)
    if (p.out.size[i] != expected[i])
      return Status::Invalid("out: dimension " + std::to_string(i) + " must be " +
                             std::to_string(expected[i]) + ", got " + std::to_string(p.out.size[i]));

  plan_frames(p, time, plan);
  plan->rows = tap_table(plan->Ho, plan->kh, p.stride[1], p.dilation[1], p.pad[2], plan->H, p.upsample[1],
                         p.spatial_mode);
  plan->cols = tap_table(plan->Wo, plan->kw, p.stride[2], p.dilation[2], p.pad[4], plan->W, p.upsample[2],
                         p.spatial_mode);
  return p.residual ? plan_residual(p, time, plan) : Status::Ok();
}

int64_t ConvPlan::macs() const {
  auto valid = [](const std::vector<int32_t>& table) {
    return std::count_if(table.begin(), table.end(), [](int32_t i) { return i >= 0; });
  };
  return batch * int64_t(frame_taps.size()) * valid(rows) * valid(cols) * channels * out_channels;
}

}  // namespace vtok::cpu
