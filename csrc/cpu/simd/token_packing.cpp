// The differences of rows of pixels, added up in double precision: multiples of 2^-30 below 2^12, so that no
// sum rounds.
#include "cpu/token_packing.h"
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

typedef float vfloat_half __attribute__((vector_size(2 * VTOK_LANES)));
typedef uint32_t vuint_half __attribute__((vector_size(2 * VTOK_LANES)));
typedef double vdouble __attribute__((vector_size(4 * VTOK_LANES)));  // half as many lanes

constexpr int kRowsAtOnce = 4;  // whose differences below 1 add up in 32 bits
constexpr int kColumns = 512;   // of each, so that the sums stay near

VTOK_INLINE vfloat distance(vfloat a, vfloat b) { return (vfloat)((vint)(a - b) & 0x7fffffff); }

VTOK_INLINE bool all(vint lanes) {  // lanes of 0 or -1
#if defined(__AVX512F__) && VTOK_LANES == 16
  return _mm512_cmplt_epi32_mask((__m512i)lanes, _mm512_setzero_si512()) == 0xffff;
#elif defined(__AVX2__) && VTOK_LANES == 8
  return _mm256_movemask_ps((__m256)lanes) == 0xff;
#else
  int32_t whole = -1;
  for (int i = 0; i < kLanes; ++i) whole &= lanes[i];
  return whole;
#endif
}

// Cut to a multiple of 2^-30: below 1 through the integers, from 1 on floats are such multiples anyway. A NaN
// is not below 1.
VTOK_INLINE vfloat cut(vfloat d) {
  d = at_most(d, broadcast(4096.0f));
  const vfloat small = __builtin_convertvector(__builtin_convertvector(d * 0x1p30f, vint), vfloat) * 0x1p-30f;
  const vint below = d < 1.0f;
  return (vfloat)(((vint)small & below) | ((vint)d & ~below));
}

VTOK_INLINE void add(double* sums, vfloat d) {
  vfloat_half half[2];
#if defined(__AVX512F__) && VTOK_LANES == 16
  half[0] = (vfloat_half)_mm512_castps512_ps256((__m512)d);
  half[1] = (vfloat_half)_mm512_extractf32x8_ps((__m512)d, 1);
#elif defined(__AVX2__) && VTOK_LANES == 8
  half[0] = (vfloat_half)_mm256_castps256_ps128((__m256)d);
  half[1] = (vfloat_half)_mm256_extractf128_ps((__m256)d, 1);
#else
  memcpy(half, &d, sizeof d);
#endif
  for (int k = 0; k < 2; ++k) {
    vdouble sum;
    memcpy(&sum, sums + k * kLanes / 2, sizeof sum);
    sum += __builtin_convertvector(half[k], vdouble);
    memcpy(sums + k * kLanes / 2, &sum, sizeof sum);
  }
}

VTOK_INLINE void add(double* sums, vuint multiples) {
  for (int k = 0; k < 2; ++k) {
    vuint_half half;
    memcpy(&half, (const char*)&multiples + k * sizeof half, sizeof half);
    vdouble sum;
    memcpy(&sum, sums + k * kLanes / 2, sizeof sum);
    sum += __builtin_convertvector(half, vdouble) * 0x1p-30;
    memcpy(sums + k * kLanes / 2, &sum, sizeof sum);
  }
}

// The memory in front of what is read: two rows that lie far apart are more than the machine foresees by
// itself.
template <class T>
VTOK_INLINE void prefetch(const T* at) {
  __builtin_prefetch((const char*)at + 3072);
}

// At most kRowsAtOnce rows of adjacent pixels, one after the other. Differences below 1, which nearly all
// are, add up as integers.
template <class E>
VTOK_INLINE void add_adjacent(const typename E::type* a, const typename E::type* b, const ScoreRows& r,
                              int64_t rows, int64_t columns, double* sums) {
  vuint multiples[kColumns / kLanes] = {};
  for (int64_t k = 0; k < rows; ++k, a += r.video_row, b += r.reconstruction_row)
    for (int64_t i = 0; i < columns; i += kLanes) {
      prefetch(a + i);
      prefetch(b + i);
      const vfloat d = distance(E::load(a + i), E::load(b + i));
      if (all(d < 1.0f)) {
        multiples[i / kLanes] += (vuint) __builtin_convertvector(d * 0x1p30f, vint);
      } else {
        add(sums + i, cut(d));
      }
    }
  for (int64_t i = 0; i < columns; i += kLanes) add(sums + i, multiples[i / kLanes]);
}

template <class E>
void run(const ScoreRows& r, double* sums) {
  const auto* a = static_cast<const typename E::type*>(r.video);
  const auto* b = static_cast<const typename E::type*>(r.reconstruction);
  const int64_t whole = r.video_step == 1 && r.reconstruction_step == 1 ? r.columns / kLanes * kLanes : 0;
  for (int64_t i = 0; i < whole; i += kColumns)
    for (int64_t k = 0; k < r.rows; k += kRowsAtOnce)
      add_adjacent<E>(a + k * r.video_row + i, b + k * r.reconstruction_row + i, r,
                      k + kRowsAtOnce < r.rows ? kRowsAtOnce : r.rows - k,
                      i + kColumns < whole ? kColumns : whole - i, sums + i);
  for (int64_t k = 0; k < r.rows; ++k)
    for (int64_t i = whole; i < r.columns; ++i)
      sums[i] +=
          cut(distance(broadcast(E::get(a + k * r.video_row + i * r.video_step)),
                       broadcast(E::get(b + k * r.reconstruction_row + i * r.reconstruction_step))))[0];
}

}  // namespace

void add_differences(const ScoreRows& rows, double* sums) {
  switch (rows.dtype) {
    case DType::f16: return run<F16>(rows, sums);
    case DType::bf16: return run<BF16>(rows, sums);
    default: return run<F32>(rows, sums);
  }
}

}  // namespace vtok::cpu::VTOK_ISA
