// causal_conv3d on sm_90a, forward and the gradient of the input: implicit GEMM, M = output
// positions, N = output channels, K = (time tap, slab of 64 channels, tap in the plane).
//
// A block works off tiles of positions (frames x rows x columns, any shape of at most M) by N channels. Per
// step of K one patch of x, the tile's positions with their halo, comes to shared memory by TMA, which fills
// in zeros around the frame; the producer chooses for each time tap the frame: clamped, skipped, or from the
// tensor map of the cache. The trick: one patch serves all taps of the plane. A tap is a shift of the patch
// by whole rows of 128 bytes, and ldmatrix reads any rows into the registers from which wgmma takes its left
// operand. (A descriptor of the tile in shared memory could start only at every eighth row: that of a tap
// does not, and no GPU has proven the swizzle's base offset yet.) Three warps produce, one thread each:
// patches, weights, and the output with the residual that is laid under it beforehand. Two warpgroups
// multiply, each with half of the rows.
//
// Bytes that decide the design, per multiprocessor of an H200 at 1.75 GHz: the tensor cores do 2048
// multiply-adds of halves a cycle, so m64nNk16 lasts N/2 cycles; shared memory moves 128 bytes a cycle; L2
// about 24 (5.5 TB/s over 132), device memory 17 to 20. Of a 3x3x3 layer per slab and time tap, nine taps
// (cycles: of the tensor cores; L2: bytes a cycle;
//     multicast: the weights
// shared by a cluster of two; shared: share of the cycles that ldmatrix, wgmma and TMA keep shared memory
// busy; issue: slots of the four schedulers that the loop below takes, of its 107 to 114 instructions a warp
// and tap, 80 where it has 64 rows):
//   tile      cycles  patch KiB  weights KiB  L2    multicast  reload per tap  shared  issue
//   256x160   11520   40.5       180          19.6  11.6       41.6            0.85    0.18
//   256x128    9216   40.5       144          20.5  12.5       48.0            0.91    0.21
//   256x96     6912   40.5       108          22.0  14.0       58.7            1.01    0.28
//   128x144    5184   22.5       162          36.4  20.4       60.4            1.01    0.28
//   128x128    4608   22.5       144          37.0  21.0       64.0            1.04    0.31
//   128x112    4032   22.5       126          37.7  21.7       68.6            1.08    0.36
//   128x96     3456   22.5       108          38.7  22.7       74.7            1.14    0.42
//   128x64     2304   22.5        72          42.0  26.0       96.0            1.33    0.63
// So the patch is needed (reloading x for every tap asks L2 for twice what it gives), 256 rows are needed or
// the cluster, and with both the tensor cores are the bound, shared memory a close second. 256x160 is the
// largest tile whose sums (160 registers) leave room for the fragments (32).
// Kernels of one tap in the plane (1x1x1; 3x1x1 with the frames of a tile in one patch) have nothing to share
// but the weights: 24 to 48 bytes a cycle from L2, which bounds them. A channel count that is not a multiple of
// 64 loads zeros but multiplies only ceil(C / 16) steps. Strides and dilations make the patch larger, no
// more: a stride of 2 in the plane loads x once, like stride 1, where element strides of the tensor map would
// load it for every tap.
//
// Operands of e4m3 are the same bytes: 128 channels a slab where there were 64, 32 a step where there were 16, at
// the same cycles. So the table holds for them with twice the channels. Their scales are powers of two, and come
// to the sums at the end, in float32.
#pragma once
#include "cuda/causal_conv3d/sm90_params.h"
#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {

struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The shared memory of a block: patches, weights, the finished tile on its way to the output, mbarriers.
template <int M, int N>
struct Sm90Shared {
  static constexpr int kWeightBytes = N * kSlabBytes;
  uint32_t patches, weights, staging, bars;
  int patch_bytes;

