// Implicit GEMM: M = output positions, N = output channels, K = (time tap, plane tap, channel).
//
// A block computes a tile of kM positions by kN channels, in slices of 64 bytes of K through a ring of
// kStages cp.async stages.
// The trick: everything the padding rules say is in two tables of addresses (source.cuh), made
// once per block; the main loop adds two table entries per 16-byte chunk, and zero padding is cp.async's zero
// fill. A time tap that no row of the tile reads (zeros before the first frame) is left out of the loop and
// costs nothing.
//
// Floor of a 3x3x3 layer of 128 channels on P positions in half precision: 27*128*128*P multiply-adds, 512*P
// bytes of activations. Per slice of a 256x128 tile, 1.05 M multiply-adds: 24 KiB from L2 to shared memory,
// 64 KiB from there to the registers. At 128 bytes a cycle that is 704 cycles of the memory pipe, against
// 1024 of an A100's matrix units. Of about 220 instructions that a warp executes per slice 64 are products;
// see sm80_forward.cu for the registers and shared memory of each tile.
#pragma once
#include "cuda/causal_conv3d/epilogue.cuh"
#include "cuda/causal_conv3d/sm80_math.cuh"
#include "cuda/causal_conv3d/source.cuh"

namespace vtok::cuda {

struct ConvParams {
  Source source;
  Epilogue epilogue;
  const char* weight;  // relaid: [groups * outputs][kt][k_frame]
  const float* bias;   // relaid: [groups * outputs], or null
  float* partial;      // [splits][positions][partial_stride], where splits > 1
  int64_t weight_row_bytes;
  int partial_stride;
  int channels, outputs;  // of one group
  int k_frame;            // K of one time tap: kh*kw*channels, rounded up to a slice
  int tiles_n;
};

// A tile of M x N by warps of WarpM x WarpN. Gather: element by element, for channel counts and strides that
// no 16-byte chunk fits.
template <class Math_, int M, int N, int WarpM, int WarpN, int Stages, bool Gather,
          int BlocksPerMultiprocessor>
struct ConvTile {
  using Math = Math_;
  using T = typename Math::Type;
  static constexpr int kM = M, kN = N, kWarpM = WarpM, kWarpN = WarpN, kStages = Stages,
                       kBlocks = BlocksPerMultiprocessor;
  static constexpr bool kGather = Gather;
  static constexpr int kWarpsN = N / WarpN, kThreads = M / WarpM * kWarpsN * 32;
  static constexpr int kSlice = kRowBytes / sizeof(T);
  static constexpr int kStageBytes = (M + N) * kRowBytes;
  // floats; eight more than a row, so that a store's rows fall on different banks
  static constexpr int kStagingStride = WarpN + 8;
  static_assert(kThreads / 32 * 16 * kStagingStride * 4 <= Stages * kStageBytes);
  using Table = SourceTable<M>;

  static int shared_bytes(const int (&kernel)[3]) {
    const int table = Table::bytes(kernel), offsets = M * int(sizeof(RowOffsets));
    return Stages * kStageBytes + (table > offsets ? table : offsets);
  }
};

// One thread's place along the K of a time tap.
struct KPlace {
  int channel, tap;

  __device__ void seek(int k, int channels) {
    tap = k / channels;
    channel = k - tap * channels;
  }
  __device__ void advance(int step, int channels) {
    for (channel += step; channel >= channels; channel -= channels) ++tap;
  }
};

// Brings slices of K to shared memory, one after another.
template <class Tile>
struct Loader {
  using T = typename Tile::T;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  static constexpr int kChunkRows = Tile::kThreads / 4, kChunkPasses = Tile::kM / kChunkRows;
  static constexpr int kGatherRows = Tile::kThreads / Tile::kSlice,
                       kWeightPasses = (Tile::kN + kChunkRows - 1) / kChunkRows;

  const ConvParams& p;
  const typename Tile::Table table;
  const uint32_t alive;  // bit dt: some row of the tile reads through time tap dt
  const int taps, slices;
  const int chunk, row;  // this thread's 16-byte chunk of a slice and its first row
  int dt, slice;
  KPlace place;
  uint64_t frame[kChunkPasses];
  const char* weight;  // this thread's chunk of its first weight row, in the current slice
  int weight_rows;     // how many of the rows from there on exist

