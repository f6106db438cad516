// causal_conv3d on sm_90a, gradient of the weights and the bias: dW[o, tap, c] = sum over positions m of
// grad[m, o] * x[source(m, tap), c], a matrix product with K = positions.
//
// Both operands lie in memory with K as the slow axis, channels as the fast one. TMA brings a slice of 8 x 8
// positions as lines of 64 channels, swizzled over 128 bytes, and that is what wgmma takes for a transposed
// operand: nothing is relaid. Zeros around x are what TMA fills in beyond the edges; the frame that a time
// tap reads is a coordinate (clamped, or in the cache's own map), and frames of zeros are left out of the
// sum. A box of x serves the three taps of a column of the kernel: it has the rows of all of them, a row of 8
// positions is 1024 bytes, so the tap below begins 1024 bytes further; that is the descriptor's distance
// between blocks of 64 columns, and one wgmma of 192 columns multiplies all three.
//
// A cluster of two blocks has the same columns and neighboring outputs: each loads half of the boxes of x,
// for both. As many tiles as fill the multiprocessors some whole number of times sum over all positions; the
// others are split, as many times as fill them again. Shares are summed in a fixed order by a second kernel,
// which also rounds once: deterministic. The bias gradient is a product with ones, of 8 columns, in the tiles
// of one column.
//
// Budget, per multiprocessor, of one slice (64 positions) and a tile of 128 outputs x (2 boxes of 64 channels
// x 3 taps):
//   tensor cores     6.3 MFLOP, 1536 cycles of the 4096 FLOP per cycle they do
//   shared memory    16 wgmmas m64n192k16, which read 8 KiB each: 128 KiB, 1024 cycles of 128 bytes
//   L2               grad 16 KiB, x 2 x 10 KiB: 36 KiB, 1840 cycles of the 20 bytes it gives; in a cluster 26
//   KiB, 1330 cycles issue            8 wgmmas per warp, some 60 other instructions
//   registers        192 accumulators of 232; 40 for the producer. Shared memory: 6 stages of 36 KiB; one
//   block.
// A tile of 9 separate boxes would load 88 KiB for the same products. Kernels of another height have a box
// per tap: 48 KiB for 4.2 MFLOP (a tile of 128 x 256), 32 KiB in a cluster, which the L2 holds to six tenths
// of the matrix peak.
// Scratch: 128 x columns float32 per block.
#include "cuda/causal_conv3d/sm90_wgrad.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/causal_conv3d/plan.h"
#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {
namespace {

// positions of a slice along each axis; outputs of a tile
constexpr int kSide = 8, kRows = 128, kThreads = 384;
constexpr int kLine = 128, kTile = kSide * kSide * kLine;  // bytes of 64 channels; of 64 positions
constexpr int kMostStages = 8, kOnesBytes = 8 * kLine;

struct Sm90WgradMaps {  // channels, width, height, time, batch
  TensorMap grad, x, cache;
};

struct Sm90WgradParams {
  Source source;        // of height and width only stride, dilation, pad and kernel
  float* partial;       // [block][kRows][columns]
  float* partial_bias;  // [block][kRows] or null
  int batch, patches[2];
  int boxes, channel_blocks;  // of a time tap: (tap of the plane, or column of taps) x (64 channels)
  int tiles_m, tiles_n;       // tiles_m in clusters; tiles_n of one time tap
  int whole, rest, splits;    // tiles of one share, and those of several
  int cluster, stages, box_bytes;
  int outputs, channels;
};

// A box of x has kHigh taps below each other; a tile has kBoxes.
template <class T_, int High, int Boxes>
struct Sm90WgradTile {
  using T = T_;
  static constexpr int kHigh = High, kBoxes = Boxes, kColumns = 64 * High * Boxes;
  // wgmmas per 16 positions, and their columns
  static constexpr int kProducts = High > 1 ? Boxes : 1, kN = kColumns / kProducts;
};

// What a block computes: a tile, and a share of its sum.
struct Share {
  int column_tile, row_tile, dt, first_box;
  bool bias;
  int first_frame, frames;  // of the output, those to which the time tap gives anything
  int64_t begin, end;       // slices