  __device__ explicit Sm90Shared(const Sm90Params& p) : patch_bytes(p.patch_bytes) {
    patches = (ptx::smem_base() + 1023) / 1024 * 1024;
    weights = patches + p.patch_stages * p.patch_bytes;
    staging = weights + p.weight_stages * kWeightBytes;
    bars = staging + M * N * 2;
  }
  __device__ uint32_t patch(int stage) const { return patches + stage * patch_bytes; }
  __device__ uint32_t weight(int stage) const { return weights + stage * kWeightBytes; }
  // Full: what TMA brings has come. Empty: all warps that multiply have read it.
  __device__ uint32_t patch_full(int stage) const { return bars + 16 * stage; }
  __device__ uint32_t patch_empty(int stage) const { return bars + 16 * stage + 8; }
  __device__ uint32_t weight_full(int stage) const { return bars + 16 * (kMostPatchStages + stage); }
  __device__ uint32_t weight_empty(int stage) const { return bars + 16 * (kMostPatchStages + stage) + 8; }
  // may be written
  __device__ uint32_t staging_ready() const { return bars + 16 * (kMostPatchStages + kMostWeightStages); }
  // is written
  __device__ uint32_t staged() const { return staging_ready() + 8; }
};

// One tile and one range of K, and how a block finds it. All blocks of a cluster do the same steps on
// neighboring tiles.
struct Sm90Unit {
  int b, t, h, w, n0;  // the first position and channel
  bool exists;
  uint32_t alive;         // bit dt: some block of the cluster reads through time tap dt
  int split, begin, end;  // steps: (time taps that are alive) x slabs

  __device__ Sm90Unit(const Sm90Params& p, int unit, int rank) {
    const int pairs = (p.tiles_m + p.cluster - 1) / p.cluster;
    n0 = unit % p.tiles_n;
    unit /= p.tiles_n;
    split = unit / pairs;
    const int first = unit % pairs * p.cluster;
    place(p, first + rank);
    exists = first + rank < p.tiles_m;
    alive = 1;
    int frames = 1;
    if (p.tile[0] == 1) {
      alive = 0;
      frames = 0;
      for (int r = 0; r < p.cluster; ++r) {
        const int at = frame_of(p, first + r);
        for (int dt = 0; dt < p.source.kernel[0]; ++dt)
          alive |= uint32_t(timeline_index(p.source, at, dt) >= 0) << dt;
      }
      frames = __popc(alive);
    }
    const int steps = frames * p.slabs;
    begin = int(int64_t(steps) * split / p.splits);
    end = int(int64_t(steps) * (split + 1) / p.splits);
  }
  __device__ static int frame_of(const Sm90Params& p, int m) {
    return m / (p.tiles[1] * p.tiles[2]) % p.tiles[0] * p.tile[0];
  }
  __device__ void place(const Sm90Params& p, int m) {
    w = m % p.tiles[2] * p.tile[2];
    m /= p.tiles[2];
    h = m % p.tiles[1] * p.tile[1];
    m /= p.tiles[1];
    t = m % p.tiles[0] * p.tile[0];
    b = m / p.tiles[0];
  }
};

// A walk over a unit's steps.
struct Sm90Step {
  int dt, slab;

  __device__ Sm90Step(const Sm90Unit& u, int slabs, int step) {
    dt = -1;
    for (int skip = step / slabs; skip >= 0; --skip) advance_tap(u.alive);
    slab = step % slabs;
  }
  __device__ void advance_tap(uint32_t alive) {
    do ++dt;
    while (!(alive >> dt & 1) && dt < 31);
  }
  __device__ void advance(const Sm90Unit& u, int slabs) {
    if (++slab == slabs) {
      slab = 0;
      advance_tap(u.alive);
    }
  }
};

// ---- the producers: one thread each -----------------------------------------------------------------------