  __device__ Loader(const ConvParams& p, typename Tile::Table table, uint32_t alive, int group, int n0)
      : p(p), table(table), alive(alive), taps(p.source.kernel[1] * p.source.kernel[2]),
        slices(p.k_frame / Tile::kSlice), chunk(threadIdx.x % 4), row(threadIdx.x / 4) {
    weight = p.weight + (int64_t(group) * p.outputs + n0 + row) * p.weight_row_bytes + chunk * 16;
    weight_rows = p.outputs - n0 - row;
  }

  __device__ int first_k() const {
    return Tile::kGather ? threadIdx.x % Tile::kSlice : chunk * int(16 / sizeof(T));
  }

  __device__ void enter_frame() {
    if constexpr (!Tile::kGather)
#pragma unroll
      for (int i = 0; i < kChunkPasses; ++i)
        frame[i] = ptx::ld_shared<uint64_t>(table.frame_at(dt, row + i * kChunkRows));
  }

  __device__ void seek(int iteration) {
    dt = -1;
    for (int skip = iteration / slices; skip >= 0; --skip) do
        ++dt;
      while (!(alive >> dt & 1));
    slice = iteration % slices;
    place.seek(slice * Tile::kSlice + first_k(), p.channels);
    weight += (int64_t(dt % p.source.time_taps) * p.k_frame + slice * Tile::kSlice) * int(sizeof(T));
    enter_frame();
  }

  __device__ void advance() {
    weight += kRowBytes;
    if (++slice < slices) {
      place.advance(Tile::kSlice, p.channels);
      return;
    }
    if (!(alive >> dt >> 1)) return;  // that was the last
    const int before = dt;
    do ++dt;
    while (!(alive >> dt & 1));
    weight += int64_t(dt % p.source.time_taps - before % p.source.time_taps - 1) * p.k_frame * int(sizeof(T));
    slice = 0;
    place.seek(first_k(), p.channels);
    enter_frame();
  }

  __device__ void load(uint32_t stage) const {
    const bool inside = place.tap < taps;  // else this is the padding at the end of the time tap's K
    if constexpr (Tile::kGather) {
      constexpr int kPerChunk = 16 / sizeof(T);
      const int column = threadIdx.x % Tile::kSlice;
      const int64_t channel = int64_t(place.channel) * p.source.channel_bytes;
#pragma unroll 8
      for (int r = threadIdx.x / Tile::kSlice; r < Tile::kM; r += kGatherRows) {
        const uint64_t from = ptx::ld_shared<uint64_t>(table.frame_at(dt, r));
        const uint32_t plane = inside ? ptx::ld_shared<uint32_t>(table.plane_at(place.tap, r)) : kNothing;
        Bits value = 0;
        if (from && plane != kNothing)
          value = ptx::ld_global(
              reinterpret_cast<const Bits*>(from + int64_t(plane) * p.source.unit_bytes + channel));
        ptx::st_shared<Bits>(stage + swizzled(r, column / kPerChunk) + column % kPerChunk * int(sizeof(T)),
                             value);
      }
    } else {
      const int channel = place.channel * int(sizeof(T));
#pragma unroll
      for (int i = 0; i < kChunkPasses; ++i) {
        const int r = row + i * kChunkRows;
        const uint32_t plane = inside ? ptx::ld_shared<uint32_t>(table.plane_at(place.tap, r)) : kNothing;
        const bool exists = frame[i] && plane != kNothing;
        const uint64_t from =
            exists ? frame[i] + uint64_t(plane) * 16 + channel : reinterpret_cast<uint64_t>(p.weight);
        ptx::cp_async<16>(stage + swizzled(r, chunk), reinterpret_cast<const void*>(from), exists);
      }
    }
#pragma unroll
    for (int i = 0; i < kWeightPasses; ++i) {
      const int r = i * kChunkRows;
      const bool exists = r < weight_rows;
      if (Tile::kN % kChunkRows == 0 || row + r < Tile::kN)
        ptx::cp_async<16>(stage + Tile::kM * kRowBytes + swizzled(row + r, chunk),
                          exists ? weight + r * p.weight_row_bytes : p.weight, exists);
    }
  }
};

// Where a thread works: the corner of its warp in the tile and of the tile in the product, its block's share of
// K, and the block's shared memory.
template <class Tile>
struct Corner {
  int lane, warp, warp_m, warp_n;
  int n0;
  int64_t m0;
  int split, splits, group;
  uint32_t ring, after_ring;  // the stages; the tables, and then the offsets of the tile's rows

