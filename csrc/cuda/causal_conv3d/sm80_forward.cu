// The convolution on every GPU from sm_80 on, for forward and dgrad: the tiles, the choice among them, and the
// launch. The kernel: sm80_kernel.cuh.
//
// Launches: the weights into the kernel's order (O * taps * C elements read and written), the products, and
// where K is split the sum of the splits. Half precision, as ptxas counts them for sm_80; a 3x3x3 kernel adds
// tables of 60 bytes a row:
//   tile      threads  registers  ring + tables  blocks per multiprocessor of an A100  bytes to shared memory
//   per multiply-add 256x128   256      212        96 + 15 KiB    1
//   0.023 256x96    256      182        88 + 15 KiB    1                                      0.029
//   128x128   128      210        64 + 7.5 KiB   2                                      0.031
//   128x64    128      147        48 + 7.5 KiB   2                                      0.047
//   128x32    128      112        40 + 7.5 KiB   3                                      0.078
#include <algorithm>
#include <string>

#include "cuda/causal_conv3d/sm80_kernel.cuh"
#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {
namespace {

// ---- the tiles --------------------------------------------------------------------------------------------

struct Variant {
  int m, n, threads, slice, blocks_per_multiprocessor;
  // of the matrix units, relative to the largest tile: a guess by operand traffic, until measured
  float efficiency;
  int (*shared_bytes)(const int (&kernel)[3]);
  void (*kernel)(ConvParams);
};

template <class Tile>
constexpr Variant variant(float efficiency) {
  return {Tile::kM,      Tile::kN,   Tile::kThreads,     Tile::kSlice,
          Tile::kBlocks, efficiency, Tile::shared_bytes, conv_kernel<Tile>};
}

template <class T, bool Tf32 = false>
using Mma = MatrixUnit<T, Tf32>;

// Warps of 64x64 ask shared memory for half of what warps of 32x32 ask for per product, at 128 accumulators a
// thread.
template <class T>
const Variant kHalfTiles[] = {
    variant<ConvTile<Mma<T>, 256, 128, 64, 64, 4, false, 1>>(1.00f),
    variant<ConvTile<Mma<T>, 256, 96, 64, 48, 4, false, 1>>(0.95f),
    variant<ConvTile<Mma<T>, 128, 128, 64, 64, 4, false, 2>>(0.95f),
    variant<ConvTile<Mma<T>, 128, 64, 64, 32, 4, false, 3>>(0.75f),
    variant<ConvTile<Mma<T>, 128, 32, 32, 32, 4, false, 4>>(0.50f),
};
template <class T>
const Variant kHalfGather[] = {variant<ConvTile<Mma<T>, 128, 64, 64, 32, 3, true, 3>>(0.5f)};

template <class Math, bool Gather>
const Variant kSingleTiles[] = {variant<ConvTile<Math, 128, 64, 64, 32, 3, Gather, 2>>(1.0f)};

struct Variants {
  const Variant* begin;
  int count;
};

template <class T>
Variants half_tiles(bool chunks) {
  if (chunks) return {kHalfTiles<T>, int(std::size(kHalfTiles<T>))};
  return {kHalfGather<T>, 1};
}

Variants tiles_for(DType dtype, bool chunks, bool tf32) {
  if (dtype == DType::f16) return half_tiles<__half>(chunks);
  if (dtype == DType::bf16) return half_tiles<__nv_bfloat16>(chunks);
  if (tf32) return {chunks ? kSingleTiles<Mma<float, true>, false> : kSingleTiles<Mma<float, true>, true>, 1};
  return {chunks ? kSingleTiles<MultiplyAdd, false> : kSingleTiles<MultiplyAdd, true>, 1};
}

// ---- the choice -------------------------------------------------------------------------------------------

struct Chosen {
  const Variant* tile = nullptr;
  int splits = 1;
};

// The cheapest tile and number of K splits under a simple model, in cycles: the multiprocessor with the most
// blocks works them off one after another at the speed of its matrix unit; a split writes and reads float32
// sums. A model, not a measurement.
Chosen choose(const Variants& variants, const ConvTask& task, int groups, Sm80Choice wish,
              const Device& device) {
  constexpr double kProductsPerCycle = 1024, kBlockCycles = 3000, kReduceCycles = 6000, kBytesPerCycle = 12;
  Chosen best;
  double best_cost = 0;
  for (int i = 0; i < variants.count; ++i) {
    const Variant& v = variants.begin[i];
    if ((wish.tile_m && wish.tile_m != v.m) || (wish.tile_n && wish.tile_n != v.n)) continue;
    if (v.shared_bytes(task.source.kernel) > device.shared_limit) continue;
    const double blocks =
        double(divide_up(task.source.positions, v.m)) * divide_up(task.weight.outputs, v.n) * groups;
    const int slices = task.source.time_taps * task.weight.k_frame / v.slice;
    const double slice_cycles = double(v.m) * v.n * v.slice / kProductsPerCycle / v.efficiency;
    for (int splits : {1, 2, 3, 4, 6, 8, 12, 16}) {
      if (wish.splits) splits = groups > 1 ? 1 : std::min(wish.splits, slices);
      if (splits > 1 && (groups > 1 || splits > slices)) break;
      const double waves = std::max(1.0, double(divide_up(int64_t(blocks * splits), device.multiprocessors)));
      double cost = waves * (double(slices) / splits * slice_cycles + kBlockCycles);
      if (splits > 1)
        cost += kReduceCycles + 8.0 * splits * task.source.positions * task.weight.outputs /
                                    (kBytesPerCycle * device.multiprocessors);
      if (!best.tile || cost < best_cost) best = {&v, splits}, best_cost = cost;
      if (wish.splits) break;
    }
  }
  return best;
}

template <class T>
Status reduce_splits(const ConvParams& params, int splits, cudaStream_t stream) {
  const int64_t blocks = divide_up(params.source.positions * (params.partial_stride / 8), 256);
  return VTOK_LAUNCH(reduce_splits_kernel<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, params, splits);
}

// ---- the launch -------------------------------------------------------------------------------------------

Status run_task(ConvTask& task, Sm80Choice choice, Workspace& workspace, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  RelaidWeight& weight = task.weight;
  Source& source = task.source;
  const int bytes = element_size(task.dtype), slice = kRowBytes / bytes;
  const int taps = source.kernel[1] * source.kernel[2];
  weight.k_frame = int(divide_up(int64_t(taps) * weight.channels, slice) * slice);

  Device device;
  VTOK_RETURN_IF_ERROR(current_device(device));
  const Chosen chosen =
      choose(tiles_for(task.dtype, task.chunks, task.tf32), task, weight.groups, choice, device);
  if (!chosen.tile)
    return Status::Unsupported("weight: no tile for a kernel of " + std::to_string(source.kernel[0]) + "x" +
                               std::to_string(source.kernel[1]) + "x" + std::to_string(source.kernel[2]) +
                               " in the shared memory of this GPU");
  const Variant& tile = *chosen.tile;

  ConvParams p = {};
  p.source = source;
  p.epilogue = task.epilogue;
  p.channels = weight.channels;
  p.outputs = weight.outputs;
  p.k_frame = weight.k_frame;
  p.weight_row_bytes = int64_t(source.time_taps) * weight.k_frame * bytes;
  p.tiles_n = int(divide_up(weight.outputs, tile.n));
  p.partial_stride = int(divide_up(weight.outputs, 8) * 8);
  char* relaid = workspace.take(int64_t(weight.groups) * weight.outputs * p.weight_row_bytes);
  float* bias = workspace.take<float>(weight.groups * weight.outputs);
  if (chosen.splits > 1)
    p.partial = workspace.take<float>(chosen.splits * source.positions * p.partial_stride);
  if (workspace.only_counts() || source.positions == 0) return Status::Ok();

  const int64_t blocks = divide_up(source.positions, tile.m) * p.tiles_n;
  if (blocks >= (int64_t(1) << 31) || weight.groups > 65535)
    return Status::Unsupported("x: more tiles or groups than a grid holds");
  const int64_t last_plane = (source.length[1] / source.upsample[1] - 1) * source.row_units +
                             (source.length[2] / source.upsample[2] - 1) * source.col_units;
  if (last_plane >= kNothing) return Status::Unsupported("x: a frame is too large");
  p.weight = relaid;
  p.bias = weight.bias ? bias : nullptr;
  VTOK_RETURN_IF_ERROR(relay_weight(weight, task.dtype, relaid, bias, stream_handle));
  const dim3 grid(unsigned(blocks), unsigned(chosen.splits), unsigned(weight.groups));
  VTOK_RETURN_IF_ERROR(
      VTOK_LAUNCH(tile.kernel, grid, dim3(tile.threads), tile.shared_bytes(source.kernel), stream, p));
  if (chosen.splits == 1) return Status::Ok();
  if (task.dtype == DType::f16) return reduce_splits<__half>(p, chosen.splits, stream);
  if (task.dtype == DType::bf16) return reduce_splits<__nv_bfloat16>(p, chosen.splits, stream);
  return reduce_splits<float>(p, chosen.splits, stream);
}

}  // namespace

Status causal_conv3d_sm80(const ConvProblem& problem, Sm80Choice choice, void* workspace,
                          int64_t* workspace_bytes, void* stream) {
  const RunTask run = [&](ConvTask& task, Workspace& from) { return run_task(task, choice, from, stream); };
  return run_forward(run, problem, workspace, workspace_bytes);
}

Status causal_conv3d_sm80_dgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                                const Tensor& grad_cache, Sm80Choice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream) {
  const RunTask run = [&](ConvTask& task, Workspace& from) { return run_task(task, choice, from, stream); };
  return run_dgrad(run, problem, grad, grad_x, grad_cache, workspace, workspace_bytes, stream);
}

}  // namespace vtok::cuda