template <class Shared>
__device__ void load_patches(const Sm90Maps& maps, const Sm90Params& p, const Shared& shared, int rank) {
  Ring ring;
  const Source& s = p.source;
  for (int u = blockIdx.x / p.cluster; u < p.units; u += gridDim.x / p.cluster) {
    const Sm90Unit unit(p, u, rank);
    if (unit.begin == unit.end) continue;
    Sm90Step at(unit, p.slabs, unit.begin);
    for (int step = unit.begin; step < unit.end; ++step) {
      const uint32_t full = shared.patch_full(ring.stage);
      ptx::mbarrier_wait(shared.patch_empty(ring.stage), ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, p.frame_bytes_loaded * p.patch_frames);
      for (int f = 0; f < p.patch_frames; ++f) {
        const int i = p.tile[0] == 1
                          ? timeline_index(s, unit.t, at.dt)
                          : pad_index(unit.t * s.stride[0] - s.pad[0] + f, s.length[0], s.time_mode);
        const bool cached = i >= 0 && i < s.used_cache;
        // -1: out of bounds, so zeros
        int frame = -1;
        if (i >= 0) frame = cached ? s.cached - s.used_cache + i : i - s.used_cache;
        ptx::tma_load(shared.patch(ring.stage) + f * p.frame_rows * kSlabBytes,
                      cached ? &maps.cache : &maps.x, full,
                      {at.slab * p.slab_channels, unit.w * s.stride[2] - s.pad[2],
                       unit.h * s.stride[1] - s.pad[1], frame, unit.b});
      }
      ring.advance(p.patch_stages);
      at.advance(unit, p.slabs);
    }
  }
}

template <int N, class Shared>
__device__ void load_weights(const Sm90Maps& maps, const Sm90Params& p, const Shared& shared, int rank) {
  Ring ring;
  const int taps = p.taps[0] * p.taps[1] * p.taps[2], rows = N / p.cluster;
  for (int u = blockIdx.x / p.cluster; u < p.units; u += gridDim.x / p.cluster) {
    const Sm90Unit unit(p, u, rank);
    if (unit.begin == unit.end) continue;
    Sm90Step at(unit, p.slabs, unit.begin);
    for (int step = unit.begin; step < unit.end; ++step) {
      const int first = p.tile[0] == 1 ? at.dt % p.source.time_taps * taps : 0;
      for (int tap = 0; tap < taps; ++tap) {
        const uint32_t full = shared.weight_full(ring.stage), to = shared.weight(ring.stage);
        const int place[3] = {at.slab * p.slab_channels, first + tap, unit.n0 * N + rank * rows};
        if (p.cluster == 1)
          ptx::mbarrier_wait(shared.weight_empty(ring.stage), ring.parity ^ 1);
        else
          ptx::mbarrier_wait_cluster(shared.weight_empty(ring.stage), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, N * kSlabBytes);
        if (p.cluster == 1)
          ptx::tma_load(to, &maps.weight, full, place);
        else
          ptx::tma_load_multicast(to + rank * rows * kSlabBytes, &maps.weight, full, place, 3);
        ring.advance(p.weight_stages);
      }
      at.advance(unit, p.slabs);
    }
  }
}

template <int M, int N, int Piece, class Shared>
__device__ void store_tiles(const Sm90Maps& maps, const Sm90Params& p, const Shared& shared, int rank) {
  if (p.splits > 1) return;
  uint32_t parity = 0;
  const int rows = p.tile[0] * p.tile[1] * p.tile[2];
  for (int u = blockIdx.x / p.cluster; u < p.units; u += gridDim.x / p.cluster) {
    const Sm90Unit unit(p, u, rank);
    if (!unit.exists) continue;
    const int n0 = unit.n0 * N, pieces = min(N / Piece, (p.outputs - n0 + Piece - 1) / Piece);
    if (p.epilogue.residual) {
      ptx::mbarrier_arrive_expect(shared.staging_ready(), pieces * rows * Piece * 2);
      for (int i = 0; i < pieces; ++i)
        ptx::tma_load(shared.staging + i * M * Piece * 2, &maps.residual, shared.staging_ready(),
                      {n0 + i * Piece, unit.w, unit.h, unit.t, unit.b});
    } else {
      ptx::mbarrier_arrive(shared.staging_ready());
    }
    ptx::mbarrier_wait(shared.staged(), parity);
    for (int i = 0; i < pieces; ++i)
      ptx::tma_store(&maps.out, shared.staging + i * M * Piece * 2,
                     {n0 + i * Piece, unit.w, unit.h, unit.t, unit.b});
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    parity ^= 1;
  }
}

// How many rows of a patch a tap lies after the first; width fastest.
struct TapShift {
  int rows = 0, h = 0, w = 0;

