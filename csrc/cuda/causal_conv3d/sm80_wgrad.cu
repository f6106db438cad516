// causal_conv3d, gradient of the weights and the bias: dW[o, (dt, tap), c] = sum over positions m of grad[m,
// o] * x[source(m, dt, tap), c].
//
// A matrix product with K = positions, which are the slow axis of both operands: ldmatrix transposes on its
// way to the registers. A block computes kM output channels by kN columns (time tap, plane tap, channel) over
// its share of the positions; x is read through the forward kernel's tables of addresses, rebuilt every
// kBatch positions. The bias gradient is a product with a column of ones that exists in registers only.
// Shares are summed in a fixed order by a second kernel, which also rounds once: deterministic.
//
// Tile 128x128, 8 warps of 64x32, slices of 32 positions (16 in float32), 4 stages of 16 KiB, and 60 bytes of
// tables per position of a batch for 3x3x3: 72 KiB, two blocks per multiprocessor at 128 registers. Scratch:
// splits * O * taps * C float32.
#include <algorithm>
#include <string>

#include "cuda/causal_conv3d/sm80_math.cuh"
#include "cuda/causal_conv3d/plan.h"

namespace vtok::cuda {
namespace {

struct WgradParams {
  Source source;
  const char* grad;     // [positions][all outputs]
  float* partial;       // [splits][groups * outputs][columns]
  float* partial_bias;  // [splits][groups * outputs] or null
  int64_t grad_row_bytes;
  int channels, outputs, columns;  // of one group; columns = kt * kh * kw * channels
  int tiles_n;
};

template <class Math_, bool Gather>
struct WgradTile {
  using Math = Math_;
  using T = typename Math::Type;
  static constexpr int kM = 128, kN = 128, kWarpM = 64, kWarpN = 32, kStages = 4, kBatch = 128;
  static constexpr int kWarpsN = kN / kWarpN, kThreads = kM / kWarpM * kWarpsN * 32;
  static constexpr int kSlice = kRowBytes / sizeof(T), kStageBytes = (kM + kN) * kRowBytes;
  static constexpr bool kGather = Gather;
  using Table = SourceTable<kBatch>;
};

// Brings slices of positions to shared memory: columns of grad, then columns of x.
template <class Tile>
struct SliceLoader {
  using T = typename Tile::T;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  static_assert(Tile::kM == Tile::kN, "one thread serves the same columns of both");
  static constexpr int kPerChunk = 16 / sizeof(T), kWidth = Tile::kGather ? Tile::kM : Tile::kM / kPerChunk;
  static constexpr int kRows = Tile::kThreads / kWidth;  // rows of a slice per pass

  const WgradParams& p;
  const typename Tile::Table table;
  int column, row;  // in the tile; of the first element, and of the first pass
  int dt, tap;
  int64_t grad_offset, x_offset;  // bytes
  bool grad_exists, x_exists;

  __device__ SliceLoader(const WgradParams& p, typename Tile::Table table, int group, int m0, int n0)
      : p(p), table(table) {
    column = threadIdx.x % kWidth * (Tile::kGather ? 1 : kPerChunk);
    row = threadIdx.x / kWidth;
    grad_exists = m0 + column < p.outputs;
    x_exists = n0 + column < p.columns;
    grad_offset = (int64_t(group) * p.outputs + m0 + column) * int(sizeof(T));
    const int all_taps = (n0 + column) / p.channels, taps = p.source.kernel[1] * p.source.kernel[2];
    dt = x_exists ? all_taps / taps : 0;
    tap = x_exists ? all_taps % taps : 0;
    x_offset = int64_t((n0 + column) % p.channels) * p.source.channel_bytes;
  }

