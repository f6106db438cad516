// The matrix products inside the convolution kernels. A warp owns a tile of (16 MI) x (8 NI) float32
// accumulators in the layout of mma.sync: acc[i][j][e] is row 16i + lane/4 + 8(e/2), column 8j + 2(lane%4) +
// e%2.
//
// Forward and dgrad: both operands lie in shared memory with K contiguous, in rows of 64 bytes (32 half, 16
// float), four 16-byte chunks each; chunk c of row r is kept at chunk c ^ (r/2 % 4), so that ldmatrix's eight
// rows and cp.async's stores touch all banks. wgrad: K (positions) is the slow axis, rows are Cols elements
// of M or N; chunk c of row k is kept at chunk c ^ (k % 8).
#pragma once

#include "cuda/ptx.cuh"

namespace vtok::cuda {

constexpr int kRowBytes = 64;

__device__ inline uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

template <int Cols, class T>
__device__ inline uint32_t swizzled_column(int k, int column) {  // byte offset of an element of wgrad's tiles
  constexpr int kPerChunk = 16 / sizeof(T);
  return k * int(Cols * sizeof(T)) + (((column / kPerChunk) ^ (k & 7)) << 4) +
         column % kPerChunk * int(sizeof(T));
}

// Moves the sums so far to `total`. Float32 results sum K in two levels, so that rounding grows with K^(1/4),
// not K^(1/2).
template <int MI, int NI>
__device__ inline void flush(float (&total)[MI][NI][4], float (&acc)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[i][j][e] += acc[i][j][e];
        acc[i][j][e] = 0;
      }
}

// ---- on the matrix units ----------------------------------------------------------------------------------

template <class T, bool Tf32>
struct MatrixUnit {
  using Type = T;
  static constexpr bool kTwoLevels = false;      // the operands' rounding is far larger
  static constexpr int kDepth = 32 / sizeof(T);  // K of one mma

  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (Tf32)
      ptx::mma_m16n8k8_tf32(d, a, b);
    else
      ptx::mma_m16n8k16<T>(d, a, b);
  }
  template <int N>
  // a tf32 operand must be rounded, the instruction would truncate it
  __device__ static void round(uint32_t (&r)[N]) {
    if constexpr (Tf32)
      for (int i = 0; i < N; ++i) r[i] = ptx::to_tf32(__uint_as_float(r[i]));
  }

  // acc += A B^T over one slice of 64 bytes of K; a and b are the shared addresses of the warp's first rows
  // (multiples of 8 rows). Between the products, meanwhile() is called.
  template <int MI, int NI, class Meanwhile>
  __device__ static void multiply(float (&acc)[MI][NI][4], uint32_t a, uint32_t b, int lane,
                                  Meanwhile&& meanwhile) {
    const uint32_t a_lane = a + swizzled(lane % 16, lane / 16),
                   b_lane = b + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    // two chunks of K each; in the swizzle a step of two chunks is bit 5
    for (int step = 0; step < 2; ++step) {
      uint32_t fa[MI][4], fb[NI / 2][4];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        ptx::ldmatrix_x4(fa[i], (a_lane ^ (step * 32)) + i * 16 * kRowBytes);
        round(fa[i]);
      }
#pragma unroll
      for (int j = 0; j < NI / 2; ++j) {
        ptx::ldmatrix_x4(fb[j], (b_lane ^ (step * 32)) + j * 16 * kRowBytes);
        round(fb[j]);
      }
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NI; ++j) {
          const uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma(acc[i][j], fa[i], pair);
        }
      if (step == 0) meanwhile();
    }
  }

  // wgrad's fragments of K rows k0 to k0 + kDepth - 1, from tiles of Cols columns.
  template <int Cols, int MI>
  __device__ static void load_a(uint32_t (&fa)[MI][4], uint32_t tile, int k0, int m0, int lane) {
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      const int m = m0 + i * 16;
      if constexpr (sizeof(T) == 2) {
        ptx::ldmatrix_x4_trans(
            fa[i], tile + swizzled_column<Cols, T>(k0 + lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8));
      } else {
        for (int e = 0; e < 4; ++e)
          fa[i][e] = ptx::ld_shared<uint32_t>(
              tile + swizzled_column<Cols, T>(k0 + lane % 4 + e / 2 * 4, m + lane / 4 + e % 2 * 8));
        round(fa[i]);
      }
    }
  }
  template <int Cols, int NI>
  __device__ static void load_b(uint32_t (&fb)[NI][2], uint32_t tile, int k0, int n0, int lane) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int j = 0; j < NI; j += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r,
                               tile + swizzled_column<Cols, T>(k0 + lane % 16, n0 + j * 8 + lane / 16 * 8));
        fb[j][0] = r[0];
        fb[j][1] = r[1];
        fb[j + 1][0] = r[2];
        fb[j + 1][1] = r[3];
      }
    } else {
#pragma unroll
      for (int j = 0; j < NI; ++j) {
        for (int e = 0; e < 2; ++e)
          fb[j][e] = ptx::ld_shared<uint32_t>(
              tile + swizzled_column<Cols, T>(k0 + lane % 4 + e * 4, n0 + j * 8 + lane / 4));
        round(fb[j]);
      }
    }
  }

  // acc += A^T B over K rows of two tiles; and bias += A^T 1 for sixteen rows of M, number `strip` of the
  // warp's (-1 for none), a product with a fragment of ones that needs no load.
  template <int Rows, int ColsA, int ColsB, int MI, int NI>
  __device__ static void multiply_transposed(float (&acc)[MI][NI][4], float (&bias)[4], int strip, uint32_t a,
                                             uint32_t b, int m0, int n0, int lane) {
#pragma unroll
    for (int k0 = 0; k0 < Rows; k0 += kDepth) {
      uint32_t fa[MI][4], fb[NI][2];
      load_a<ColsA>(fa, a, k0, m0, lane);
      load_b<ColsB>(fb, b, k0, n0, lane);
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NI; ++j) mma(acc[i][j], fa[i], fb[j]);
      const uint32_t one = sizeof(T) == 4              ? 0x3f800000u
                           : std::is_same_v<T, __half> ? 0x3c003c00u
                                                       : 0x3f803f80u;
      const uint32_t ones[2] = {one, one};
#pragma unroll
      for (int i = 0; i < MI; ++i)
        if (i == strip) mma(bias, fa[i], ones);
    }
  }
};