  __device__ Share(const Sm90WgradParams& p, int boxes_per_tile, uint32_t unit, uint32_t rank) {
    const Source& s = p.source;
    const int in_rest = int(unit) - p.whole, tile = in_rest < 0 ? int(unit) : p.whole + in_rest % p.rest;
    const int split = in_rest < 0 ? 0 : in_rest / p.rest, splits = in_rest < 0 ? 1 : p.splits;
    column_tile = tile / p.tiles_m;
    row_tile = tile % p.tiles_m * p.cluster + int(rank);
    dt = column_tile / p.tiles_n;
    first_box = column_tile % p.tiles_n * boxes_per_tile;
    bias = p.partial_bias && column_tile == (s.kernel[0] - 1) * p.tiles_n;
    first_frame = 0;
    int last = s.out[0] - 1;
    // the frames t with 0 <= t stride + dt dilation - pad < length
    if (s.time_mode == PadMode::zeros && !bias) {
      const int shift = dt * s.dilation[0] - s.pad[0];
      first_frame = shift >= 0 ? 0 : (-shift + s.stride[0] - 1) / s.stride[0];
      last = s.length[0] - 1 - shift < 0 ? -1 : min(last, (s.length[0] - 1 - shift) / s.stride[0]);
    }
    frames = max(last - first_frame + 1, 0);
    const int64_t slices = int64_t(p.batch) * frames * p.patches[0] * p.patches[1];
    begin = slices * split / splits;
    end = slices * (split + 1) / splits;
  }
};

// One thread: fills the ring of stages, each the outputs' two tiles of grad and then the boxes of x.
template <class Tile>
__device__ void produce(const Sm90WgradMaps& maps, const Sm90WgradParams& p, const Share& share,
                        uint32_t ring, uint32_t full, uint32_t empty, uint32_t rank) {
  const Source& s = p.source;
  const uint32_t stage_bytes = 2 * kTile + Tile::kBoxes * p.box_bytes;
  int box_c[Tile::kBoxes], box_h[Tile::kBoxes], box_w[Tile::kBoxes];
#pragma unroll
  for (int j = 0; j < Tile::kBoxes; ++j) {
    // the last again where there are no more
    const int box = min(share.first_box + j, p.boxes - 1), tap = box / p.channel_blocks;
    box_c[j] = box % p.channel_blocks * 64;
    box_h[j] = (Tile::kHigh > 1 ? 0 : tap / s.kernel[2]) * s.dilation[1] - s.pad[1];
    box_w[j] = tap % s.kernel[2] * s.dilation[2] - s.pad[2];
  }
  int64_t at = share.begin;
  const int frames = max(share.frames, 1);
  int w = int(at % p.patches[1]), h = int((at /= p.patches[1]) % p.patches[0]),
      t = int((at /= p.patches[0]) % frames);
  int b = int(at / frames);
  int stage = 0;
  uint32_t phase = 1;
  for (int64_t slice = share.begin; slice < share.end; ++slice) {
    const uint32_t to = ring + stage * stage_bytes, bar = full + 8 * stage;
    const int out_t = share.first_frame + t;
    int frame = tap_index(s, 0, out_t, share.dt);  // -1, out of bounds, reads zeros
    const TensorMap* map = frame >= 0 && frame < s.used_cache ? &maps.cache : &maps.x;
    if (frame >= 0) frame += frame < s.used_cache ? s.cached - s.used_cache : -s.used_cache;
    ptx::mbarrier_wait_cluster(empty + 8 * stage, phase);
    ptx::mbarrier_arrive_expect(bar, stage_bytes);
    for (int half = 0; half < 2; ++half)
      ptx::tma_load(to + half * kTile, &maps.grad, bar,
                    {share.row_tile * kRows + 64 * half, w * kSide, h * kSide, out_t, b});
#pragma unroll
    for (int j = 0; j < Tile::kBoxes; ++j) {
      const int x_w = w * kSide * s.stride[2] + box_w[j], x_h = h * kSide * s.stride[1] + box_h[j];
      const uint32_t box = to + 2 * kTile + j * p.box_bytes;
      if (p.cluster == 1)
        ptx::tma_load(box, map, bar, {box_c[j], x_w, x_h, frame, b});
      else if (j % 2 == int(rank))
        ptx::tma_load_multicast(box, map, bar, {box_c[j], x_w, x_h, frame, b}, 3);
    }
    if (++stage == p.stages) {
      stage = 0;
      phase ^= 1;
    }
    if (++w == p.patches[1]) {
      w = 0;
      ++h;
    }
    if (h == p.patches[0]) {
      h = 0;
      ++t;
    }
    if (t == share.frames) {
      t = 0;
      ++b;
    }
  }
}

// A warpgroup: 64 outputs by all columns of the tile.
template <class Tile>
__device__ void multiply(const Sm90WgradParams& p, const Share& share, uint32_t ring, uint32_t full,
                         uint32_t empty, uint32_t ones, int group) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t stage_bytes = 2 * kTile + Tile::kBoxes * p.box_bytes;
  // Distances in x: from 8 positions to the next 8, and from 64 columns to the next 64.
  const uint32_t next_line = (Tile::kHigh > 1 ? p.source.stride[1] : 1) * kSide * kLine;
  const uint32_t next_columns = Tile::kHigh > 1 ? p.source.dilation[1] * kSide * kLine : p.box_bytes;
  const uint64_t of_ones = ptx::wgmma_descriptor<kLine>(ones);
  float d[Tile::kProducts][Tile::kN / 2], bias[4];
#pragma unroll
  for (int q = 0; q < Tile::kProducts; ++q)
#pragma unroll
    for (int i = 0; i < Tile::kN / 2; ++i) d[q][i] = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bias[i] = 0;