  // Slice number `slice`, whose first position is row `in_batch` of the table.
  __device__ void load(uint32_t stage, int64_t slice, int in_batch) const {
#pragma unroll(Tile::kGather ? 4 : Tile::kSlice / kRows)
    for (int r = row; r < Tile::kSlice; r += kRows) {
      const int64_t m = slice * Tile::kSlice + r;
      const uint64_t frame = ptx::ld_shared<uint64_t>(table.frame_at(dt, in_batch + r));
      const uint32_t plane = ptx::ld_shared<uint32_t>(table.plane_at(tap, in_batch + r));
      const bool has_grad = grad_exists && m < p.source.positions,
                 has_x = x_exists && frame && plane != kNothing;
      const char* grad = has_grad ? p.grad + m * p.grad_row_bytes + grad_offset : p.grad;
      const char* x =
          has_x ? reinterpret_cast<const char*>(frame + int64_t(plane) * p.source.unit_bytes + x_offset)
                : p.grad;
      const uint32_t to = stage + swizzled_column<Tile::kM, T>(r, column);
      if constexpr (Tile::kGather) {
        ptx::st_shared<Bits>(to, has_grad ? ptx::ld_global(reinterpret_cast<const Bits*>(grad)) : Bits(0));
        ptx::st_shared<Bits>(to + Tile::kM * kRowBytes,
                             has_x ? ptx::ld_global(reinterpret_cast<const Bits*>(x)) : Bits(0));
      } else {
        ptx::cp_async<16>(to, grad, has_grad);
        ptx::cp_async<16>(to + Tile::kM * kRowBytes, x, has_x);
      }
    }
  }
};

// Where a thread works: the corner of its warp in the tile and of the tile in the product, and its block's share
// of the positions, in slices.
template <class Tile>
struct WgradCorner {
  int lane, warp_m, warp_n, n0, m0, split, group;
  int strip;  // the row of accumulators whose bias gradient this warp sums; -1 for none
  int64_t begin, end;

  __device__ __forceinline__ explicit WgradCorner(const WgradParams& p)
      : lane(threadIdx.x % 32), warp_m(threadIdx.x / 32 / Tile::kWarpsN * Tile::kWarpM),
        warp_n(threadIdx.x / 32 % Tile::kWarpsN * Tile::kWarpN), n0(int(blockIdx.x % p.tiles_n) * Tile::kN),
        m0(int(blockIdx.x / p.tiles_n) * Tile::kM), split(blockIdx.y), group(blockIdx.z),
        // the warps of a row share its bias gradient
        strip(p.partial_bias && n0 == 0 ? int(threadIdx.x) / 32 % Tile::kWarpsN : -1) {
    static_assert(Tile::kWarpsN == Tile::kWarpM / 16);
    const int64_t slices = (p.source.positions + Tile::kSlice - 1) / Tile::kSlice;
    begin = slices * split / gridDim.y;
    end = slices * (split + 1) / gridDim.y;
  }
};

template <class Tile>
using WgradSums = float[Tile::kWarpM / 16][Tile::kWarpN / 8][4];
using BiasSums = float[1][1][4];

// The main loop over the block's slices, kStages - 1 of them on their way.
template <class Tile>
__device__ __forceinline__ void sum_slices(const WgradParams& p, const WgradCorner<Tile>& at,
                                           WgradSums<Tile>& acc, BiasSums& bias) {
  constexpr int kSlicesPerBatch = Tile::kBatch / Tile::kSlice;
  const uint32_t ring = ptx::smem_base(), after_ring = ring + Tile::kStages * Tile::kStageBytes;
  const typename Tile::Table table(after_ring, p.source);
  table.build(p.source, at.begin * Tile::kSlice, at.group);
  __syncthreads();
  const SliceLoader<Tile> loader(p, table, at.group, at.m0, at.n0);
  WgradSums<Tile> total = {};  // no registers where Math sums in one level
  BiasSums total_bias = {};
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (at.begin + s < at.end) loader.load(ring + s * Tile::kStageBytes, at.begin + s, s * Tile::kSlice);
    ptx::cp_async_commit();
  }
  uint32_t read = ring, write = ring + (Tile::kStages - 1) * Tile::kStageBytes;
  int in_batch = Tile::kStages - 1;  // the next slice to load, counted within its batch
  for (int64_t slice = at.begin; slice < at.end; ++slice) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const int64_t next = slice + Tile::kStages - 1;
    if (next < at.end) {
      if (in_batch == kSlicesPerBatch) {
        table.build(p.source, next * Tile::kSlice, at.group);
        __syncthreads();
        in_batch = 0;
      }
      loader.load(write, next, in_batch++ * Tile::kSlice);
    }
    ptx::cp_async_commit();
    Tile::Math::template multiply_transposed<Tile::kSlice, Tile::kM, Tile::kN>(
        acc, bias[0][0], at.strip, read, read + Tile::kM * kRowBytes, at.warp_m, at.warp_n, at.lane);
    if constexpr (Tile::Math::kTwoLevels)
      if ((slice - at.begin) % kSlicesPerBatch == kSlicesPerBatch - 1) {
        flush(total, acc);
        flush(total_bias, bias);
      }
    write = read;
    read = read + Tile::kStageBytes == after_ring ? ring : read + Tile::kStageBytes;
  }
  ptx::cp_async_wait<0>();
  if constexpr (Tile::Math::kTwoLevels) {
    flush(acc, total);
    flush(bias, total_bias);
  }
}

