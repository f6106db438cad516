// Winograd convolution F(m x m, 3 x 3), m = 2 or 4, for planes of 3x3 taps at stride 1; temporal taps are
// summed in the transform domain, so that a frame is transformed once however many output frames read it.
//
// With the tile size n = m + 2 and one of its n*n transform points called xi:
//   V[xi][row][c]     = (B^T d B)[xi] of one input tile d;      a row is (slot of a source frame, tile of the
//   block) U[xi][c][o]       = (G g G^T)[xi] of one 3x3 filter g;      one set for each set of temporal taps
//   ("variant") acc[xi][row][o]   = sum over the terms of an output frame of V * U;   a row is (output frame
//   of the group, tile) y                 = A^T acc A, then the epilogue
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). The interpolation points of m
// = 4 are 0, +-sqrt(1/2), +-sqrt(2) and infinity: their error is half that of 0, +-1, +-2 and infinity.
//
// A tile's sums cancel in the inverse transform: what one pixel holds rounds all outputs of the tile, whether they
// read it or not, and a NaN is in all of them. So winograd_input() finds tiles with a value that is not finite, and
// tiles that stand out and whose energy is more than kContrast squared times that of the nine pixels of some output;
// winograd_output() finds what overflows and what weights spoil. The caller computes those tiles directly.
//
// Work is cut into blocks of tiles; within one, frames pass in groups. V of a block keeps its frames in a
// ring of slots.
#pragma once
#include "cpu/conv_plan.h"
#include "cpu/isa.h"

namespace vtok::cpu {

// At most so many channels are summed in registers before they are added to acc: short sums round less, and a
// chunk of U stays in the first cache while all rows pass.
constexpr int kWinogradChunk = 128;

// Channels are cut into equal chunks; V holds one after the other, so that the rows of a micro-kernel lie in
// one piece.
inline int64_t winograd_chunks(int64_t channels) { return (channels + kWinogradChunk - 1) / kWinogradChunk; }
inline int64_t winograd_chunk(int64_t channels) {
  const int64_t chunks = winograd_chunks(channels);
  return ((channels + chunks - 1) / chunks + 15) / 16 * 16;
}

constexpr float kContrast = 8;

// A build with VTOK_WINOGRAD_UNCHECKED looks for no such tiles, to measure what that costs
// (scripts/compare_builds.py).
#ifdef VTOK_WINOGRAD_UNCHECKED
constexpr bool kWinogradChecked = false;
#else
constexpr bool kWinogradChecked = true;
#endif

struct WinogradTerm {
  int32_t slot, variant;
};

// Consecutive output frames whose terms have the same variants and, term by term, consecutive slots: one tall
// matrix product.
struct WinogradRun {
  int32_t frame, frames;  // within the group
  int32_t term, terms;    // terms of the first frame
};

struct WinogradBlock {
  const ConvProblem* problem;
  const ConvPlan* plan;
  const float* bias;  // float32 or null
  const void* zeros;  // `channels` zeros in the type of x
  int m;
  int64_t tiles_w;             // tiles in a row of the plane
  int64_t batch, tile, tiles;  // the block: tiles [tile, tile + tiles) in raster order
  int64_t frame, frames;       // the group of output frames
  const WinogradRun* runs;
  int n_runs;
  const WinogradTerm* terms;
  int64_t all_tiles;  // of a plane
  uint8_t* broken;    // [To][all_tiles] of the batch item: 1 where sums are not finite, or almost
  float* v;           // [xi][chunk][row][pitch]
  // floats from row to row, chunk to chunk, xi to xi; pitch = winograd_chunk(channels)
  int64_t pitch, chunk_stride, v_stride;
};

// Transformed weights of one panel (winograd_panel() output channels): U[variant][xi][c - c_begin][o].
struct WinogradPanel {
  const float* const* u;   // [variant]
  int64_t u_stride;        // floats from xi to xi
  int64_t c_begin, c_end;  // whole chunks
  int variant;             // only the terms of this one, or -1 for all
  bool add;                // add to acc, or overwrite it
};

// Floats from xi to xi of one panel's acc: an odd number of cache lines, so that the points do not share a
// set.
inline int64_t winograd_acc_stride(int64_t rows, int panel) { return rows * panel + 16; }

}  // namespace vtok::cpu

VTOK_DECLARE(int winograd_panel())
VTOK_DECLARE(int winograd_kernel_rows())
VTOK_DECLARE(void winograd_bias(const Tensor& bias, float* to))  // to float32
// Transforms tiles [begin, end) of the block, of one source frame, into its slot of V. uneven[tile of the plane]
// becomes 1 where it must not be used.
VTOK_DECLARE(void winograd_input(const WinogradBlock& block, int64_t frame, bool from_cache, int slot,
                                 int64_t begin, int64_t end, uint8_t* uneven))
// acc = V * U for one panel and all xi.
VTOK_DECLARE(void winograd_gemm(const WinogradBlock& block, const WinogradPanel& panel, float* acc))
// Inverse transform of one panel's acc, epilogue, and the stores to the output.
VTOK_DECLARE(void winograd_output(const WinogradBlock& block, int64_t panel, const float* acc))
// U[xi][c - c_begin][o] of one panel, of the temporal taps in `taps` summed, computed in double.
VTOK_DECLARE(void winograd_weights(const Tensor& weight, int m, uint64_t taps, int64_t panel, int64_t c_begin,
                                   int64_t c_end, float* u, int64_t u_stride))
// 128 bits that change with any single word of the `bytes` bytes at data, and with all else but a 2^-64
// chance.
VTOK_DECLARE(void checksum(const void* data, int64_t bytes, uint64_t sum[2]))