  __device__ __forceinline__ explicit Corner(int tiles_n)
      : lane(threadIdx.x % 32), warp(threadIdx.x / 32), warp_m(warp / Tile::kWarpsN * Tile::kWarpM),
        warp_n(warp % Tile::kWarpsN * Tile::kWarpN),
        // neighboring blocks share their positions, which L2 then holds
        n0(int(blockIdx.x % tiles_n) * Tile::kN), m0(int64_t(blockIdx.x / tiles_n) * Tile::kM),
        split(blockIdx.y), splits(gridDim.y), group(blockIdx.z), ring(ptx::smem_base()),
        after_ring(ring + Tile::kStages * Tile::kStageBytes) {}
};

template <class Tile>
using Sums = float[Tile::kWarpM / 16][Tile::kWarpN / 8][4];

// The first share of K starts from the bias, the others from zero.
template <class Tile>
__device__ __forceinline__ void start_sums(const ConvParams& p, const Corner<Tile>& at, Sums<Tile>& acc) {
#pragma unroll
  for (int j = 0; j < Tile::kWarpN / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = at.n0 + at.warp_n + j * 8 + at.lane % 4 * 2 + h;
      const float bias =
          p.bias && at.split == 0 && n < p.outputs ? ptx::ld_global(p.bias + at.group * p.outputs + n) : 0;
#pragma unroll
      for (int i = 0; i < Tile::kWarpM / 16; ++i) acc[i][j][h] = acc[i][j][2 + h] = bias;
    }
}

// The main loop over slices `begin` to `end` - 1 of K, kStages - 1 of them on their way.
template <class Tile>
__device__ __forceinline__ void multiply_slices(Loader<Tile>& loader, const Corner<Tile>& at, int begin,
                                                int end, Sums<Tile>& acc) {
  Sums<Tile> total = {};  // no registers where Math sums in one level
  if (begin < end) loader.seek(begin);
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (begin + s < end) {
      loader.load(at.ring + s * Tile::kStageBytes);
      loader.advance();
    }
    ptx::cp_async_commit();
  }
  uint32_t read = at.ring, write = at.ring + (Tile::kStages - 1) * Tile::kStageBytes;
  for (int it = begin; it < end; ++it) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    // this slice has arrived, and all warps are done with the slice before it, whose stage is now written
    __syncthreads();
    // The loads come after the first products: their addresses take a warp longer than its own products do.
    Tile::Math::multiply(acc, read + at.warp_m * kRowBytes, read + (Tile::kM + at.warp_n) * kRowBytes, at.lane,
                         [&] {
                           if (it + Tile::kStages - 1 < end) {
                             loader.load(write);
                             loader.advance();
                           }
                           ptx::cp_async_commit();
                         });
    if constexpr (Tile::Math::kTwoLevels)
      if (it % 16 == 15) flush(total, acc);
    write = read;
    read = read + Tile::kStageBytes == at.after_ring ? at.ring : read + Tile::kStageBytes;
  }
  ptx::cp_async_wait<0>();
  if constexpr (Tile::Math::kTwoLevels) flush(acc, total);
}

// One share of K as float32, for reduce_splits_kernel.
template <class Tile>
__device__ __forceinline__ void store_partial(const ConvParams& p, const Corner<Tile>& at, Sums<Tile>& acc) {
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = at.m0 + at.warp_m + i * 16 + at.lane / 4 + h * 8;
      float* to = p.partial + (at.split * p.source.positions + m) * p.partial_stride + at.n0 + at.warp_n +
                  at.lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j)
        if (m < p.source.positions && at.n0 + at.warp_n + j * 8 < p.partial_stride)
          ptx::st_global(reinterpret_cast<float2*>(to + j * 8),
                         make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]));
    }
}

// Where the tile's rows begin in the output and the residual, in the place of the tables.
template <class Tile>
__device__ __forceinline__ void place_rows(const ConvParams& p, const Corner<Tile>& at) {
  for (int r = threadIdx.x; r < Tile::kM; r += Tile::kThreads) {
    const int64_t m = at.m0 + r;
    const RowOffsets offsets =
        row_offsets(p.epilogue, position_of(m < p.source.positions ? m : 0, p.source.out));
    ptx::st_shared<int64_t>(at.after_ring + r * 16, offsets.out);
    ptx::st_shared<int64_t>(at.after_ring + r * 16 + 8, offsets.residual);
  }
}

