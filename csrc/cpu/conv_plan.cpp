#include <algorithm>
#include <string>

#include "cpu/conv_problem.h"

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
  if (p.activation != Activation::none && p.activation != Activation::silu)
    return Status::Invalid("activation: not one");
  if (p.algorithm != Algorithm::automatic && p.algorithm != Algorithm::direct &&
      p.algorithm != Algorithm::winograd2 && p.algorithm != Algorithm::winograd4)
    return Status::Invalid("algorithm: not one");
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

}  // namespace

Status make_plan(const ConvProblem& p, ConvPlan* plan) {
  if (p.x.rank != 5 || p.weight.rank != 5 || p.out.rank != 5 || (p.cache && p.cache.rank != 5) ||
      (p.residual && p.residual.rank != 5))
    return Status::Invalid("x, weight, out, cache and residual must have 5 dimensions");
  VTOK_RETURN_IF_ERROR(check_options(p));
  plan->batch = p.x.size[0], plan->channels = p.x.size[1];
  plan->T = p.x.size[2], plan->H = p.x.size[3], plan->W = p.x.size[4];
  plan->out_channels = p.weight.size[0];
  plan->kt = int(p.weight.size[2]), plan->kh = int(p.weight.size[3]), plan->kw = int(p.weight.size[4]);
  if (plan->kt > 64)
    return Status::Unsupported("weight: at most 64 temporal taps, got " + std::to_string(plan->kt));
  if (p.groups < 1 || plan->out_channels % p.groups || p.weight.size[1] * p.groups != plan->channels)
    return Status::Invalid("weight: expected (O, " + std::to_string(plan->channels) +
                           " / groups, kt, kh, kw)");

  const int ut = p.upsample[0];
  const int64_t cached = p.cache ? p.cache.size[2] * ut : 0;
  const bool once = p.upsample_first_frame_once && !p.cache && plan->T > 0;
  const int64_t frames = once ? 1 + (plan->T - 1) * ut : plan->T * ut;  // upsampled frames of x
  // A cache stands before x and replaces front padding frame by frame; only what it lacks is padded.
  const int64_t used_cache = std::min(cached, p.pad[0]);
  const int64_t timeline = used_cache + frames;
  plan->To = out_size(frames, p.pad[0] + p.pad[1], plan->kt, p.dilation[0], p.stride[0]);
  plan->Ho = out_size(plan->H * p.upsample[1], p.pad[2] + p.pad[3], plan->kh, p.dilation[1], p.stride[1]);
  plan->Wo = out_size(plan->W * p.upsample[2], p.pad[4] + p.pad[5], plan->kw, p.dilation[2], p.stride[2]);
  const int64_t expected[5] = {plan->batch, plan->out_channels, plan->To, plan->Ho, plan->Wo};
  for (int i = 0; i < 5; ++i)
    if (p.out.size[i] != expected[i])
      return Status::Invalid("out: dimension " + std::to_string(i) + " must be " +
                             std::to_string(expected[i]) + ", got " + std::to_string(p.out.size[i]));

  plan->frame_begin.assign(1, 0);
  for (int64_t t = 0; t < plan->To; ++t) {
    const size_t begin = plan->frame_taps.size();
    std::vector<uint64_t> masks;
    for (int k = 0; k < plan->kt; ++k) {
      int64_t i = source_index(t * p.stride[0] + int64_t(k) * p.dilation[0] - p.pad[0] + used_cache, timeline,
                               p.time_mode);
      if (i < 0) continue;
      const bool from_cache = i < used_cache;
      int64_t frame;
      if (from_cache) {
        frame = (cached - used_cache + i) / ut;
      } else {
        i -= used_cache;
        frame = once ? (i == 0 ? 0 : 1 + (i - 1) / ut) : i / ut;
      }
      size_t j = begin;
      while (j < plan->frame_taps.size() &&
             (plan->frame_taps[j].frame != frame || plan->frame_taps[j].from_cache != from_cache))
        ++j;
      if (j == plan->frame_taps.size()) {
        plan->frame_taps.push_back({frame, from_cache, 0});
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
  plan->rows = tap_table(plan->Ho, plan->kh, p.stride[1], p.dilation[1], p.pad[2], plan->H, p.upsample[1],
                         p.spatial_mode);
  plan->cols = tap_table(plan->Wo, plan->kw, p.stride[2], p.dilation[2], p.pad[4], plan->W, p.upsample[2],
                         p.spatial_mode);

  if (p.residual) {
    const Tensor& r = p.residual;
    // A residual of the output's own shape is read as it is; one of the shape before upsampling is upsampled
    // like x.
    auto divisor = [&](int axis, int64_t out, int up) { return r.size[axis] == out ? 1 : up; };
    const int dt = divisor(2, plan->To, ut), dh = divisor(3, plan->Ho, p.upsample[1]),
              dw = divisor(4, plan->Wo, p.upsample[2]);
    const bool once_residual = dt > 1 && once;
    for (int64_t t = 0; t < plan->To; ++t)
      plan->residual_frame.push_back(once_residual ? (t == 0 ? 0 : 1 + (t - 1) / dt) : t / dt);
    for (int64_t h = 0; h < plan->Ho; ++h) plan->residual_row.push_back(int32_t(h / dh));
    for (int64_t w = 0; w < plan->Wo; ++w) plan->residual_col.push_back(int32_t(w / dw));
    if (r.size[0] != plan->batch || r.size[1] != plan->out_channels ||
        (plan->To && plan->residual_frame.back() + 1 != r.size[2]) ||
        (plan->Ho && plan->residual_row.back() + 1 != r.size[3]) ||
        (plan->Wo && plan->residual_col.back() + 1 != r.size[4]))
      return Status::Invalid("residual: must have the output's shape, before or after upsampling");
  }
  return Status::Ok();
}

int64_t ConvPlan::macs() const {
  auto valid = [](const std::vector<int32_t>& table) {
    return std::count_if(table.begin(), table.end(), [](int32_t i) { return i >= 0; });
  };
  return batch * int64_t(frame_taps.size()) * valid(rows) * valid(cols) * channels * out_channels;
}

}  // namespace vtok::cpu