  auto release = [&](int stage) {  // to both blocks: a stage is filled by either
    if (lane < p.cluster) ptx::mbarrier_arrive_cluster_relaxed(ptx::mapa(empty + 8 * stage, lane));
  };
  auto sum = [&](auto with_bias) {  // apart, so that no branch parts the products of a slice
    int stage = 0, last = 0;
    uint32_t phase = 0;
    for (int64_t slice = share.begin; slice < share.end; ++slice) {
      const uint32_t from = ring + stage * stage_bytes, x = from + 2 * kTile;
      ptx::mbarrier_wait(full + 8 * stage, phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSide * kSide / 16; ++k) {
        const uint64_t grad =
            ptx::wgmma_descriptor_transposed<kLine>(from + group * kTile + k * 16 * kLine, 0);
#pragma unroll
        for (int q = 0; q < Tile::kProducts; ++q) {
          const uint32_t box = x + q * p.box_bytes + 2 * k * next_line;
          ptx::wgmma_m64k16<T, Tile::kN, true, true>(
              d[q], grad, ptx::wgmma_descriptor_transposed<kLine>(box, next_columns, next_line));
        }
        if constexpr (decltype(with_bias)::value) ptx::wgmma_m64k16<T, 8, true>(bias, grad, of_ones);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // of the slice before
      if (slice > share.begin) release(last);
      last = stage;
      if (++stage == p.stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    ptx::wgmma_wait<0>();
    if (share.end > share.begin) release(last);
  };
  if (share.bias)
    sum(std::true_type());
  else
    sum(std::false_type());

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group * 64 + warp * 16 + lane / 4 + 8 * half;
    if (share.bias && lane % 4 == 0)
      ptx::st_global(p.partial_bias + int64_t(blockIdx.x) * kRows + row, bias[2 * half]);
    float* to = p.partial + (int64_t(blockIdx.x) * kRows + row) * Tile::kColumns + lane % 4 * 2;
#pragma unroll
    for (int q = 0; q < Tile::kProducts; ++q)
#pragma unroll
      for (int j = 0; j < Tile::kN / 8; ++j)
        ptx::st_global(reinterpret_cast<float2*>(to + q * Tile::kN + 8 * j),
                       make_float2(d[q][4 * j + 2 * half], d[q][4 * j + 2 * half + 1]));
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    wgrad_sm90_kernel(const __grid_constant__ Sm90WgradMaps maps, const __grid_constant__ Sm90WgradParams p) {
  const uint32_t ring = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  const uint32_t ones = ring + p.stages * (2 * kTile + Tile::kBoxes * p.box_bytes), full = ones + kOnesBytes;
  const uint32_t empty = full + 8 * kMostStages, rank = p.cluster == 1 ? 0 : ptx::cluster_rank();
  if (t == 0) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 8 * p.cluster);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&maps.grad);
    ptx::prefetch_tensor_map(&maps.x);
  }
  for (uint32_t i = t; i < kOnesBytes / 2; i += kThreads)
    ptx::st_shared(ones + 2 * i, ptx::from_float<typename Tile::T>(1));
  ptx::fence_proxy_async();
  __syncthreads();
  if (p.cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const Share share(p, Tile::kBoxes, blockIdx.x / p.cluster, rank);
  if (t < 128) {
    ptx::setmaxnreg_dec<40>();
    if (t < 32 && ptx::elect_sync()) produce<Tile>(maps, p, share, ring, full, empty, rank);
  } else {
    ptx::setmaxnreg_inc<232>();
    multiply<Tile>(p, share, ring, full, empty, ones, int(t) / 128 - 1);
  }
  __syncwarp();
  // neither ends while the other signals its barriers
  if (p.cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

struct Operand {  // batch, channel, time, height, width; strides in elements
  const void* data;
  int64_t stride[5];

  __device__ int64_t offset(int b, int c, int t, int h, int w) const {
    return b * stride[0] + c * stride[1] + t * stride[2] + h * stride[3] + w * stride[4];
  }
};

struct Sm90WgradResult {
  void* weight;
  void* bias;  // or null
  int64_t stride_o, stride_c, stride_tap[3];
  Operand grad, x, cache;
};

// One element of the gradient, term by term.
template <class T>
struct Term {
  const Sm90WgradParams& p;
  const Sm90WgradResult& r;
  const int o, c, dt, dh, dw;

  // What position (t, h, w) of the output multiplies, also where the output has no such position.
  __device__ float x(int b, int t, int h, int w) const {
    const Source& s = p.source;
    const int row = h * s.stride[1] + dh * s.dilation[1] - s.pad[1],
              column = w * s.stride[2] + dw * s.dilation[2] - s.pad[2], frame = tap_index(s, 0, t, dt);
    if (frame < 0 || row < 0 || row >= s.length[1] || column < 0 || column >= s.length[2]) return 0;
    const bool cached = frame < s.used_cache;
    const T* from = static_cast<const T*>(cached ? r.cache.data : r.x.data);
    const int64_t at = cached ? r.cache.offset(b, c, frame + s.cached - s.used_cache, row, column)
                              : r.x.offset(b, c, frame - s.used_cache, row, column);
    return ptx::to_float(ptx::ld_global(from + at));
  }

  // Whether a slice of 8 x 8 positions that hangs over the edge has multiplied its zeros by what is not finite.
  __device__ bool spoiled() const {
#pragma unroll 1
    for (int b = 0; b < p.batch; ++b)
#pragma unroll 1
      for (int t = 0; t < p.source.out[0]; ++t)
#pragma unroll 1
        for (int h = 0; h < p.patches[0] * kSide; ++h)
#pragma unroll 1
          for (int w = h < p.source.out[1] ? p.source.out[2] : 0; w < p.patches[1] * kSide; ++w)
            if (const float v = x(b, t, h, w); v - v != 0) return true;
    return false;
  }
  __device__ float sum() const {
    float sum = 0;
#pragma unroll 1
    for (int b = 0; b < p.batch; ++b)
#pragma unroll 1
      for (int t = 0; t < p.source.out[0]; ++t)
#pragma unroll 1
        for (int h = 0; h < p.source.out[1]; ++h)
#pragma unroll 1
          for (int w = 0; w < p.source.out[2]; ++w) {
            const float v = x(b, t, h, w);
            const T* grad = static_cast<const T*>(r.grad.data) + r.grad.offset(b, o, t, h, w);
            sum = fmaf(ptx::to_float(ptx::ld_global(grad)), v, sum);
          }
    return sum;
  }
};

// One thread per column of a row of tiles: sums the shares in order and rounds once. A column more stands for
// the bias.
template <class Tile>
__global__ void __launch_bounds__(256)
    wgrad_sm90_reduce_kernel(const Sm90WgradParams p, const Sm90WgradResult r) {
  using T = typename Tile::T;
  const int all_tiles = p.source.kernel[0] * p.tiles_n, column = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_bias = column == all_tiles * Tile::kColumns;
  if (column > all_tiles * Tile::kColumns || (is_bias && !p.partial_bias)) return;
  const int column_tile = is_bias ? all_tiles - p.tiles_n : column / Tile::kColumns,
            within = column % Tile::kColumns;
  const int dt = column_tile / p.tiles_n,
            box = column_tile % p.tiles_n * Tile::kBoxes + within / (64 * Tile::kHigh);
  const int tap = box / p.channel_blocks, c = box % p.channel_blocks * 64 + within % 64;
  const int dh = Tile::kHigh > 1 ? within / 64 % Tile::kHigh : tap / p.source.kernel[2],
            dw = tap % p.source.kernel[2];
  if (!is_bias && (box >= p.boxes || c >= p.channels)) return;
  for (int o = blockIdx.y; o < p.outputs; o += gridDim.y) {
    const int row_tile = o / kRows, tile = column_tile * p.tiles_m + row_tile / p.cluster,
              shares = tile < p.whole ? 1 : p.splits;
    float sum = 0;
    for (int s = 0; s < shares; ++s) {
      const int64_t row = (int64_t(tile + s * p.rest) * p.cluster + row_tile % p.cluster) * kRows + o % kRows;
      sum += ptx::ld_global(is_bias ? p.partial_bias + row : p.partial + row * Tile::kColumns + within);
    }
    if (sum != sum && !is_bias)  // an Inf in x beside the edge: rare, and slow to mend
      if (const Term<T> term = {p, r, o, c, dt, dh, dw}; term.spoiled()) sum = term.sum();
    T* to = is_bias ? static_cast<T*>(r.bias) + o
                    : static_cast<T*>(r.weight) + o * r.stride_o + c * r.stride_c + dt * r.stride_tap[0] +
                          dh * r.stride_tap[1] + dw * r.stride_tap[2];
    ptx::st_global(to, ptx::from_float<T>(sum));
  }
}

// ---- the plan ---------------------------------------------------------------------------------------------

// Boxes of 64 channels of a tensor (B, C, T, H, W), channels_last_3d, of `rows` x 8 positions; every
// step[i]-th row and column.
Status channels_last_map(TensorMap& map, const Tensor& t, int rows, int row_step, int column_step) {
  TensorMapShape shape = {t.dtype,
                          5,
                          {},
                          {},
                          {64, unsigned(kSide * column_step), unsigned(rows * row_step), 1, 1},
                          {1, unsigned(column_step), unsigned(row_step), 1, 1},
                          128};
  const int axes[5] = {1, 4, 3, 2, 0};
  for (int i = 0; i < 5; ++i) {
    shape.size[i] = uint64_t(t.size[axes[i]]);
    shape.stride[i] = uint64_t(t.stride[axes[i]]) * 2;
    if (i && t.size[axes[i]] == 1)
      shape.stride[i] = std::max<uint64_t>(shape.stride[i - 1] * shape.size[i - 1], 16) / 16 * 16;
  }
  return encode(map, t.data, shape);
}

Operand operand(const Tensor& t) {
  Operand o = {t.data, {}};
  std::copy(t.stride, t.stride + 5, o.stride);
  return o;
}

Status check_tensor(const Tensor& t, const char* name) {
  const std::string expected = std::string(name) + ": sm90 reads channels_last_3d of 8, 16, ... channels";
  if (t.stride[1] != 1 || t.size[1] % 8 || !aligned16(t.data)) return Status::Unsupported(expected);
  for (int i : {0, 2, 3, 4})
    if (t.size[i] > 1 && (t.stride[i] % 8 || t.stride[i] <= 0)) return Status::Unsupported(expected);
  return Status::Ok();
}

Status check(const ConvProblem& problem, const Source& s, const Tensor& grad, const Device& device) {
  const int* up = problem.upsample;
  if (device.capability != 90) return Status::Unsupported("sm90: the GPU's compute capability is not 9.0");
  if (problem.x.dtype == DType::f32) return Status::Unsupported("sm90: bfloat16 and float16 only");
  if (problem.groups != 1) return Status::Unsupported("sm90: no groups");
  if (up[0] != 1 || up[1] != 1 || up[2] != 1) return Status::Unsupported("sm90: no upsampling");
  for (int i = 2; i < 6; ++i)
    if (problem.spatial_mode != PadMode::zeros && problem.pad[i] > 0)
      return Status::Unsupported("sm90: pads space by zeros only");
  if (s.stride[1] > 8 || s.stride[2] > 8) return Status::Unsupported("sm90: strides up to 8 in space");
  VTOK_RETURN_IF_ERROR(check_tensor(problem.x, "x"));
  if (problem.cache) VTOK_RETURN_IF_ERROR(check_tensor(problem.cache, "cache"));
  const int64_t expected[5] = {problem.x.size[0], problem.weight.size[0], s.out[0], s.out[1], s.out[2]};
  for (int i = 0; i < 5; ++i)
    if (grad.rank != 5 || grad.size[i] != expected[i])
      return Status::Invalid("grad: must have the output's shape");
  return check_tensor(grad, "grad");
}

// Of the tensor cores, of shared memory and of the L2, together as in the plan of the forward kernel, whose
// loop keeps a group of products under way too.
double cycles_of_slice(int columns, int products, int stage_bytes, double bytes_of_l2) {
  constexpr double kTensor = 0.83, kShared = 128, kL2 = 20, kDepth = 3;
  const double tensor = 4.0 * columns;
  // of each warpgroup and 16 positions: 64 outputs for each product, and all columns
  const double shared = (2 * kSide * kSide / 16 * (products * 2048.0 + columns * 32) + stage_bytes) / kShared;
  const double sum =
      std::pow(tensor, kDepth) + std::pow(shared, kDepth) + std::pow(bytes_of_l2 / kL2, kDepth);
  return std::max(std::pow(sum, 1 / kDepth), tensor / kTensor);
}

// What a call asks of a tile: one of several that may suit it.
struct Sm90WgradCall {
  const ConvProblem& problem;
  const Tensor& grad;
  Sm90WgradChoice choice;
  const Device& device;
};

// Shared memory beside the ring of stages.
constexpr int kFixedBytes = 1024 + kOnesBytes + 16 * kMostStages;

template <class Tile>
int rows_of_box(const Source& s) {
  return Tile::kHigh > 1 ? (kSide - 1) * s.stride[1] + (Tile::kHigh - 1) * s.dilation[1] + 1 : kSide;
}
template <class Tile>
int bytes_of_stage(const Sm90WgradParams& p) {
  return 2 * kTile + Tile::kBoxes * p.box_bytes;
}

// Boxes, their bytes and as many stages as fit; false where the tile does not suit the call.
template <class Tile>
bool fit(const Sm90WgradCall& call, Sm90WgradParams* p) {
  const Source& s = p->source;
  const bool tall = Tile::kHigh > 1;
  const int rows = rows_of_box<Tile>(s);
  p->box_bytes = rows * kSide * kLine;
  p->boxes = p->channel_blocks * s.kernel[2] * (tall ? 1 : s.kernel[1]);
  p->tiles_n = int(divide_up(p->boxes, Tile::kBoxes));
  p->stages = std::min((call.device.shared_limit - kFixedBytes) / bytes_of_stage<Tile>(*p), kMostStages);
  return p->stages >= 2 && rows <= 256 && (!tall || s.kernel[1] == Tile::kHigh) &&
         (!call.choice.columns || call.choice.columns == Tile::kColumns);
}

// The cycles of a division of the tiles among the multiprocessors, `at_once` clusters of them.
template <class Tile>
double predicted_cycles(const Sm90WgradParams& p, int at_once, double slices, const Device& device) {
  const double slice = cycles_of_slice(Tile::kColumns, Tile::kProducts, bytes_of_stage<Tile>(p),
                                       2 * kTile + double(Tile::kBoxes) * p.box_bytes / p.cluster);
  const double shares = double(p.whole) + double(p.rest) * p.splits,
               more = std::ceil(double(p.rest) * p.splits / at_once);
  return p.whole / at_once * (slices * slice + 3000) + more * (slices / p.splits * slice + 3000) +
         8 * shares * p.cluster * kRows * Tile::kColumns / (20.0 * device.multiprocessors);
}

// Blocks per cluster, tiles of one share and those of several, and of how many: the fewest cycles, or 0 where
// no cluster has the size that was asked for.
template <class Tile>
double divide_tiles(const Sm90WgradCall& call, Sm90WgradParams* best) {
  const Sm90WgradChoice& choice = call.choice;
  Sm90WgradParams p = *best;
  const int row_tiles = int(divide_up(p.outputs, kRows)), columns = p.source.kernel[0] * p.tiles_n;
  const double slices = double(p.batch) * p.source.out[0] * p.patches[0] * p.patches[1];
  double fewest = 0;
  auto consider = [&](int whole, int splits, int at_once) {
    p.whole = whole;
    p.rest = p.tiles_m * columns - whole;
    p.splits = splits;
    const double cycles = predicted_cycles<Tile>(p, at_once, slices, call.device);
    if (fewest && cycles >= fewest) return;
    fewest = cycles;
    *best = p;
  };
  for (p.cluster = 1; p.cluster <= 2; ++p.cluster) {
    if (row_tiles % p.cluster || (choice.cluster && choice.cluster != p.cluster)) continue;
    p.tiles_m = row_tiles / p.cluster;
    const int tiles = p.tiles_m * columns, at_once = std::max(call.device.multiprocessors / p.cluster, 1);
    if (choice.splits) {
      consider(0, choice.splits, at_once);
      continue;
    }
    for (int waves = std::max(tiles / at_once - 1, 0); waves <= tiles / at_once; ++waves)
      for (int splits :
           {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64}) {
        if (splits > 1 && (tiles == waves * at_once || splits * 4 > slices)) break;
        consider(waves * at_once, splits, at_once);
      }
  }
  return fewest;
}

// The plan of a call with this tile, and the cycles that it predicts.
template <class Tile>
Status plan(const Sm90WgradCall& call, Sm90WgradParams* p, double* cycles) {
  if (!fit<Tile>(call, p))
    return Status::Unsupported("sm90: no tile suits the kernel, its dilation and this GPU's shared memory");
  *cycles = divide_tiles<Tile>(call, p);
  if (!*cycles) return Status::Unsupported("sm90: no cluster of that size for so many outputs");
  return Status::Ok();
}

void report(const Sm90WgradParams& p, int columns, double cycles, int64_t* to) {
  const int64_t numbers[kSm90WgradReport] = {columns, p.splits, p.cluster,      p.whole,
                                             p.rest,  p.stages, int64_t(cycles)};
  std::copy(std::begin(numbers), std::end(numbers), to);
}

template <class Tile>
Status encode_maps(const Sm90WgradCall& call, const Source& s, Sm90WgradMaps* maps) {
  const int rows = rows_of_box<Tile>(s), row_step = Tile::kHigh > 1 ? 1 : s.stride[1];
  VTOK_RETURN_IF_ERROR(channels_last_map(maps->grad, call.grad, kSide, 1, 1));
  VTOK_RETURN_IF_ERROR(channels_last_map(maps->x, call.problem.x, rows, row_step, s.stride[2]));
  maps->cache = maps->x;
  if (!s.used_cache) return Status::Ok();
  return channels_last_map(maps->cache, call.problem.cache, rows, row_step, s.stride[2]);
}

// Takes the scratch memory, and launches unless that is all that was asked.
template <class Tile>
Status launch_plan(const Sm90WgradCall& call, Sm90WgradParams p, const Sm90WgradResult& result,
                   Workspace workspace, cudaStream_t stream) {
  const int64_t blocks = (int64_t(p.whole) + int64_t(p.rest) * p.splits) * p.cluster;
  p.rest = std::max(p.rest, 1);  // a divisor
  p.partial = workspace.take<float>(blocks * kRows * Tile::kColumns);
  p.partial_bias = result.bias ? workspace.take<float>(blocks * kRows) : nullptr;
  if (blocks >= (int64_t(1) << 31)) return Status::Unsupported("weight: more tiles than a grid holds");
  Sm90WgradMaps maps;
  VTOK_RETURN_IF_ERROR(encode_maps<Tile>(call, p.source, &maps));
  if (workspace.only_counts()) return Status::Ok();
  VTOK_RETURN_IF_ERROR(
      VTOK_LAUNCH_CLUSTER(dim3(unsigned(p.cluster)), wgrad_sm90_kernel<Tile>, dim3(unsigned(blocks)),
                          dim3(kThreads), kFixedBytes + p.stages * bytes_of_stage<Tile>(p), stream, maps, p));
  const int64_t columns = int64_t(p.source.kernel[0]) * p.tiles_n * Tile::kColumns + 1;
  const dim3 grid(unsigned(divide_up(columns, 256)), unsigned(std::min(p.outputs, 65535)));
  return VTOK_LAUNCH(wgrad_sm90_reduce_kernel<Tile>, grid, dim3(256), 0, stream, p, result);
}

// The cheaper of two tiles by the plan's own model.
template <class T>
Status launch(const Sm90WgradCall& call, const Sm90WgradParams& p, const Sm90WgradResult& result,
              const Workspace& workspace, cudaStream_t stream) {
  auto cheaper = [&](auto wide, auto narrow) {
    using Wide = decltype(wide);
    using Narrow = decltype(narrow);
    Sm90WgradParams of_wide = p, of_narrow = p;
    double wide_cycles = 0, narrow_cycles = 0;
    const Status first = plan<Wide>(call, &of_wide, &wide_cycles),
                 second = plan<Narrow>(call, &of_narrow, &narrow_cycles);
    if (!first.ok() && !second.ok()) return second;
    const bool take_wide = first.ok() && (!second.ok() || wide_cycles <= narrow_cycles);
    if (call.choice.report)
      take_wide ? report(of_wide, Wide::kColumns, wide_cycles, call.choice.report)
                : report(of_narrow, Narrow::kColumns, narrow_cycles, call.choice.report);
    return take_wide ? launch_plan<Wide>(call, of_wide, result, workspace, stream)
                     : launch_plan<Narrow>(call, of_narrow, result, workspace, stream);
  };
  const Status tall = p.source.kernel[1] == 3 ? cheaper(Sm90WgradTile<T, 3, 2>(), Sm90WgradTile<T, 3, 1>())
                                              : Status::Unsupported("");
  if (tall.code != Code::unsupported) return tall;
  return cheaper(Sm90WgradTile<T, 1, 4>(), Sm90WgradTile<T, 1, 2>());
}

}  // namespace

Status causal_conv3d_sm90_wgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_weight,
                                const Tensor& grad_bias, Sm90WgradChoice choice, void* workspace_base,
                                int64_t* workspace_bytes, void* stream_handle) {
  Sm90WgradParams p = {};
  Source& s = p.source;
  Device device;
  VTOK_RETURN_IF_ERROR(make_source(problem, &s));
  VTOK_RETURN_IF_ERROR(current_device(device));
  VTOK_RETURN_IF_ERROR(check(problem, s, grad, device));
  for (int i = 0; i < 5; ++i)
    if (grad_weight.rank != 5 || grad_weight.size[i] != problem.weight.size[i])
      return Status::Invalid("grad_weight: must have the weight's shape");
  p.batch = int(problem.x.size[0]);
  p.channels = int(problem.x.size[1]);
  p.outputs = int(problem.weight.size[0]);
  p.channel_blocks = int(divide_up(p.channels, 64));
  for (int i : {0, 1}) p.patches[i] = int(divide_up(s.out[1 + i], kSide));
  const Sm90WgradResult result = {grad_weight.data,
                                  grad_bias.data,
                                  grad_weight.stride[0],
                                  grad_weight.stride[1],
                                  {grad_weight.stride[2], grad_weight.stride[3], grad_weight.stride[4]},
                                  operand(grad),
                                  operand(problem.x),
                                  operand(problem.cache)};
  const Workspace workspace(workspace_base, workspace_bytes);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const Sm90WgradCall call = {problem, grad, choice, device};
  if (problem.x.dtype == DType::f16) return launch<__half>(call, p, result, workspace, stream);
  return launch<__nv_bfloat16>(call, p, result, workspace, stream);
}

}  // namespace vtok::cuda
