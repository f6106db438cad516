// A vector of VTOK_LANES floats, written once over the compiler's vector extension. Every kernel file is
// compiled once per instruction set with VTOK_ISA (its namespace) and VTOK_LANES set, and one instance is
// chosen at run time:
//   portable 4 lanes, no flags | avx2 8 lanes | wide 16 lanes on AVX2 (so the 16-lane code runs on any AVX2
//   machine) | avx512 16 lanes
// Such files use no std:: templates: an inline function of the library compiled for AVX-512 could be the copy
// that the linker keeps for all, and would then run on a machine without it.
#pragma once
#include <cstdint>
#include <cstring>

#include "tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VTOK_INLINE static inline __attribute__((always_inline))
#define VTOK_INLINE_MEMBER inline __attribute__((always_inline))

namespace vtok::cpu::VTOK_ISA {

constexpr int kLanes = VTOK_LANES;

typedef float vfloat __attribute__((vector_size(4 * VTOK_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * VTOK_LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * VTOK_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * VTOK_LANES)));

VTOK_INLINE vfloat broadcast(float v) { return v - vfloat{}; }
VTOK_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
VTOK_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
// Past the caches, to an address that is a multiple of the vector's size. Other threads see it after
// stream_fence().
VTOK_INLINE void stream(float* p, vfloat v) {
#if defined(__AVX512F__) && VTOK_LANES == 16
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__) && VTOK_LANES == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  memcpy(p, &v, sizeof v);
#endif
}
VTOK_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
VTOK_INLINE vfloat load_n(const float* p, int n) {  // the first n lanes, then zeros
  vfloat v = {};
  memcpy(&v, p, 4 * n);
  return v;
}
VTOK_INLINE void store_n(float* p, vfloat v, int n) { memcpy(p, &v, 4 * n); }

VTOK_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__) && VTOK_LANES == 16
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && VTOK_LANES == 8
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The lanes of a, or of a and b concatenated, that index names. (clang's own builtin takes only
// constants.)
template <class V, class I>
VTOK_INLINE V shuffle(V a, V b, I index) {
#if defined(__clang__)
  constexpr int n = sizeof(I) / 4;
  V r;
  for (int i = 0; i < n; ++i) r[i] = index[i] < n ? a[index[i]] : b[index[i] - n];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}
template <class V, class I>
VTOK_INLINE V shuffle(V a, I index) {
#if defined(__clang__)
  return shuffle(a, a, index);
#else
  return __builtin_shuffle(a, index);
#endif
}

VTOK_INLINE float sum(vfloat v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// Sum over the lanes as a tree: log2(kLanes) shuffles instead of kLanes dependent additions.
VTOK_INLINE float tree_sum(vfloat v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
    vint rotated;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rotated[i] = (i + half) % kLanes;
    v += shuffle(v, rotated);
  }
  return v[0];
}

// 16-bit formats. Everything is computed in float32; only loads and stores know them.
VTOK_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // inf, nan
  } else {
    bits = magnitude << 13;  // the value times 2^-112, subnormals included
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

VTOK_INLINE uint16_t float_to_half(float f) {  // round to nearest even
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to inf
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at the right bit
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;
    memcpy(&magnitude, &m, 4);
    return uint16_t(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + (magnitude >> 13 & 1u);
  return uint16_t(sign | magnitude >> 13);
#endif
}

VTOK_INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

VTOK_INLINE uint16_t float_to_bf16(float f) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Element types as tags: value type, scalar and vector access. F32, F16 and BF16 share one spelling in the
// kernels.
struct F32 {
  typedef float type;
  VTOK_INLINE float get(const type* p) { return *p; }
  VTOK_INLINE void put(type* p, float v) { *p = v; }
  VTOK_INLINE vfloat load(const type* p) { return VTOK_ISA::load(p); }
  VTOK_INLINE void store(type* p, vfloat v) { VTOK_ISA::store(p, v); }
};

struct F16 {
  typedef uint16_t type;
  VTOK_INLINE float get(const type* p) { return half_to_float(*p); }
  VTOK_INLINE void put(type* p, float v) { *p = float_to_half(v); }
  VTOK_INLINE vfloat load(const type* p) {
#if defined(__AVX512F__) && VTOK_LANES == 16
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && VTOK_LANES == 8
    return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vfloat v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  VTOK_INLINE void store(type* p, vfloat v) {
#if defined(__AVX512F__) && VTOK_LANES == 16
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && VTOK_LANES == 8
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
  }
};

struct BF16 {
  typedef uint16_t type;
  VTOK_INLINE float get(const type* p) { return bf16_to_float(*p); }
  VTOK_INLINE void put(type* p, float v) { *p = float_to_bf16(v); }
  VTOK_INLINE vfloat load(const type* p) {
    vhalf h;
    memcpy(&h, p, sizeof h);
    return (vfloat)(__builtin_convertvector(h, vuint) << 16);
  }
  VTOK_INLINE void store(type* p, vfloat v) {
    vuint bits = (vuint)v;
    vuint rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    vuint nan = bits >> 16 | 0x40u;
    vint is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    vhalf h = __builtin_convertvector(is_nan ? nan : rounded, vhalf);
    memcpy(p, &h, sizeof h);
  }
};

template <class E>
VTOK_INLINE vfloat load_n(const typename E::type* p, int n) {
  typename E::type whole[kLanes] = {};
  memcpy(whole, p, n * sizeof *whole);
  return E::load(whole);
}
template <class E>
VTOK_INLINE void store_n(typename E::type* p, vfloat v, int n) {
  typename E::type whole[kLanes];
  E::store(whole, v);
  memcpy(p, whole, n * sizeof *whole);
}

// min and max that give x where x is NaN.
VTOK_INLINE vfloat at_most(vfloat x, vfloat high) {
#if defined(__AVX512F__) && VTOK_LANES == 16
  return (vfloat)_mm512_min_ps((__m512)high, (__m512)x);
#elif defined(__AVX2__) && VTOK_LANES == 8
  return (vfloat)_mm256_min_ps((__m256)high, (__m256)x);
#else
  return x > high ? high : x;
#endif
}
VTOK_INLINE vfloat at_least(vfloat x, vfloat low) {
#if defined(__AVX512F__) && VTOK_LANES == 16
  return (vfloat)_mm512_max_ps((__m512)low, (__m512)x);
#elif defined(__AVX2__) && VTOK_LANES == 8
  return (vfloat)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return x < low ? low : x;
#endif
}

// exp(x), within 3 ulp; from 88.4 on it is infinite, below -87 it stays 1e-38, NaN stays NaN. 2^n * p(r) with
// |r| <= ln2/2: Cody-Waite reduction, degree-6 polynomial, the exponent added as an integer.
VTOK_INLINE vfloat exp(vfloat x) {
  x = at_least(at_most(x, broadcast(88.8f)), broadcast(-87.33f));
  // 1.5 * 2^23: rounds to an integer in the low bits
  vfloat shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.0f));
  vint n = (vint)shifted - (vint)broadcast(12582912.0f);
  vfloat k = shifted - 12582912.0f;
  vfloat r = fma(k, broadcast(-0.693145752f), x);
  r = fma(k, broadcast(-1.42860677e-6f), r);
  vfloat p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return p * (vfloat)((n + 127) << 23);
}

VTOK_INLINE vfloat silu(vfloat x) { return x / (1.0f + exp(-x)); }

}  // namespace vtok::cpu::VTOK_ISA