// Finishes and stores sixteen rows of a warp, from row `row` of the tile on, that lie at `staging`.
template <class Tile>
__device__ __forceinline__ void store_rows(const ConvParams& p, const Corner<Tile>& at, uint32_t staging,
                                           int row) {
  using T = typename Tile::T;
  constexpr int NI = Tile::kWarpN / 8;
  auto offsets = [&](int r) {
    const uint32_t from = at.after_ring + (row + r) * 16;
    return RowOffsets{ptx::ld_shared<int64_t>(from), ptx::ld_shared<int64_t>(from + 8)};
  };
  if (p.epilogue.vectors) {
#pragma unroll 1
    for (int q = at.lane; q < 16 * NI; q += 32) {
      const int r = q / NI, c = q % NI * 8, n = at.n0 + at.warp_n + c;
      if (at.m0 + row + r < p.source.positions && n < p.outputs) {
        const uint32_t from = staging + (r * Tile::kStagingStride + c) * 4;
        const float4 lo = ptx::ld_shared<float4>(from), hi = ptx::ld_shared<float4>(from + 16);
        store_eight<T>(p.epilogue, {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w}, offsets(r),
                       at.group * p.outputs + n);
      }
    }
  } else {
#pragma unroll 1
    for (int q = at.lane; q < 16 * Tile::kWarpN; q += 32) {
      const int r = q / Tile::kWarpN, c = q % Tile::kWarpN, n = at.n0 + at.warp_n + c;
      if (at.m0 + row + r < p.source.positions && n < p.outputs)
        store_one<T>(p.epilogue, ptx::ld_shared<float>(staging + (r * Tile::kStagingStride + c) * 4),
                     offsets(r), at.group * p.outputs + n);
    }
  }
}

// Sixteen rows of a warp at a time pass through shared memory, from the layout of the products to rows of eight
// channels.
template <class Tile>
__device__ __forceinline__ void store_tile(const ConvParams& p, const Corner<Tile>& at, Sums<Tile>& acc) {
  const uint32_t staging = at.ring + at.warp * 16 * Tile::kStagingStride * 4;
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j)
        ptx::st_shared(staging + ((at.lane / 4 + h * 8) * Tile::kStagingStride + j * 8 + at.lane % 4 * 2) * 4,
                       make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]));
    __syncwarp();
    store_rows<Tile>(p, at, staging, at.warp_m + i * 16);
    __syncwarp();
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) conv_kernel(const ConvParams p) {
  const Corner<Tile> at(p.tiles_n);
  const typename Tile::Table table(at.after_ring, p.source);
  table.build(p.source, at.m0, at.group);
  __syncthreads();
  const uint32_t alive = table.alive(p.source.kernel[0], at.lane);
  int time_taps = 0;
  for (int dt = 0; dt < p.source.kernel[0]; ++dt) time_taps += alive >> dt & 1;

  Loader<Tile> loader(p, table, alive, at.group, at.n0);
  const int64_t all = int64_t(time_taps) * loader.slices;
  const int begin = int(all * at.split / at.splits), end = int(all * (at.split + 1) / at.splits);
  Sums<Tile> acc;
  start_sums<Tile>(p, at, acc);
  multiply_slices<Tile>(loader, at, begin, end, acc);
  if (at.splits > 1) {
    store_partial<Tile>(p, at, acc);
    return;
  }
  __syncthreads();  // the tables are free, also where the loop had nothing to do
  place_rows<Tile>(p, at);
  __syncthreads();  // so is the ring
  store_tile<Tile>(p, at, acc);
}

// Sums the K splits of eight channels of one position, always in the same order, and finishes them.
template <class T>
__global__ void __launch_bounds__(256) reduce_splits_kernel(const ConvParams p, int splits) {
  const int chunks = p.partial_stride / 8;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, m = index / chunks;
  if (m >= p.source.positions) return;
  const int n = int(index % chunks) * 8;
  const RowOffsets row = row_offsets(p.epilogue, position_of(m, p.source.out));
  const float* first = p.partial + m * p.partial_stride + n;
  const int64_t split_stride = p.source.positions * p.partial_stride;
  if (p.epilogue.vectors) {
    float v[8] = {};
    for (int s = 0; s < splits; ++s) {
      const float4* from = reinterpret_cast<const float4*>(first + s * split_stride);
      const float4 lo = ptx::ld_global(from), hi = ptx::ld_global(from + 1);
      v[0] += lo.x;
      v[1] += lo.y;
      v[2] += lo.z;
      v[3] += lo.w;
      v[4] += hi.x;
      v[5] += hi.y;
      v[6] += hi.z;
      v[7] += hi.w;
    }
    store_eight<T>(p.epilogue, v, row, n);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8 && n + i < p.outputs; ++i) {
    float v = 0;
    for (int s = 0; s < splits; ++s) v += ptx::ld_global(first + s * split_stride + i);
    store_one<T>(p.epilogue, v, row, n + i);
  }
}

}  // namespace vtok::cuda