// ---- in float32, with plain multiply-adds by the same owners ----------------------------------------------

struct MultiplyAdd {
  using Type = float;
  static constexpr bool kTwoLevels = true;

  template <int MI, int NI, class Meanwhile>
  __device__ static void multiply(float (&acc)[MI][NI][4], uint32_t a, uint32_t b, int lane,
                                  Meanwhile&& meanwhile) {
    meanwhile();
#pragma unroll 1
    for (int chunk = 0; chunk < 4; ++chunk) {
      float4 fa[MI * 2];
#pragma unroll
      for (int i = 0; i < MI * 2; ++i) fa[i] = ptx::ld_shared<float4>(a + swizzled(i * 8 + lane / 4, chunk));
#pragma unroll
      for (int j = 0; j < NI * 2; ++j) {
        const float4 fb = ptx::ld_shared<float4>(b + swizzled(j / 2 * 8 + lane % 4 * 2 + j % 2, chunk));
#pragma unroll
        for (int i = 0; i < MI * 2; ++i) {
          float& d = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
          d = fmaf(fa[i].x, fb.x, d);
          d = fmaf(fa[i].y, fb.y, d);
          d = fmaf(fa[i].z, fb.z, d);
          d = fmaf(fa[i].w, fb.w, d);
        }
      }
    }
  }

  template <int Rows, int ColsA, int ColsB, int MI, int NI>
  __device__ static void multiply_transposed(float (&acc)[MI][NI][4], float (&bias)[4], int strip, uint32_t a,
                                             uint32_t b, int m0, int n0, int lane) {
#pragma unroll 2
    for (int k = 0; k < Rows; ++k) {
      float fa[MI * 2];
#pragma unroll
      for (int i = 0; i < MI * 2; ++i)
        fa[i] = ptx::ld_shared<float>(a + swizzled_column<ColsA, float>(k, m0 + i * 8 + lane / 4));
#pragma unroll
      for (int j = 0; j < NI; ++j) {
        const float2 fb =
            ptx::ld_shared<float2>(b + swizzled_column<ColsB, float>(k, n0 + j * 8 + lane % 4 * 2));
#pragma unroll
        for (int i = 0; i < MI * 2; ++i) {
          float (&d)[4] = acc[i / 2][j];
          d[i % 2 * 2] = fmaf(fa[i], fb.x, d[i % 2 * 2]);
          d[i % 2 * 2 + 1] = fmaf(fa[i], fb.y, d[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < MI * 2; ++i)
        if (i / 2 == strip) bias[i % 2 * 2] += fa[i];
    }
  }
};

}  // namespace vtok::cuda