// The block's share of the sums as float32, for wgrad_reduce_kernel.
template <class Tile>
__device__ __forceinline__ void store_shares(const WgradParams& p, const WgradCorner<Tile>& at,
                                             WgradSums<Tile>& acc, BiasSums& bias) {
  const int64_t rows = int64_t(gridDim.z) * p.outputs;
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int o = at.m0 + at.warp_m + i * 16 + at.lane / 4 + h * 8;
      if (o >= p.outputs) continue;
      const int64_t row = at.split * rows + int64_t(at.group) * p.outputs + o;
      if (i == at.strip && at.lane % 4 == 0) ptx::st_global(p.partial_bias + row, bias[0][0][h * 2]);
      float* to = p.partial + row * p.columns;
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = at.n0 + at.warp_n + j * 8 + at.lane % 4 * 2 + e;
          if (n < p.columns) ptx::st_global(to + n, acc[i][j][h * 2 + e]);
        }
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, sizeof(typename Tile::T) == 2 ? 2 : 1)
    wgrad_kernel(const WgradParams p) {
  const WgradCorner<Tile> at(p);
  WgradSums<Tile> acc = {};
  BiasSums bias = {};
  sum_slices<Tile>(p, at, acc, bias);
  store_shares<Tile>(p, at, acc, bias);
}

struct WgradResult {
  void* weight;
  void* bias;  // or null
  int64_t stride_o, stride_c, stride_tap[3];
  int kernel[3];
};

// One thread per weight: sums the shares in order and rounds once. Column `columns` stands for the bias.
template <class T>
__global__ void __launch_bounds__(256)
    wgrad_reduce_kernel(const WgradParams p, const WgradResult r, int splits, int64_t rows) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column > p.columns || (column == p.columns && !p.partial_bias)) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    float sum = 0;
    if (column == p.columns) {
      for (int s = 0; s < splits; ++s) sum += ptx::ld_global(p.partial_bias + s * rows + row);
      ptx::st_global(static_cast<T*>(r.bias) + row, ptx::from_float<T>(sum));
      continue;
    }
    for (int s = 0; s < splits; ++s) sum += ptx::ld_global(p.partial + (s * rows + row) * p.columns + column);
    const int taps = column / p.channels, dw = taps % r.kernel[2], dh = taps / r.kernel[2] % r.kernel[1];
    const int dt = taps / (r.kernel[2] * r.kernel[1]);
    ptx::st_global(static_cast<T*>(r.weight) + row * r.stride_o + column % p.channels * r.stride_c +
                       dt * r.stride_tap[0] + dh * r.stride_tap[1] + dw * r.stride_tap[2],
                   ptx::from_float<T>(sum));
  }
}

