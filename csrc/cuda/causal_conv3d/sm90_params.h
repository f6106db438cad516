// What the sm90 convolution's plan hands to its kernel (sm90_kernel.cuh). The plan:
// sm90_plan.cu.
#pragma once
#include "cuda/causal_conv3d/epilogue.cuh"
#include "cuda/tensor_map.cuh"

namespace vtok::cuda {

constexpr int kSm90Threads = 384;  // a warpgroup of producers and two that multiply
// 64 channels, or 128 of e4m3: a row of a patch and of the weights, and the width of the swizzle
constexpr int kSlabBytes = 128;
constexpr int kMostPatchStages = 8, kMostWeightStages = 8;
constexpr int kSm90BarrierBytes = 16 * (kMostPatchStages + kMostWeightStages) + 16;

// Axes are time, height, width.
struct Sm90Params {
  Source source;  // of the time axis everything is used, of the others stride, pad and out
  Epilogue epilogue;
  const void* bias;  // in the type of the output, or null
  // Of e4m3 operands: a power of two for x, and one for each output. Values are those times these.
  const float *x_scale, *weight_scale;
  float* partial;  // [splits][positions][partial_stride], where splits > 1
  int partial_stride, outputs;
  int tile[3], tiles[3];  // output positions of a tile, at most M; tiles along each axis
  int tiles_m, tiles_n, splits, cluster;
  int units;        // [split][tiles_m / cluster][tiles_n]: what a cluster works off one after another
  int taps[3];      // that a patch serves: the kernel; 1 in time where a patch is one frame
  int row_step[3];  // rows of the patch from one tap to the next
  int patch_width, patch_frames, frame_rows;  // frame_rows: of a frame in a patch, a multiple of 8
  int frame_bytes_loaded, patch_bytes, patch_stages, weight_stages;
  int slabs, slab_channels, last_steps;  // slices of channels, and steps of 32 bytes in the last of them
};

struct Sm90Maps {  // channels first, then width, height, time, batch; the weights: channels, taps, outputs
  TensorMap x, cache, weight, out, residual;
};

// Whether the registers suffice for two groups of products under way: the sums of 256 x 160 take 160 of 224, the
// fragments 32.
#ifdef VTOK_SM90_DRAINED  // to measure what it is worth: scripts/gpu_check.sh
constexpr bool sm90_pipelined(int, int) { return false; }
#else
constexpr bool sm90_pipelined(int m, int n) { return m != 256 || n < 160; }
#endif
constexpr int kFewestWeightStages = 2;  // one is given up while the next is multiplied

// A tile of M x N: the kernel, and what the plan must know of it.
struct Sm90Variant {
  int m, n;
  int piece;  // channels of a row in a box of the output
  void (*kernel)(Sm90Maps, Sm90Params);
};

struct Sm90Variants {
  const Sm90Variant* begin;
  int count;
};
Sm90Variants sm90_variants_bf16();
Sm90Variants sm90_variants_f16();
Sm90Variants sm90_variants_e4m3_bf16();  // of operands and of the output
Sm90Variants sm90_variants_e4m3_f16();

inline int sm90_shared_bytes(const Sm90Variant& v, int patch_bytes, int patch_stages, int weight_stages) {
  return 1024 + patch_bytes * patch_stages + v.n * kSlabBytes * weight_stages + v.m * v.n * 2 +
         kSm90BarrierBytes;
}

}  // namespace vtok::cuda
