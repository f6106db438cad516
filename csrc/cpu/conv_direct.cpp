// Turns a plan into the job of the direct convolution: which frames share their weights, which taps fold
// under upsampling.
#include <algorithm>
#include <map>
#include <numeric>

#include "cpu/simd/conv_direct.h"

namespace vtok::cpu {
namespace {

struct Axis {
  std::vector<int> taps, begin;
  std::vector<int32_t> source;
  std::vector<DirectAxis::Affine> affine;
  DirectAxis view;

  // `table` is the plan's [out][kernel] table of this axis.
  Axis(const std::vector<int32_t>& table, int64_t out, int kernel, int stride, int dilation, int64_t pad,
       int upsample, PadMode mode) {
    // Mirrored border taps of one upsampled pixel can read two sources, so reflect keeps all taps apart.
    const bool fold = upsample > 1 && mode != PadMode::reflect;
    const int phases = fold ? upsample / std::gcd(upsample, stride) : 1;
    auto floor_div = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
    begin.assign(phases * (kernel + 1), kernel);
    for (int phase = 0; phase < phases; ++phase) {
      int groups = 0;
      int64_t last = 0;
      for (int k = 0; k < kernel; ++k) {
        const int64_t source =
            fold ? floor_div(int64_t(phase) * stride + int64_t(k) * dilation - pad, upsample) : k;
        if (k == 0 || source != last) begin[phase * (kernel + 1) + groups++] = k;
        last = source;
      }
      taps.push_back(groups);
    }
    source.assign(out * kernel, -1);
    for (int64_t o = 0; o < out; ++o)
      for (int j = 0; j < taps[o % phases]; ++j)
        source[o * kernel + j] = table[o * kernel + begin[(o % phases) * (kernel + 1) + j]];
    view = {out, phases, kernel, taps.data(), begin.data(), source.data(), nullptr};
    for (int phase = 0; phase < phases; ++phase)
      for (int j = 0; j < kernel; ++j)
        affine.push_back(j < taps[phase] ? longest_affine(phase, j) : DirectAxis::Affine{0, 0, 0, 1});
    view.affine = affine.data();
  }
  Axis(const Axis&) = delete;

 private:
  DirectAxis::Affine longest_affine(int phase, int tap) const {
    const int64_t n = view.count(phase);
    auto at = [&](int64_t i) { return int64_t(source[(phase + i * view.phases) * view.max_taps + tap]); };
    DirectAxis::Affine best{0, 0, 0, 1};
    for (int64_t lo = 0; lo < n;) {
      int64_t hi = lo + 1;
      if (at(lo) >= 0) {
        const int64_t step = hi < n && at(hi) >= 0 ? at(hi) - at(lo) : 1;
        while (hi < n && at(hi) >= 0 && at(hi) - at(hi - 1) == step) ++hi;
        if (hi - lo > best.hi - best.lo) best = {lo, hi, at(lo), int(step)};
      }
      lo = hi;
    }
    return best;
  }
};

template <class T>
std::vector<T> slice(const std::vector<T>& all, int64_t begin, int64_t end) {
  return {all.begin() + begin, all.begin() + end};
}

void crop(Tensor& t, int axis, int64_t begin, int64_t end) {
  if (!t) return;
  t.data = static_cast<char*>(t.data) + begin * t.stride[axis] * element_size(t.dtype);
  t.size[axis] = end - begin;
}

}  // namespace

Status conv_direct(const ConvProblem& p, const ConvPlan& plan) {
  DirectJob job{};
  job.problem = &p;
  job.plan = &plan;
  job.channels = plan.channels / p.groups;
  job.out_channels = plan.out_channels / p.groups;

  // Slots in the order of the frames with the most terms, so that their terms are adjacent in the packed
  // weights.
  std::vector<int64_t> order(plan.To);
  std::iota(order.begin(), order.end(), 0);
  auto term_count = [&](int64_t t) { return plan.frame_begin[t + 1] - plan.frame_begin[t]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return term_count(a) > term_count(b); });
  std::vector<int> slot_of(plan.variants.size(), -1);
  std::vector<uint64_t> slot_mask;
  for (int64_t t : order)
    for (int64_t i = plan.frame_begin[t]; i < plan.frame_begin[t + 1]; ++i) {
      const int variant = plan.frame_taps[i].variant;
      if (slot_of[variant] >= 0) continue;
      slot_of[variant] = int(slot_mask.size());
      slot_mask.push_back(plan.variants[variant]);
    }
  job.slots = int(slot_mask.size());
  job.slot_mask = slot_mask.data();

