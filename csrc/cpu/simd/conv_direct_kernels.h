// The two micro-kernels of the direct convolution and their blocking.
#pragma once
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {

// A tile of kRows pixels x kVectors vectors of output channels stays in registers: 28 of 32 (AVX-512), 12 of
// 16 elsewhere.
#if defined(__AVX512F__) && VTOK_LANES == 16
constexpr int kRows = 14, kVectors = 2, kTileGroups = 8;
#elif VTOK_LANES == 16
constexpr int kRows = 6, kVectors = 1, kTileGroups = 18;
#else
constexpr int kRows = 6, kVectors = 2, kTileGroups = 18;
#endif
constexpr int kPanel = kVectors * kLanes;
constexpr int kTileRows = kRows * kTileGroups;
constexpr int kDepth = 256;  // inner dimension of one block: its weights of a panel stay in L1
// not a power of two, or all rows would fall into the same cache sets
constexpr int kDepthStride = kDepth + 16;

// How a block of gathered input is stored. The strides are constants, so that one pointer addresses all rows
// of a tile.
struct RowMajor {  // [pixel][inner]
  static constexpr int row = kDepthStride, inner = 1;
};
struct InnerMajor {  // [inner][pixel]: where pixels, not channels, are adjacent in memory
  static constexpr int row = 1, inner = kTileRows;
};

// c[Rows][kPanel] (+)= a[Rows][depth] * b[depth][Vectors * kLanes]
template <class Layout, int Rows, int Vectors>
static void multiply(const float* a, const float* b, int64_t depth, float* c, bool accumulate) {
  vfloat sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[r][v] = accumulate ? load(c + r * kPanel + v * kLanes) : vfloat{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vfloat weights[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) weights[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vfloat x = broadcast(a[r * Layout::row]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = fma(x, weights[v], sum[r][v]);
    }
    a += Layout::inner;
    b += Vectors * kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(c + r * kPanel + v * kLanes, sum[r][v]);
}

typedef void (*Multiply)(const float*, const float*, int64_t, float*, bool);

template <class Layout, int Vectors, int Rows = 1>
static Multiply multiply_of(int rows) {
  if constexpr (Rows < kRows) {
    if (rows > Rows) return multiply_of<Layout, Vectors, Rows + 1>(rows);
  }
  return multiply<Layout, Rows, Vectors>;
}

// Few output channels: the inner dimension goes along the lanes, so that no lane is wasted and the input
// needs no gathering.
constexpr int kFewOutputs = kLanes / 2;
constexpr int dot_rows(int outputs) {
#if defined(__AVX512F__) && VTOK_LANES == 16
  return outputs <= 3 ? 8 : 24 / outputs;
#else
  return outputs <= 1 ? 8 : 12 / outputs;
#endif
}

// c[Rows][Outputs] vectors of partial sums += sum over segments s of rows[s * Rows + r][vectors] *
// b[s][vectors][Outputs]
template <int Outputs>
static void dot(const float* const* rows, int64_t segments, int64_t vectors, const float* b, float* c) {
  constexpr int Rows = dot_rows(Outputs);
  vfloat sum[Rows][Outputs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) sum[r][o] = load(c + (r * Outputs + o) * kLanes);
  for (int64_t s = 0; s < segments; ++s, rows += Rows) {
    const float* x[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) x[r] = rows[r];
    for (int64_t k = 0; k < vectors * kLanes; k += kLanes) {
      vfloat weights[Outputs];
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) weights[o] = load(b + o * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const vfloat value = load(x[r] + k);
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; ++o) sum[r][o] = fma(value, weights[o], sum[r][o]);
      }
      b += Outputs * kLanes;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) store(c + (r * Outputs + o) * kLanes, sum[r][o]);
}

typedef void (*Dot)(const float* const*, int64_t, int64_t, const float*, float*);

template <int Outputs = 1>
static Dot dot_of(int outputs) {
  if constexpr (Outputs < kFewOutputs) {
    if (outputs > Outputs) return dot_of<Outputs + 1>(outputs);
  }
  return dot<Outputs>;
}

// Transposes m in place: kLanes vectors of kLanes. Each round is a perfect shuffle of the kLanes^2 elements.
VTOK_INLINE void transpose(vfloat* m) {
  vint low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i & 1) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vfloat next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = shuffle(m[i], m[i + kLanes / 2], low);
      next[2 * i + 1] = shuffle(m[i], m[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) m[i] = next[i];
  }
}

}  // namespace vtok::cpu::VTOK_ISA