template <class Tile>
Status launch_wgrad(WgradParams p, const WgradResult& result, int groups, bool bias, Sm80Choice choice,
                    Workspace& workspace, cudaStream_t stream) {
  const int shared = Tile::kStages * Tile::kStageBytes + Tile::Table::bytes(p.source.kernel);
  Device device;
  VTOK_RETURN_IF_ERROR(current_device(device));
  if (shared > device.shared_limit)
    return Status::Unsupported("weight: its taps need more shared memory than this GPU has");
  p.tiles_n = int(divide_up(p.columns, Tile::kN));
  const int64_t tiles = divide_up(p.outputs, Tile::kM) * p.tiles_n, rows = int64_t(groups) * p.outputs;
  const int64_t slices = divide_up(p.source.positions, Tile::kSlice);
  // As few shares as fill the multiprocessors twice over, under the model of the forward plan: cycles of the
  // busiest one, and the bytes of the shares.
  int splits = 1;
  double best = 0;
  for (int s : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}) {
    if (s > 1 && s * 4 > slices) break;
    const double waves = double(divide_up(tiles * groups * s, device.multiprocessors));
    const double cost = waves * (double(slices) / s * 512 + 3000) +
                        8.0 * s * rows * p.columns / (12.0 * device.multiprocessors);
    if (s == 1 || cost < best) {
      best = cost;
      splits = s;
    }
  }
  if (choice.splits) splits = int(std::min<int64_t>(choice.splits, std::max<int64_t>(slices, 1)));
  p.partial = workspace.take<float>(splits * rows * p.columns);
  if (bias) p.partial_bias = workspace.take<float>(splits * rows);
  if (workspace.only_counts()) return Status::Ok();
  if (tiles >= (int64_t(1) << 31) || groups > 65535)
    return Status::Unsupported("weight: more tiles or groups than a grid holds");
  const dim3 grid{unsigned(tiles), unsigned(splits), unsigned(groups)};
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(wgrad_kernel<Tile>, grid, dim3(Tile::kThreads), shared, stream, p));
  const dim3 reduce_grid(unsigned(divide_up(p.columns + 1, 256)), unsigned(std::min<int64_t>(rows, 65535)));
  return VTOK_LAUNCH(wgrad_reduce_kernel<typename Tile::T>, reduce_grid, dim3(256), 0, stream, p, result,
                     splits, rows);
}

}  // namespace

Status causal_conv3d_sm80_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                                const Tensor& grad_bias, Sm80Choice choice, void* workspace_base,
                                int64_t* workspace_bytes, void* stream_handle) {
  WgradParams p = {};
  Source& s = p.source;
  VTOK_RETURN_IF_ERROR(make_source(problem, &s));
  const Tensor& weight = problem.weight;
  const int bytes = element_size(problem.x.dtype), outputs = int(weight.size[0]), groups = problem.groups;
  const int64_t expected[5] = {problem.x.size[0], outputs, s.out[0], s.out[1], s.out[2]};
  int64_t dense = outputs;
  for (int i : {4, 3, 2, 0}) {
    if (grad.rank != 5 || grad.size[i] != expected[i] || grad.size[1] != outputs ||
        (grad.size[i] > 1 && grad.stride[i] != dense))
      return Status::Invalid("grad: must have the output's shape in channels_last_3d");
    dense *= grad.size[i];
  }
  for (int i = 0; i < 5; ++i)
    if (grad_weight.rank != 5 || grad_weight.size[i] != weight.size[i])
      return Status::Invalid("grad_weight: must have the weight's shape");
  bool chunks = bind_source(problem.x, problem.cache, groups, &s) && aligned16(grad.data) &&
                outputs / groups * bytes % 16 == 0;
  if (!chunks && s.unit_bytes == 16) {  // x could be read in chunks, grad cannot: then neither is
    s.row_units *= 16 / bytes;
    s.col_units *= 16 / bytes;
    s.unit_bytes = bytes;
  }
  p.grad = static_cast<const char*>(grad.data);
  p.grad_row_bytes = int64_t(outputs) * bytes;
  p.channels = int(weight.size[1]);
  p.outputs = outputs / groups;
  p.columns = s.kernel[0] * s.kernel[1] * s.kernel[2] * p.channels;
  WgradResult r = {grad_weight.data,
                   grad_bias.data,
                   grad_weight.stride[0],
                   grad_weight.stride[1],
                   {grad_weight.stride[2], grad_weight.stride[3], grad_weight.stride[4]},
                   {s.kernel[0], s.kernel[1], s.kernel[2]}};
  Workspace workspace(workspace_base, workspace_bytes);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  auto run = [&](auto math) {
    using Math = decltype(math);
    return chunks ? launch_wgrad<WgradTile<Math, false>>(p, r, groups, bool(grad_bias), choice, workspace,
                                                         stream)
                  : launch_wgrad<WgradTile<Math, true>>(p, r, groups, bool(grad_bias), choice, workspace,
                                                        stream);
  };
  if (problem.x.dtype == DType::f16) return run(MatrixUnit<__half, false>());
  if (problem.x.dtype == DType::bf16) return run(MatrixUnit<__nv_bfloat16, false>());
  if (problem.allow_tf32) return run(MatrixUnit<float, true>());
  return run(MultiplyAdd());
}

}  // namespace vtok::cuda
