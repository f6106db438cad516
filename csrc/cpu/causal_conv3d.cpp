// The entry of the op on a CPU: the plan, and the choice of an algorithm by a small cost model.
#include "cpu/causal_conv3d.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/simd/conv_direct.h"
#include "cpu/conv_winograd.h"

namespace vtok::cpu {
namespace {

// All constants below are per thread, measured on one core of a Zen 5 server (CPU time, torch 2.13): only
// their ratios decide. The dot kernel of few output channels, against the main kernel: every vector of input
// that it reads serves so many sums.
double narrow_rate(double outputs) { return 0.13 + 0.065 * outputs; }

double flops(Isa isa) {
  switch (isa) {
    case Isa::avx512: return 225e9;
    case Isa::avx2: return 108e9;
    case Isa::wide: return 15e9;
    case Isa::portable: return 41e9;
  }
  return 1;
}

int lanes(Isa isa) {
  if (isa == Isa::portable) return 4;
  return isa == Isa::avx2 ? 8 : 16;
}

Isa best_isa() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  return isa_supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

bool fast_bf16() {
#if VTOK_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Taps per output index after neighboring taps that read the same source are summed; summed over the axis.
int64_t folded_taps(const std::vector<int32_t>& table, int64_t out, int kernel, int upsample, PadMode mode) {
  if (upsample == 1 || mode == PadMode::reflect) return out * kernel;
  int64_t count = 0;
  for (int64_t o = 0; o < out; ++o)
    for (int k = 0; k < kernel; ++k) count += k == 0 || table[o * kernel + k] != table[o * kernel + k - 1];
  return count;
}

double direct_seconds(const ConvProblem& p, const ConvPlan& plan) {
  const Isa isa = active_isa();
  const double channels = double(plan.channels) / p.groups, outputs = double(plan.out_channels) / p.groups;
  const double taps = double(plan.batch) * plan.frame_taps.size() *
                      folded_taps(plan.rows, plan.Ho, plan.kh, p.upsample[1], p.spatial_mode) *
                      folded_taps(plan.cols, plan.Wo, plan.kw, p.upsample[2], p.spatial_mode);
  const bool narrow = outputs <= lanes(isa) / 2;
  const double columns =
      narrow ? outputs / narrow_rate(outputs) : (int64_t(outputs) + lanes(isa) - 1) / lanes(isa) * lanes(isa);
  // Neighboring columns of few channels are gathered as one run.
  const double runs = p.groups == 1 && channels < lanes(isa) ? taps / plan.kw : taps;
  const bool in_place =
      narrow && p.x.dtype == DType::f32 && p.x.stride[1] == 1 && int64_t(channels) % lanes(isa) == 0;
  const double gather = in_place ? 0 : p.groups * (runs * 4e-9 + taps * channels * 0.085e-9);
  const double pack =
      double(plan.variants.size()) * plan.kh * plan.kw * channels * plan.out_channels * 0.5e-9;
  const double moved = 0.05e-9 * element_size(p.x.dtype) * (p.x.numel() + p.out.numel());
  return 10e-6 +
         (2 * taps * channels * columns * p.groups / flops(isa) + gather + pack + moved) / plan.threads;
}

// ATen's float32 convolution on channels-last video, as a share of the rate that the direct kernel's estimate
// assumes. Only its ratio to that estimate decides; benchmarks/LOG.md has how it was found.
double aten_share(const ConvProblem& p, const ConvPlan& plan) {
  const double narrow = double(std::min(plan.channels, plan.out_channels));
  if (plan.kh * plan.kw > 1) {
    const double small = narrow < 64 ? std::max(narrow, 4.0) / 64 : 1;
    return (p.stride[1] * p.stride[2] > 1 ? 0.8 : 0.95) * small * std::min(1.0, 2 * small);
  }
  if (narrow < 16) return 0.25;
  if (plan.threads == 1) return 0.12;  // another of ATen's paths, with a relayout
  if (plan.kt > 1) return 0.3;
  // Pointwise, no product is left that the direct kernel's gather could overlap with: ATen is faster than the
  // estimate, which assumes it does.
  return narrow < 64 ? 0.2 : 1.2;
}

// ATen multiplies the zeros of the padding and every repeated tap. Its oneDNN takes the best instruction set
// there is.
double aten_seconds(const ConvProblem& p, const ConvPlan& plan) {
  const bool grouped = p.groups > 1;
  const double channels = grouped ? double(plan.channels) / p.groups : double((plan.channels + 7) / 8 * 8);
  const double outputs = grouped ? double(plan.out_channels) : double((plan.out_channels + 15) / 16 * 16);
  const double macs =
      double(plan.batch) * plan.To * plan.Ho * plan.Wo * plan.kt * plan.kh * plan.kw * channels * outputs;
  double rate = aten_share(p, plan);
  if (p.x.dtype == DType::bf16 && fast_bf16())
    rate = 2.1;
  else if (p.x.dtype != DType::f32)
    rate = 0.01;  // ATen's own loops
  const double group_channels = double(std::min(plan.channels, plan.out_channels)) / p.groups;
  if (grouped && group_channels < 16) rate *= group_channels < 2 ? 0.25 : group_channels / 26;
  // Padding in front or unevenly is a copy of the input.
  const bool copied = p.pad[0] != 0 || p.pad[1] != 0 || p.pad[2] != p.pad[3] || p.pad[4] != p.pad[5] ||
                      p.spatial_mode != PadMode::zeros || p.upsample[0] * p.upsample[1] * p.upsample[2] > 1;
  const double moved = 0.03e-9 * element_size(p.x.dtype) * (p.x.numel() * (copied ? 3 : 1) + p.out.numel());
  return 10e-6 + (2 * macs / (rate * flops(best_isa())) + moved) / plan.threads;
}

struct Choice {
  Algorithm algorithm;
  double seconds;
};

Choice native_choice(const ConvProblem& p, const ConvPlan& plan) {
  Choice best{Algorithm::direct, direct_seconds(p, plan)};
  for (Algorithm algorithm : {Algorithm::winograd2, Algorithm::winograd4}) {
    const int m = static_cast<int>(algorithm);
    if (!winograd_can_run(p, plan, m)) continue;
    const double seconds = winograd_seconds(p, plan, m);
    if (seconds < best.seconds) best = {algorithm, seconds};
  }
  return best;
}

Status check_tensors(const ConvProblem& p) {
  if (!is_float(p.x.dtype)) return Status::Unsupported("x: float32, float16 or bfloat16 expected");
  for (auto [tensor, name] :
       {std::pair{&p.weight, "weight"}, {&p.cache, "cache"}, {&p.residual, "residual"}, {&p.out, "out"}})
    if (*tensor && tensor->dtype != p.x.dtype)
      return Status::Invalid(std::string(name) + ": must have the dtype of x");
  for (auto [tensor, name] : {std::pair{&p.residual, "residual"}, {&p.out, "out"}})
    if (*tensor && tensor->size[1] > 1 && tensor->stride[1] != 1)
      return Status::Invalid(std::string(name) + ": the channels of a pixel must be adjacent, got stride " +
                             std::to_string(tensor->stride[1]));
  if (p.bias && (p.bias.rank != 1 || p.bias.size[0] != p.weight.size[0] ||
                 (p.bias.size[0] > 1 && p.bias.stride[0] != 1) ||
                 (p.bias.dtype != p.x.dtype && p.bias.dtype != DType::f32)))
    return Status::Invalid("bias: expected contiguous (O), float32 or the type of x");
  for (int i : {0, 1, 3, 4})
    if (p.cache && p.cache.size[i] != p.x.size[i])
      return Status::Invalid("cache: must have the shape of x except for its frames");
  return Status::Ok();
}

}  // namespace

Status causal_conv3d(const ConvProblem& p, Algorithm wanted, int threads) {
  if (wanted != Algorithm::automatic && wanted != Algorithm::direct && wanted != Algorithm::winograd2 &&
      wanted != Algorithm::winograd4)
    return Status::Invalid("algorithm: expected 0, 1, 2 or 4, got " +
                           std::to_string(static_cast<int>(wanted)));
  VTOK_RETURN_IF_ERROR(check_tensors(p));
  ConvPlan plan;
  VTOK_RETURN_IF_ERROR(make_plan(p, threads, &plan));
  if (p.out.numel() == 0) return Status::Ok();
  advise_huge_pages(p.out);
  const Algorithm algorithm = wanted == Algorithm::automatic ? native_choice(p, plan).algorithm : wanted;
  const int m = static_cast<int>(algorithm);
  if (algorithm != Algorithm::direct && winograd_can_run(p, plan, m)) return conv_winograd(p, plan, m);
  return conv_direct(p, plan);
}

const char* causal_conv3d_choice(const ConvProblem& p, int threads) {
  ConvPlan plan;
  if (!make_plan(p, threads, &plan).ok() || p.out.numel() == 0) return "direct";
  const Choice native = native_choice(p, plan);
  if (aten_seconds(p, plan) * 1.07 < native.seconds) return "reference";
  switch (native.algorithm) {
    case Algorithm::winograd4: return "winograd4";
    case Algorithm::winograd2: return "winograd2";
    default: return "direct";
  }
}

}  // namespace vtok::cpu
