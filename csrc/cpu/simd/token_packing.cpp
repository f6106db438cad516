// The differences of two rows of pixels, added up in double precision: multiples of 2^-30 below 2^12, so that no sum rounds.
#include "cpu/token_packing.h"
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

typedef float vfloat_half __attribute__((vector_size(2 * VTOK_LANES)));
typedef double vdouble __attribute__((vector_size(4 * VTOK_LANES)));  // half as many lanes

VTOK_INLINE vfloat difference(vfloat a, vfloat b) {
  vfloat d = (vfloat)((vint)(a - b) & 0x7fffffff);
  d = at_most(d, broadcast(4096.0f));
  // Below 1 through the integers, which cut; from 1 on floats are such multiples anyway. A NaN is not below 1.
  const vfloat cut = __builtin_convertvector(__builtin_convertvector(d * 0x1p30f, vint), vfloat) * 0x1p-30f;
  const vint below = d < 1.0f;
  return (vfloat)(((vint)cut & below) | ((vint)d & ~below));
}

VTOK_INLINE void add(double* sums, vfloat d) {
  vfloat_half half[2];
#if defined(__AVX512F__) && VTOK_LANES == 16
  half[0] = (vfloat_half)_mm512_castps512_ps256((__m512)d), half[1] = (vfloat_half)_mm512_extractf32x8_ps((__m512)d, 1);
#elif defined(__AVX2__) && VTOK_LANES == 8
  half[0] = (vfloat_half)_mm256_castps256_ps128((__m256)d), half[1] = (vfloat_half)_mm256_extractf128_ps((__m256)d, 1);
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

template <class E>
void run(const ScoreRow& r, double* sums) {
  const auto* a = static_cast<const typename E::type*>(r.video);
  const auto* b = static_cast<const typename E::type*>(r.reconstruction);
  int64_t i = 0;
  if (r.video_step == 1 && r.reconstruction_step == 1)
    for (; i + kLanes <= r.columns; i += kLanes) add(sums + i, difference(E::load(a + i), E::load(b + i)));
  for (; i < r.columns; ++i)
    sums[i] += difference(broadcast(E::get(a + i * r.video_step)), broadcast(E::get(b + i * r.reconstruction_step)))[0];
}

}  // namespace

void add_differences(const ScoreRow& row, double* sums) {
  switch (row.dtype) {
    case DType::f16: return run<F16>(row, sums);
    case DType::bf16: return run<BF16>(row, sums);
    default: return run<F32>(row, sums);
  }
}

}  // namespace vtok::cpu::VTOK_ISA
