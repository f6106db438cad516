// What the Winograd kernels of one instance share: the shape of the micro-kernel, and the one-dimensional
// transforms of F(m, 3), which the two-dimensional ones apply to columns, then to rows. T is any vector type.
#pragma once
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {

// Rows and vectors of the matrix micro-kernel: as many accumulators as the register file holds beside one row
// of U and one value of V. A panel is the output channels of one micro-kernel.
#if defined(__AVX512F__)
constexpr int kRows = 14, kVectors = 2;
#elif VTOK_LANES == 16
constexpr int kRows = 6, kVectors = 1;  // one vector is two registers
#else
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int kPanel = kVectors * kLanes;

template <int M>
struct Tile;

template <>
struct Tile<2> {  // points 0, 1, -1, infinity
  template <class T>
  VTOK_INLINE void input(const T* d, T* v) {
    v[0] = d[0] - d[2];
    v[1] = d[2] + d[1];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  template <class T>
  VTOK_INLINE void weight(const T* g, T* u) {
    T even = (g[0] + g[2]) * 0.5, odd = g[1] * 0.5;
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  template <class T>
  VTOK_INLINE void output(const T* m, T* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Tile<4> {  // points 0, +-a, +-b, infinity with a = sqrt(1/2), b = sqrt(2)
  // Every fma by name: which ones the compiler contracts would depend on what stands around.
  VTOK_INLINE void input(const vfloat* d, vfloat* v) {
    const vfloat a = broadcast(0.70710678118654752f), b = broadcast(1.4142135623730951f);
    const vfloat half = broadcast(-0.5f), two = broadcast(-2.0f), five_halves = broadcast(-2.5f);
    const vfloat even_a = fma(d[2], two, d[4]), odd_a = fma(d[1], two, d[3]);
    const vfloat even_b = fma(d[2], half, d[4]), odd_b = fma(d[1], half, d[3]);
    v[0] = fma(d[2], five_halves, d[0] + d[4]);
    v[1] = fma(odd_a, a, even_a);
    v[2] = fma(odd_a, -a, even_a);
    v[3] = fma(odd_b, b, even_b);
    v[4] = fma(odd_b, -b, even_b);
    v[5] = fma(d[3], five_halves, d[1] + d[5]);
  }
  template <class T>
  // divided by the products of the points' differences: 1, -3/2, 6, 1
  VTOK_INLINE void weight(const T* g, T* u) {
    constexpr double a = 0.70710678118654752440, b = 1.41421356237309504880;
    T even_a = (g[0] + g[2] * 0.5) * (-2.0 / 3), odd_a = g[1] * (a * -2.0 / 3);
    T even_b = (g[0] + g[2] * 2.0) * (1.0 / 6), odd_b = g[1] * (b / 6);
    u[0] = g[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  template <class T>
  VTOK_INLINE void output(const T* m, T* y) {
    constexpr float a = 0.70710678118654752f, b = 1.4142135623730951f;
    T sum_a = m[1] + m[2], difference_a = (m[1] - m[2]) * a;
    T sum_b = m[3] + m[4], difference_b = (m[3] - m[4]) * b;
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = difference_a + difference_b;
    y[2] = sum_a * 0.5f + sum_b * 2.0f;
    y[3] = m[5] + (difference_a * 0.5f + difference_b * 2.0f);
  }
};

}  // namespace vtok::cpu::VTOK_ISA