  __device__ void advance(const Sm90Params& p, bool exists) {  // else it stays at the last
    if (!exists) return;
    rows += p.row_step[2];
    if (++w < p.taps[2]) return;
    w = 0;
    rows += p.row_step[1] - p.taps[2] * p.row_step[2];
    if (++h < p.taps[1]) return;
    h = 0;
    rows += p.row_step[0] - p.taps[1] * p.row_step[1];
  }
};

// ---- the warpgroups that multiply -------------------------------------------------------------------------

// Operands are of type In, the bias and the output of type T.
template <class In, class T, int M, int N>
struct Sm90Multiplier {
  static constexpr bool kScaled = std::is_same_v<In, ptx::E4m3>;
  static constexpr int kBlocks = M / 128;  // of 64 rows, in a warpgroup's half of the tile
  static constexpr bool kPipelined = sm90_pipelined(M, N);
  using Shared = Sm90Shared<M, N>;

  const Sm90Params& p;
  const Shared& shared;
  const int thread, lane, warp;  // of the warpgroup
  const int first_row;           // of the tile, of this warp
  int patch_row[kBlocks];        // of a patch: the row that this lane gives to ldmatrix, at the first tap
  Ring patches, weights;
  float acc[kBlocks][N / 2];

  __device__ Sm90Multiplier(const Sm90Params& p, const Shared& shared, int group)
      : p(p), shared(shared), thread(threadIdx.x % 128), lane(threadIdx.x % 32), warp(thread / 32),
        first_row(group * (M / 2) + warp * 16) {
    const Source& s = p.source;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      int t, h, w;
      const bool exists = position(first_row + i * 64 + lane % 16, t, h, w);
      patch_row[i] =
          exists ? t * s.stride[0] * p.frame_rows + h * s.stride[1] * p.patch_width + w * s.stride[2] : 0;
    }
  }

  // Where row r of the tile lies in it; false after the last.
  __device__ bool position(int r, int& t, int& h, int& w) const {
    w = r % p.tile[2];
    r /= p.tile[2];
    h = r % p.tile[1];
    t = r / p.tile[1];
    return t < p.tile[0];
  }

  // To all blocks that share a stage of the weights: this warp has read it.
  __device__ void release_weights(int stage) const {
    if (p.cluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(shared.weight_empty(stage));
    } else if (lane < p.cluster) {
      ptx::mbarrier_arrive_cluster_relaxed(ptx::mapa(shared.weight_empty(stage), lane));
    }
  }

  template <int Steps>
  __device__ void load(uint32_t (&a)[kBlocks][Steps][4], uint32_t patch, int shift, int first) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const uint32_t row = patch + (patch_row[i] + shift) * kSlabBytes,
                     chunk = ((row >> 7 & 7) ^ (lane / 16)) * 16;
