// The matrix products of Winograd convolution: acc[xi] += V[xi] * U[xi], a rows x (vectors * kLanes)
// micro-kernel over unpacked rows of V and packed panels of U.
#include "cpu/simd/conv_winograd.h"
#include "cpu/simd/conv_winograd_tile.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

constexpr int kMaxPieces = 16;

struct Piece {  // k channels of one term
  const float *a, *u;
  int64_t k;
};

// What the next micro-kernel or the next chunk will read; touched line by line, one line in each step over k.
struct Ahead {
  const float *a, *u0, *u1;
};

template <int R>
VTOK_INLINE void multiply(const Piece* pieces, int n, int64_t row, int64_t pitch, Ahead ahead, float* acc,
                          bool add) {
  vfloat c[R][kVectors] = {};
  for (int p = 0; p < n; ++p) {
    // Every third row has its pointer; the two behind it are reached by the pitch as an index register. Left
    // alone, gcc computes an address per row, spills them and halves the speed, hence the barrier.
    constexpr int kBases = (R + 2) / 3;
    const float* base[kBases];
    for (int i = 0; i < kBases; ++i) base[i] = pieces[p].a + (row + 3 * i) * pitch;
    const float *u = pieces[p].u, *end = u + pieces[p].k * kPanel;
    while (u != end) {
#pragma GCC unroll 8
      for (int i = 0; i < kBases; ++i) asm("" : "+r"(base[i]));
      __builtin_prefetch(ahead.a, 0, 3);
      __builtin_prefetch(ahead.u0, 0, 2);
      __builtin_prefetch(ahead.u1, 0, 2);
      vfloat b[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) b[j] = load(u + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        vfloat a = broadcast(base[r / 3][r % 3 * pitch]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) c[r][j] = fma(a, b[j], c[r][j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBases; ++i) ++base[i];
      u += kPanel;
      ahead.a += 16;
      ahead.u0 += 16;
      ahead.u1 += 16;
    }
  }
  acc += row * kPanel;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* at = acc + r * kPanel + j * kLanes;
      store(at, add ? c[r][j] + load(at) : c[r][j]);
    }
}

template <int R>
void multiply_rows(int rows, const Piece* pieces, int n, int64_t row, int64_t pitch, const Ahead& ahead,
                   float* acc, bool add) {
  if (rows == R) return multiply<R>(pieces, n, row, pitch, ahead, acc, add);
  if constexpr (R > 1) multiply_rows<R - 1>(rows, pieces, n, row, pitch, ahead, acc, add);
}

// All rows of a run, in micro-kernels of nearly equal height. `next` is the piece that follows.
void multiply_run(int64_t rows, const Piece* pieces, int n, const Piece& next, int64_t pitch, float* acc,
                  bool add) {
  const int64_t groups = (rows + kRows - 1) / kRows, half = next.k * kPanel / 2;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int height = int(rows / groups + (g < rows % groups));
    // The last micro-kernel fetches the next chunk's first rows; the first ones fetch its U.
    const Ahead ahead = {g + 1 < groups ? pieces[0].a + (row + height) * pitch : next.a,
                         next.u + (g > 0 ? half : 0), next.u + (g > 0 || groups == 1 ? half : 0)};
    multiply_rows<kRows>(height, pieces, n, row, pitch, ahead, acc, add);
    row += height;
  }
}

}  // namespace

int winograd_panel() { return kPanel; }
int winograd_kernel_rows() { return kRows; }

void winograd_gemm(const WinogradBlock& b, const WinogradPanel& w, float* acc) {
  const int points = (b.m + 2) * (b.m + 2);
  const int64_t acc_stride = winograd_acc_stride(b.frames * b.tiles, kPanel);
  for (int xi = 0; xi < points; ++xi)
    for (int i = 0; i < b.n_runs; ++i) {
      const WinogradRun& run = b.runs[i];
      const int64_t rows = run.frames * b.tiles;
      float* at = acc + xi * acc_stride + run.frame * b.tiles * kPanel;
      bool add = w.add;
      Piece pieces[kMaxPieces], first{};
      int n = 0;
      int64_t depth = 0;
      for (int t = run.term; t < run.term + run.terms; ++t) {
        if (w.variant >= 0 && b.terms[t].variant != w.variant) continue;
        const float* u = w.u[b.terms[t].variant] + xi * w.u_stride;
        const float* v = b.v + xi * b.v_stride + b.terms[t].slot * b.tiles * b.pitch;
        for (int64_t c = w.c_begin; c < w.c_end; c += b.pitch) {
          const int64_t k = w.c_end - c < b.pitch ? w.c_end - c : b.pitch;
          const Piece piece = {v + c / b.pitch * b.chunk_stride, u + (c - w.c_begin) * kPanel, k};
          if (!first.a) first = piece;
          if (n == kMaxPieces || (n && depth + k > kWinogradChunk)) {
            multiply_run(rows, pieces, n, piece, b.pitch, at, add);
            add = true;
            n = 0;
            depth = 0;
          }
          pieces[n++] = piece;
          depth += k;
        }
      }
      first.a += b.v_stride;
      first.u += w.u_stride;  // the same run at the next point
      if (n)
        multiply_run(rows, pieces, n, first, b.pitch, at, add);
      else if (!add)
        memset(at, 0, rows * kPanel * sizeof *at);  // a frame without terms
    }
}

}  // namespace vtok::cpu::VTOK_ISA
