#include "cpu/norm_act.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

namespace vtok::cpu {
namespace {

// The first address in the buffer that starts a cache line: vectors that cross lines cost twice.
float* aligned(std::vector<float>& buffer) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}
constexpr int64_t kCachedBytes = 1 << 20;  // that two threads leave in their second-level caches
constexpr int64_t kSlack = 32;  // floats: for the alignment, and for reading a whole vector at the last value

// A thread's own scratch, kept between calls: a fresh one would cost page faults each time.
float* thread_scratch(int64_t floats) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats + kSlack) buffer.resize(floats + kSlack);
  return aligned(buffer);
}

float element(const Tensor& t, int64_t i) {
  const auto* bytes = static_cast<const char*>(t.data) + i * t.stride[0] * element_size(t.dtype);
  uint32_t bits = 0;
  float f;
  if (t.dtype == DType::f64) {
    double d;
    memcpy(&d, bytes, 8);
    return static_cast<float>(d);
  }
  if (t.dtype == DType::f32) {
    memcpy(&f, bytes, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, bytes, 2);
  if (t.dtype == DType::bf16) {
    bits = uint32_t(h) << 16;
    memcpy(&f, &bits, 4);
    return f;
  }
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  f = exponent == 31
          ? (fraction ? NAN : INFINITY)
          : std::ldexp(float(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
  return h & 0x8000 ? -f : f;
}

// Per-channel parameters in float32.
const float* channel_vector(const Tensor& t, int64_t channels, float absent, std::vector<float>& buffer) {
  buffer.resize(channels + kSlack);
  float* v = aligned(buffer);
  for (int64_t c = 0; c < channels; ++c) v[c] = t ? element(t, c) : absent;
  return v;
}

Status check(const NormProblem& p) {
  if (!is_float(p.x.dtype) || p.x.rank != 5)
    return Status::Invalid("x: expected float32, bfloat16 or float16 of rank 5");
  const int64_t channels = p.x.size[1];
  if (p.groups < 1 || channels % p.groups)
    return Status::Invalid("groups: " + std::to_string(p.groups) + " does not divide " +
                           std::to_string(channels) + " channels");
  for (auto [name, t] :
       {std::pair{"out", &p.out}, {"residual", &p.residual}, {"scale", &p.scale}, {"shift", &p.shift}}) {
    if (!*t && t != &p.out) continue;
    if (t->dtype != p.x.dtype || t->rank != 5 || !std::equal(t->size, t->size + 5, p.x.size))
      return Status::Invalid(std::string(name) + ": expected the type and sizes of x");
  }
  for (const Tensor* t : {&p.weight, &p.bias})
    if (*t && (t->rank != 1 || t->size[0] != channels || !(is_float(t->dtype) || t->dtype == DType::f64)))
      return Status::Invalid("weight, bias: expected one value per channel");
  auto frame_dense = [&](const Tensor& t) {  // rows of one frame and channel follow each other
    return (t.size[4] == 1 || t.stride[4] == 1) && (t.size[3] == 1 || t.stride[3] == t.size[4]);
  };
  auto frame_constant = [](const Tensor& t) {
    return (t.size[4] == 1 || t.stride[4] == 0) && (t.size[3] == 1 || t.stride[3] == 0);
  };
  for (const Tensor* t : {&p.x, &p.out, &p.residual, &p.scale, &p.shift}) {
    if (!*t) continue;
    const bool modulation = t == &p.scale || t == &p.shift;
    const bool fits = p.channels_last ? channels == 1 || t->stride[1] == 1
                                      : frame_dense(*t) || (modulation && frame_constant(*t));
    if (!fits) return Status::Unsupported("norm_act: these strides need a copy first");
  }
  return Status::Ok();
}

// Chan's rule for the moments of a union.
void merge(Moments& into, const Moments& from) {
  const double n = into.n + from.n, delta = from.mean - into.mean;
  if (n == 0) return;
  into.mean += delta * (from.n / n);
  into.m2 += from.m2 + delta * delta * (into.n * from.n / n);
  into.n = n;
}

// A frame becomes one long row where every tensor allows it, so that the kernels' runs of pixels are long.
void merge_rows(NormPlan& plan) {
  const std::pair<const void*, int64_t*> tensors[] = {{plan.x, plan.x_stride},
                                                      {plan.residual, plan.residual_stride},
                                                      {plan.out, plan.out_stride},
                                                      {plan.scale, plan.scale_stride},
                                                      {plan.shift, plan.shift_stride}};
  for (auto [data, stride] : tensors) {
    if (plan.width == 1) stride[4] = stride[3];
    if (data && plan.height > 1 && plan.width > 1 && stride[3] != plan.width * stride[4]) return;
  }
  plan.width *= plan.height;
  plan.height = 1;
}

// Everything of the plan but the parameters and the statistics.
NormPlan make_plan(const NormProblem& p) {
  NormPlan plan{};
  plan.dtype = p.x.dtype;
  // one of rank 0 is absent, whatever it points to
  auto pointer = [](const Tensor& t) { return t ? t.data : nullptr; };
  plan.x = p.x.data;
  plan.residual = pointer(p.residual);
  plan.out = p.out.data;
  plan.scale = pointer(p.scale);
  plan.shift = pointer(p.shift);
  plan.batch = p.x.size[0];
  plan.channels = p.x.size[1];
  plan.frames = p.x.size[2];
  plan.height = p.x.size[3];
  plan.width = p.x.size[4];
  for (int i = 0; i < 5; ++i) {
    plan.x_stride[i] = p.x.stride[i];
    plan.residual_stride[i] = p.residual.stride[i];
    plan.out_stride[i] = p.out.stride[i];
    plan.scale_stride[i] = p.scale.stride[i];
    plan.shift_stride[i] = p.shift.stride[i];
  }
  merge_rows(plan);
  plan.channels_last = p.channels_last;
  plan.centered = p.centered;
  plan.silu = p.silu;
  plan.per_frame = p.per_frame;
  plan.groups = p.groups;
  plan.eps = p.eps;
  // A task's float32 copy should stay in the second-level cache; planes want long runs of each channel.
  const int64_t area = plan.height * plan.width;
  if (p.channels_last) {
    plan.chunk = std::max<int64_t>(8192 / plan.channels, 1);
  } else {
    const int64_t together = p.over_positions ? 1 : plan.channels / p.groups;
    plan.chunk = std::clamp<int64_t>(65536 / together & ~int64_t(15), 64, 4096);
  }
  plan.chunk = std::min(area, plan.chunk);
  plan.chunks_per_frame = (area + plan.chunk - 1) / plan.chunk;
  return plan;
}

NormTask task_at(const NormPlan& plan, int64_t i) {
  const int64_t first = i % plan.chunks_per_frame * plan.chunk, frame = i / plan.chunks_per_frame;
  return {frame / plan.frames, frame % plan.frames, first,
          std::min(plan.chunk, plan.height * plan.width - first)};
}

// What normalizes the channels of one group, from its moments: x - mean, times gain, plus offset.
void normalizer_of_group(const NormPlan& plan, const Moments& all, int64_t group, float* mean, float* gain,
                         float* offset) {
  const int64_t size = plan.channels / plan.groups;
  const double rstd = 1 / std::sqrt(all.m2 / all.n + plan.eps);
  // x - high is exact near the mean; what float32 drops of the mean goes into the offset.
  const float high = static_cast<float>(all.mean);
  for (int64_t c = group * size; c < (group + 1) * size; ++c) {
    mean[c] = high;
    gain[c] = static_cast<float>(rstd * plan.weight[c]);
    offset[c] = static_cast<float>(plan.bias[c] - (all.mean - high) * rstd * plan.weight[c]);
  }
}

// Statistics over positions: of spans, which share them. Some spans at a time, so that the second pass finds in a
// cache what the first has read. It goes backwards: of a span that is larger than the cache, the end is what is
// still there.
void norm_spans(const NormProblem& p, NormPlan& plan, int64_t tasks, int64_t scratch) {
  const int64_t C = plan.channels, area = plan.height * plan.width;
  const int64_t spans = plan.batch * (p.per_frame ? plan.frames : 1), per_span = tasks / spans;
  const int64_t span_bytes =
      (p.per_frame ? 1 : plan.frames) * area * C * element_size(plan.dtype) * (p.residual ? 2 : 1);
  const int64_t together = std::max<int64_t>(kCachedBytes / span_bytes, 1);
  std::vector<Moments> partial(std::min(together, spans) * per_span * p.groups);
  std::vector<float> means(spans * C + kSlack), gains(means.size()), offsets(means.size());
  float *mean = aligned(means), *gain = aligned(gains), *offset = aligned(offsets);
  plan.mean = mean;
  plan.gain = gain;
  plan.offset = offset;
  for (int64_t begin = 0; begin < spans; begin += together) {
    const int64_t end = std::min(begin + together, spans), first = begin * per_span,
                  count = (end - begin) * per_span;
    parallel_for(count, p.threads, [&](int64_t i, int) {
      VTOK_DISPATCH(group_moments(plan, task_at(plan, first + i), partial.data() + i * p.groups,
                                  thread_scratch(scratch)));
    });
    for (int64_t span = begin; span < end; ++span)
      for (int64_t g = 0; g < p.groups; ++g) {
        Moments all{};
        for (int64_t i = 0; i < per_span; ++i)
          merge(all, partial[((span - begin) * per_span + i) * p.groups + g]);
        normalizer_of_group(plan, all, g, mean + span * C, gain + span * C, offset + span * C);
      }
    parallel_for(count, p.threads, [&](int64_t i, int) {
      VTOK_DISPATCH(group_apply(plan, task_at(plan, first + count - 1 - i)));
    });
  }
}

}  // namespace

Status norm_act(const NormProblem& p) {
  VTOK_RETURN_IF_ERROR(check(p));
  if (p.x.numel() == 0) return Status::Ok();
  NormPlan plan = make_plan(p);
  advise_huge_pages(p.out);
  std::vector<float> weights, biases;
  plan.weight = channel_vector(p.weight, plan.channels, 1, weights);
  plan.bias = channel_vector(p.bias, plan.channels, 0, biases);
  const int64_t tasks = plan.batch * plan.frames * plan.chunks_per_frame;
  const int64_t scratch = VTOK_DISPATCH(norm_scratch(plan));
  if (p.over_positions)
    norm_spans(p, plan, tasks, scratch);
  else
    parallel_for(tasks, p.threads, [&](int64_t i, int) {
      VTOK_DISPATCH(norm_positions(plan, task_at(plan, i), thread_scratch(scratch)));
    });
  return Status::Ok();
}

}  // namespace vtok::cpu