#pragma unroll
      for (int k = 0; k < Steps; ++k) ptx::ldmatrix_x4(a[i][k], row + (chunk ^ ((first + k) * 32)));
    }
  }
  template <int Steps>
  __device__ void multiply(const uint32_t (&a)[kBlocks][Steps][4], uint64_t b) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Steps; ++k)
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        if constexpr (kScaled)
          ptx::wgmma_m64k32_e4m3<N>(acc[i], a[i][k], b + 2 * k);
        else
          ptx::wgmma_m64k16<In, N>(acc[i], a[i][k], b + 2 * k);
    ptx::wgmma_commit();
  }

  // The weights of the next tap, as they arrive; and when this warp has read them.
  __device__ uint64_t next_weights() const {
    ptx::mbarrier_wait(shared.weight_full(weights.stage), weights.parity);
    return ptx::wgmma_descriptor<128>(shared.weight(weights.stage));
  }
  __device__ void finish_tap() {
    ptx::wgmma_wait<0>();
    release_weights(weights.stage);
    weights.advance(p.weight_stages);
  }

  // All taps of one patch, of which Steps x 32 bytes of channels count. The tensor cores never run dry between
  // the taps: the next group of products is issued, then the one before is waited for, and while one is under
  // way the registers of the other are loaded anew. So a stage of weights is given up when products of the next
  // tap are under way: there must be two. A group is 256 cycles of the tensor cores: half of a tap where a
  // warpgroup has 128 rows, a whole one where it has 64.
  template <int Steps>
  __device__ void patch() {
    ptx::mbarrier_wait(shared.patch_full(patches.stage), patches.parity);
    const uint32_t patch = shared.patch(patches.stage);
    const int taps = p.taps[0] * p.taps[1] * p.taps[2];
    if constexpr (!kPipelined || (kBlocks == 2 && Steps == 1))
      drained_taps<(Steps + 1) / 2, Steps / 2>(patch, taps);
    else if constexpr (kBlocks == 2)
      half_taps<(Steps + 1) / 2, Steps / 2>(patch, taps);
    else
      whole_taps<Steps>(patch, taps);
    __syncwarp();  // all lanes have read
    if (lane == 0) ptx::mbarrier_arrive(shared.patch_empty(patches.stage));
    patches.advance(p.patch_stages);
  }

  template <int Steps>
  __device__ void whole_taps(uint32_t patch, int taps) {
    uint32_t even[kBlocks][Steps][4], odd[kBlocks][Steps][4];
    TapShift shift;
    load<Steps>(even, patch, shift.rows, 0);
    multiply<Steps>(even, next_weights());
    // The registers of `next` have been read; those of the tap before are still being read.
    auto step = [&](auto& next) {
      shift.advance(p, true);
      load<Steps>(next, patch, shift.rows, 0);
      const int used = weights.stage;
      weights.advance(p.weight_stages);
      multiply<Steps>(next, next_weights());
      ptx::wgmma_wait<1>();
      release_weights(used);
    };
#pragma unroll 1
    for (int tap = 1; tap < taps;) {
      step(odd);
      if (++tap == taps) break;
      step(even);
      ++tap;
    }
    finish_tap();
  }

  template <int First, int Second>
  __device__ void half_taps(uint32_t patch, int taps) {
    uint32_t first[kBlocks][First][4], second[kBlocks][Second][4];
    TapShift shift;
    int used = 0;
    load<First>(first, patch, shift.rows, 0);
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      const uint64_t b = next_weights();
      multiply<First>(first, b);
      ptx::wgmma_wait<1>();
      if (tap > 0) release_weights(used);
      load<Second>(second, patch, shift.rows, First);
      multiply<Second>(second, b + 2 * First);
      ptx::wgmma_wait<1>();
      shift.advance(p, tap + 1 < taps);
      load<First>(first, patch, shift.rows, 0);
      used = weights.stage;
      weights.advance(p.weight_stages);
    }
    ptx::wgmma_wait<0>();
    release_weights(used);
  }

  // Where the sums leave no registers for two groups under way (ptxas would serialize them), or where a tap is a
  // single group: each is waited for before the next. The other warpgroup's products fill the gap.
  template <int First, int Second>
  __device__ void drained_taps(uint32_t patch, int taps) {
    uint32_t first[kBlocks][First][4], second[kBlocks][Second > 0 ? Second : 1][4];
    TapShift shift;
    load<First>(first, patch, shift.rows, 0);
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      const uint64_t b = next_weights();
      multiply<First>(first, b);
      if constexpr (Second > 0) load<Second>(second, patch, shift.rows, First);
      ptx::wgmma_wait<0>();
      if constexpr (Second > 0) multiply<Second>(second, b + 2 * First);
      shift.advance(p, tap + 1 < taps);
      load<First>(first, patch, shift.rows, 0);
      finish_tap();
    }
  }

  // A sum begins as its channel's bias; one of e4m3 products as 0, and its bias comes with its scale.
  __device__ void start(const Sm90Unit& unit) {
    const T* bias = !kScaled && unit.split == 0 ? static_cast<const T*>(p.bias) : nullptr;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = unit.n0 * N + j * 8 + lane % 4 * 2 + e;
        const float value = bias && n < p.outputs ? ptx::to_float(ptx::ld_global(bias + n)) : 0;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) acc[i][j * 4 + e] = acc[i][j * 4 + 2 + e] = value;
      }
  }
  __device__ void scale_sums(int n0, bool biased) {
    const float of_x = ptx::ld_global(p.x_scale);
    const int first = n0 + lane % 4 * 2;
    const float2* scales = reinterpret_cast<const float2*>(p.weight_scale + first);
    const T* biases = biased ? static_cast<const T*>(p.bias) + first : nullptr;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      if (n0 + j * 8 >= p.outputs) break;  // of which there are 8, 16, ...
      const float2 scale = ptx::ld_global(scales + j * 4);
      const float bias[2] = {biases ? ptx::to_float(ptx::ld_global(biases + j * 8)) : 0,
                             biases ? ptx::to_float(ptx::ld_global(biases + j * 8 + 1)) : 0};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          float* d = &acc[i][j * 4 + half];
          d[0] = fmaf(d[0], of_x * scale.x, bias[0]);
          d[1] = fmaf(d[1], of_x * scale.y, bias[1]);
        }
    }
  }

  __device__ static uint32_t pack(float lo, float hi) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 both = __floats2half2_rn(lo, hi);
      memcpy(&bits, &both, 4);
    } else {
      const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
      memcpy(&bits, &both, 4);
    }
    return bits;
  }
  __device__ static float part(uint32_t bits, int i) {
    T both[2];
    memcpy(both, &bits, 4);
    return ptx::to_float(both[i]);
  }

  // The finished tile to shared memory, in boxes of the output; where there is a residual, it lies there
  // already.
  template <int Piece, bool Silu, bool Residual>
  __device__ void stage(int n0) const {
    constexpr int kRow = Piece * 2;
    const float of_sum = p.epilogue.blend ? 1 - p.epilogue.alpha : 1,
                of_residual = p.epilogue.blend ? p.epilogue.alpha : 1;
    auto finished = [&](float v, float residual) {
      if (Silu) v = ptx::silu(v);
      return Residual ? of_residual * residual + of_sum * v : v;
    };
    const int rows = p.tile[0] * p.tile[1] * p.tile[2];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int row = first_row + i * 64 + lane % 16;
      if (row - lane % 16 >= rows) break;  // rows after the last are not stored
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        if (n0 + j * 16 / Piece * Piece >= p.outputs) break;  // boxes that are not stored
        const uint32_t box = shared.staging + j * 16 / Piece * (M * kRow),
                       column = j * 16 % Piece * 2 + lane / 16 * 16;
        uint32_t r[4] = {}, y[4];
        if (Residual) {
          ptx::ldmatrix_x4(r, ptx::swizzled<kRow>(box, min(row, rows - 1), column));
          __syncwarp();
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* d = &acc[i][j * 8 + q * 2];
          y[q] = pack(finished(d[0], part(r[q], 0)), finished(d[1], part(r[q], 1)));
        }
        ptx::stmatrix_x4(ptx::swizzled<kRow>(box, row, column), y);
      }
    }
  }
  template <int Piece>
  __device__ void stage(int n0) const {  // four copies of straight code, so that the plain one is short
    const Epilogue& e = p.epilogue;
    if (e.silu)
      e.residual ? stage<Piece, true, true>(n0) : stage<Piece, true, false>(n0);
    else
      e.residual ? stage<Piece, false, true>(n0) : stage<Piece, false, false>(n0);
  }

  __device__ void store_partial(const Sm90Unit& unit) const {
    const Source& s = p.source;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int t, h, w;
        const bool inside = position(first_row + i * 64 + half * 8 + lane / 4, t, h, w);
        t += unit.t;
        h += unit.h;
        w += unit.w;
        if (!inside || !unit.exists || t >= s.out[0] || h >= s.out[1] || w >= s.out[2]) continue;
        const int64_t m = ((int64_t(unit.b) * s.out[0] + t) * s.out[1] + h) * s.out[2] + w;
        const int n = unit.n0 * N + lane % 4 * 2;
        float* to = p.partial + (unit.split * s.positions + m) * p.partial_stride + n;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
          if (n + j * 8 < p.partial_stride)
            ptx::st_global(reinterpret_cast<float2*>(to + j * 8),
                           make_float2(acc[i][j * 4 + half * 2], acc[i][j * 4 + half * 2 + 1]));
      }
  }
};