  std::vector<DirectTerm> terms;
  std::map<std::vector<int>, std::vector<int32_t>> frames_of;
  for (int64_t t = 0; t < plan.To; ++t) {
    std::vector<int> slots;
    for (int64_t i = plan.frame_begin[t]; i < plan.frame_begin[t + 1]; ++i) {
      const FrameTap& tap = plan.frame_taps[i];
      const Tensor& source = tap.from_cache ? p.cache : p.x;
      terms.push_back(
          {static_cast<const char*>(source.data) + tap.frame * source.stride[2] * element_size(source.dtype),
           source.stride, slot_of[tap.variant]});
      slots.push_back(slot_of[tap.variant]);
    }
    frames_of[slots].push_back(int32_t(t));
  }
  job.terms = terms.data();
  job.term_begin = plan.frame_begin.data();

  Axis row(plan.rows, plan.Ho, plan.kh, p.stride[1], p.dilation[1], p.pad[2], p.upsample[1], p.spatial_mode);
  Axis col(plan.cols, plan.Wo, plan.kw, p.stride[2], p.dilation[2], p.pad[4], p.upsample[2], p.spatial_mode);
  job.row = row.view;
  job.col = col.view;

  std::vector<DirectPattern> patterns;
  std::vector<DirectRegion> regions;
  for (auto& [slots, frames] : frames_of) {
    for (int i = 0; i < row.view.phases; ++i)
      for (int j = 0; j < col.view.phases; ++j)
        regions.push_back({int(patterns.size()), i, j,
                           plan.batch * int64_t(frames.size()) * row.view.count(i) * col.view.count(j)});
    patterns.push_back({frames.data(), int64_t(frames.size()), int(slots.size())});
  }
  job.patterns = patterns.data();
  job.regions = regions.data();
  job.region_count = int64_t(regions.size());
  if (!VTOK_DISPATCH(run_direct(job)))
    return Status::OutOfMemory("causal_conv3d: not enough memory for the packed weights");
  return Status::Ok();
}

Status conv_direct(const ConvProblem& p, const ConvPlan& plan, const OutputBox& box) {
  ConvProblem part = p;
  for (Tensor* t : {&part.x, &part.cache, &part.residual, &part.out}) crop(*t, 0, box.batch, box.batch + 1);
  for (int axis = 0; axis < 3; ++axis) {
    crop(part.out, 2 + axis, box.begin[axis], box.end[axis]);
    part.pad[2 * axis] -= box.begin[axis] * p.stride[axis];
  }
  ConvPlan cropped = plan;
  cropped.batch = 1;
  cropped.To = box.end[0] - box.begin[0];
  cropped.Ho = box.end[1] - box.begin[1];
  cropped.Wo = box.end[2] - box.begin[2];
  const int64_t first_tap = plan.frame_begin[box.begin[0]];
  cropped.frame_begin = slice(plan.frame_begin, box.begin[0], box.end[0] + 1);
  for (int64_t& begin : cropped.frame_begin) begin -= first_tap;
  cropped.frame_taps = slice(plan.frame_taps, first_tap, plan.frame_begin[box.end[0]]);
  cropped.rows = slice(plan.rows, box.begin[1] * plan.kh, box.end[1] * plan.kh);
  cropped.cols = slice(plan.cols, box.begin[2] * plan.kw, box.end[2] * plan.kw);
  if (p.residual) {
    cropped.residual_frame = slice(plan.residual_frame, box.begin[0], box.end[0]);
    cropped.residual_row = slice(plan.residual_row, box.begin[1], box.end[1]);
    cropped.residual_col = slice(plan.residual_col, box.begin[2], box.end[2]);
  }
  return conv_direct(part, cropped);
}

}  // namespace vtok::cpu
