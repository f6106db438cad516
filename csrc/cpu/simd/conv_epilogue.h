// What happens to a finished accumulator: + bias, activation, + residual (or the alpha blend), rounding to
// the output's type. In this order, for every algorithm.
#pragma once
#include "cpu/conv_plan.h"
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {

template <class E>
struct Epilogue {
  typedef typename E::type type;
  const float* bias;  // (O) float32, or null
  const type* residual;
  int64_t residual_stride[5];  // b, c, t, h, w; channel stride 1 where residual is given
  const int64_t* residual_frame;
  const int32_t *residual_row, *residual_col;
  type* out;
  int64_t out_stride[5];
  float alpha, beta;  // result = beta * value + alpha * residual
  bool silu;

  // `bias_f32` is the bias converted to float32 by the caller (or null). The plan must outlive this object.
  Epilogue(const ConvProblem& p, const ConvPlan& plan, const float* bias_f32)
      : bias(bias_f32), residual(static_cast<const type*>(p.residual.data)),
        residual_frame(plan.residual_frame.data()), residual_row(plan.residual_row.data()),
        residual_col(plan.residual_col.data()), out(static_cast<type*>(p.out.data)),
        alpha(p.has_alpha ? p.alpha : 1.0f), beta(p.has_alpha ? 1.0f - p.alpha : 1.0f), silu(p.silu) {
    if (!p.residual) residual = nullptr;
    for (int i = 0; i < 5; ++i) {
      residual_stride[i] = p.residual.stride[i];
      out_stride[i] = p.out.stride[i];
    }
  }

  VTOK_INLINE_MEMBER type* out_pixel(int64_t b, int64_t t, int64_t h, int64_t w) const {
    return out + b * out_stride[0] + t * out_stride[2] + h * out_stride[3] + w * out_stride[4];
  }
  VTOK_INLINE_MEMBER const type* residual_pixel(int64_t b, int64_t t, int64_t h, int64_t w) const {
    if (!residual) return nullptr;
    return residual + b * residual_stride[0] + residual_frame[t] * residual_stride[2] +
           residual_row[h] * residual_stride[3] + residual_col[w] * residual_stride[4];
  }

  // kLanes channels from c on, of the pixel whose channel 0 stands at out_at and residual_at; only n of them
  // where n < kLanes.
  VTOK_INLINE_MEMBER void finish(vfloat value, int64_t c, type* out_at, const type* residual_at,
                                 int n = kLanes) const {
    if (n == kLanes) {
      if (bias) value += VTOK_ISA::load(bias + c);
      if (silu) value = VTOK_ISA::silu(value);
      if (residual_at) value = value * beta + E::load(residual_at + c) * alpha;
      E::store(out_at + c, value);
    } else {
      if (bias) value += VTOK_ISA::load_n(bias + c, n);
      if (silu) value = VTOK_ISA::silu(value);
      if (residual_at) value = value * beta + VTOK_ISA::load_n<E>(residual_at + c, n) * alpha;
      VTOK_ISA::store_n<E>(out_at + c, value, n);
    }
  }
};

}  // namespace vtok::cpu::VTOK_ISA