template <class In, class T, int M, int N, int Piece>
__device__ void multiply_tiles(const Sm90Params& p, const Sm90Shared<M, N>& shared, int group, int rank) {
  Sm90Multiplier<In, T, M, N> x(p, shared, group);
  uint32_t parity = 0;
  for (int u = blockIdx.x / p.cluster; u < p.units; u += gridDim.x / p.cluster) {
    const Sm90Unit unit(p, u, rank);
    x.start(unit);
    int slab = unit.begin % p.slabs;
    for (int step = unit.begin; step < unit.end; ++step) {
      const int steps = slab + 1 == p.slabs ? p.last_steps : 4;
      if (steps == 4)
        x.template patch<4>();
      else if (steps == 3)
        x.template patch<3>();
      else if (steps == 2)
        x.template patch<2>();
      else
        x.template patch<1>();
      if (++slab == p.slabs) slab = 0;
    }
    if constexpr (Sm90Multiplier<In, T, M, N>::kScaled) x.scale_sums(unit.n0 * N, p.bias && unit.split == 0);
    if (p.splits > 1) {
      x.store_partial(unit);
    } else if (unit.exists) {
      ptx::mbarrier_wait(shared.staging_ready(), parity);
      x.template stage<Piece>(unit.n0 * N);
      ptx::fence_proxy_async();
      __syncwarp();
      if (x.lane == 0) ptx::mbarrier_arrive(shared.staged());
      parity ^= 1;
    }
  }
}

