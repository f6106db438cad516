// Operands of e4m3 for the sm90 convolution: sm90_e4m3.cu.
#pragma once
#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {

// x and the cache (or none) as they are, (B, C, T, H, W), and where they go, channels-last without gaps.
struct NarrowInputs {
  Tensor x, cache;
  void *x_to, *cache_to;
  const float* x_scale;
};

// A tensor of the same shape in e4m3, channels-last without gaps, at no address yet.
Tensor as_e4m3(const Tensor& t);

// One launch for x, one for the cache.
Status narrow_inputs(const NarrowInputs& inputs, void* stream);

// Weights as [outputs][taps][channels], divided by scale[output].
Status narrow_weight(const RelaidWeight& w, DType dtype, void* to, float* scale, void* stream);

}  // namespace vtok::cuda
