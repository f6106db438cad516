// fsq on CUDA GPUs from compute capability 8.0. Launchers only: they check and enqueue, never allocate, copy
// or synchronize.
#pragma once
#include <cstdint>
#include <vector>

#include "status.h"
#include "tensor.h"

namespace vtok::cuda {

// The tables of a call travel in its kernel's parameters, which bounds them.
constexpr int kFsqChannels = 31, kFsqThresholds = 768;

// z and codes (rank at most 6, channels at `dim`), indices int32 (z's sizes without `dim`), all with any
// strides. thresholds, in the host's memory: float32 (channels, most levels - 1), contiguous. A NaN in z
// gives the code NaN and the index -1.
Status fsq_quantize(const Tensor& z, const Tensor& codes, const Tensor& indices, const Tensor& thresholds,
                    const std::vector<int64_t>& levels, int dim, void* stream);

// The inverse. indices int32 or int64; one outside of the codebook gives codes NaN.
Status fsq_decode(const Tensor& indices, const Tensor& codes, const std::vector<int64_t>& levels, int dim,
                  void* stream);

// grad_z = grad * (1 - tanh(z + shift)^2) * slope, with a shift and a slope per channel; all three in z's
// dtype and sizes.
Status fsq_backward(const Tensor& grad, const Tensor& z, const Tensor& grad_z,
                    const std::vector<float>& shifts, const std::vector<float>& slopes, int dim,
                    void* stream);

}  // namespace vtok::cuda