template <int N>
// channels of a row of a box of the output
constexpr int kPieceOf = N % 64 == 0   ? 64
                         : N % 32 == 0 ? 32
                                       : 16;

template <class In, class T, int M, int N>
__global__ void __launch_bounds__(kSm90Threads, 1)
    conv_sm90_kernel(const __grid_constant__ Sm90Maps maps, const __grid_constant__ Sm90Params p) {
  const Sm90Shared<M, N> shared(p);
  const int rank = p.cluster == 1 ? 0 : ptx::cluster_rank(), group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&maps.x);
    ptx::prefetch_tensor_map(&maps.weight);
    ptx::prefetch_tensor_map(&maps.out);
    for (int i = 0; i < p.patch_stages; ++i) {
      ptx::mbarrier_init(shared.patch_full(i), 1);
      ptx::mbarrier_init(shared.patch_empty(i), 8);
    }
    for (int i = 0; i < p.weight_stages; ++i) {
      ptx::mbarrier_init(shared.weight_full(i), 1);
      ptx::mbarrier_init(shared.weight_empty(i), 8 * p.cluster);
    }
    ptx::mbarrier_init(shared.staging_ready(), 1);
    ptx::mbarrier_init(shared.staged(), 8);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (p.cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (group == 0) {
    ptx::setmaxnreg_dec<56>();
    if (threadIdx.x == 0)
      load_patches(maps, p, shared, rank);
    else if (threadIdx.x == 32)
      load_weights<N>(maps, p, shared, rank);
    else if (threadIdx.x == 64)
      store_tiles<M, N, kPieceOf<N>>(maps, p, shared, rank);
  } else {
    ptx::setmaxnreg_inc<224>();
    multiply_tiles<In, T, M, N, kPieceOf<N>>(p, shared, group - 1, rank);
  }
  if (p.cluster > 1) {  // a block stays until no other writes to its shared memory any more
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <class In, class T, int M, int N>
constexpr Sm90Variant sm90_variant() {
  return {M, N, kPieceOf<N>, conv_sm90_kernel<In, T, M, N>};
}

template <class In, class T>
Sm90Variants sm90_variants_of() {
  static const Sm90Variant all[] = {sm90_variant<In, T, 256, 160>(), sm90_variant<In, T, 256, 128>(),
                                    sm90_variant<In, T, 256, 96>(),  sm90_variant<In, T, 128, 144>(),
                                    sm90_variant<In, T, 128, 128>(), sm90_variant<In, T, 128, 112>(),
                                    sm90_variant<In, T, 128, 96>(),  sm90_variant<In, T, 128, 64>()};
  return {all, int(std::size(all))};
}

}  // namespace vtok::cuda
