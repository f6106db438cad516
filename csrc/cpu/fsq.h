// fsq on a CPU: a level is the number of thresholds that a value has reached; codes and indices come from
// these integers.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "status.h"
#include "tensor.h"

namespace vtok::cpu {

// z and codes (any rank, channels at `dim`), indices int32 (z's sizes without `dim`), all with any strides.
// thresholds: float32 (channels, most levels - 1), contiguous, NaN after the last of a channel. A NaN in z
// gives the code NaN and the index -1.
Status fsq_quantize(const Tensor& z, const Tensor& codes, const Tensor& indices, const Tensor& thresholds,
                    const std::vector<int64_t>& levels, int dim, int threads);

// A run of positions with constant steps. What the kernels see.
struct FsqRun {
  DType dtype;
  const void* z;
  void* codes;
  int32_t* indices;
  int64_t positions, channels;
  int64_t z_step, z_channel, codes_step, codes_channel, indices_step;
  bool stream;  // the result is too large for the caches: write past them
};

struct FsqLevels {
  const float* thresholds;  // (channels, pitch)
  int64_t pitch;
  const int64_t* levels;
  const int32_t* basis;      // what one level of a channel adds to the index
  const float* interleaved;  // the thresholds, halves and bases lane by lane, see fsq_interleave; or null
};

}  // namespace vtok::cpu

VTOK_DECLARE(int64_t fsq_interleaved_size(int64_t channels, int64_t pitch))
VTOK_DECLARE(void fsq_interleave(const FsqLevels& levels, int64_t channels, float* to))
VTOK_DECLARE(void fsq_run(const FsqRun& run, const FsqLevels& levels))
