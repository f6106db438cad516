// Counts thresholds with a vector of values at a time: neighboring positions of one channel where those are
// adjacent, and otherwise, where the channels of a position are adjacent, whatever channels the lanes fall
// on.
#include "cpu/fsq.h"
#include "cpu/vec.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

VTOK_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }
VTOK_INLINE vint all(int32_t v) { return v - vint{}; }

// level + 1 where z has reached t; a NaN reaches nothing.
VTOK_INLINE vint counted(vint level, vfloat z, vfloat t) {
#if defined(__AVX512F__) && VTOK_LANES == 16  // the generic form turns the mask into a vector first
  const __mmask16 reached = _mm512_cmp_ps_mask((__m512)z, (__m512)t, _CMP_GE_OQ);
  return (vint)_mm512_mask_add_epi32((__m512i)level, reached, (__m512i)level, _mm512_set1_epi32(1));
#else
  return level - (z >= t);
#endif
}

// One position, channel by channel, under any strides.
template <class E>
void position(const FsqRun& r, const FsqLevels& l, int64_t i) {
  const auto* z = static_cast<const typename E::type*>(r.z) + i * r.z_step;
  auto* codes = static_cast<typename E::type*>(r.codes) + i * r.codes_step;
  int32_t index = 0;
  bool nan = false;
  for (int64_t c = 0; c < r.channels; ++c) {
    const float value = E::get(z + c * r.z_channel), half = float(l.levels[c] / 2);
    int32_t level = 0;
    for (int64_t k = 0; k + 1 < l.levels[c]; ++k) level += value >= l.thresholds[c * l.pitch + k];
    E::put(codes + c * r.codes_channel, value != value ? value : (float(level) - half) / half);
    nan |= value != value;
    index += level * l.basis[c];
  }
  r.indices[i * r.indices_step] = nan ? -1 : index;
}

template <class E, bool kStream>
VTOK_INLINE void put(typename E::type* to, vfloat v) {
  if constexpr (kStream)
    stream(to, v);
  else
    E::store(to, v);
}

VTOK_INLINE bool any(vint mask) {
  uint64_t words[sizeof mask / 8], some = 0;
  memcpy(words, &mask, sizeof mask);
  for (uint64_t w : words) some |= w;
  return some != 0;
}

// Positions adjacent: kVectors vectors of one channel from position i on. What they add to the index is
// summed over the channels in `parts`, which the last channel writes out. The result has a one where a value
// is NaN: such positions are done again, one by one.
template <class E, int kVectors, bool kStream>
VTOK_INLINE vint adjacent_positions(const FsqRun& r, const FsqLevels& l, int64_t c, int64_t i,
                                    int32_t* parts) {
  const auto* from = static_cast<const typename E::type*>(r.z) + c * r.z_channel + i;
  auto* to = static_cast<typename E::type*>(r.codes) + c * r.codes_channel + i;
  const float* thresholds = l.thresholds + c * l.pitch;
  const float half = float(l.levels[c] / 2);
  // Of a power of two the reciprocal is exact, and the product the quotient.
  const bool power_of_two = !(l.levels[c] / 2 & (l.levels[c] / 2 - 1));
  const int64_t count = l.levels[c] - 1;
  vfloat z[kVectors];
  vint level[kVectors] = {}, nan = {};
  for (int v = 0; v < kVectors; ++v) z[v] = E::load(from + v * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    const vfloat t = broadcast(thresholds[k]);
    for (int v = 0; v < kVectors; ++v) level[v] = counted(level[v], z[v], t);
  }
  for (int v = 0; v < kVectors; ++v) {
    const vfloat centered = to_float(level[v]) - half;
    put<E, kStream>(to + v * kLanes, power_of_two ? centered * (1 / half) : centered / half);
    nan |= z[v] != z[v];
    vint index = {};
    if (c) memcpy(&index, parts + v * kLanes, sizeof index);
    index += level[v] * l.basis[c];
    if (c + 1 == r.channels)
      put<F32, kStream>(reinterpret_cast<float*>(r.indices + i) + v * kLanes, (vfloat)index);
    else
      memcpy(parts + v * kLanes, &index, sizeof index);
  }
  return nan;
}

template <int kChannels>
VTOK_INLINE void sum_channels(const int32_t* parts, int32_t* to, int64_t channels) {
  const int64_t n = kChannels ? kChannels : channels;
  for (int i = 0; i < kLanes; ++i) {
    int32_t sum = 0;
    for (int64_t c = 0; c < n; ++c) sum += parts[i * n + c];
    asm("" : "+r"(sum));  // in scalar registers: made into vectors, these sums are mostly inserts
    to[i] = sum;
  }
}

constexpr int64_t kPartsLimit = 32;  // channels up to which the interleaved form is used

// Channels adjacent: kLanes positions are `channels` vectors, and lane j of vector v holds channel (v *
// kLanes + j) % channels.
// Whether a value is NaN: then these positions are done again, one by one.
template <class E, bool kStream, int kPitch>
VTOK_INLINE bool adjacent_channels(const FsqRun& r, const FsqLevels& l, int64_t i) {
  const int64_t pitch = kPitch ? kPitch : l.pitch;
  const auto* from = static_cast<const typename E::type*>(r.z) + i * r.channels;
  auto* to = static_cast<typename E::type*>(r.codes) + i * r.channels;
  int32_t parts[kPartsLimit * kLanes];
  vint nan = {};
  const float* table = l.interleaved;
  for (int64_t v = 0; v < r.channels; ++v) {
    const vfloat z = E::load(from + v * kLanes);
    vint level = {};
    for (int64_t k = 0; k < pitch; ++k, table += kLanes) level = counted(level, z, load(table));
    const vfloat half = load(table);
    vint basis;
    memcpy(&basis, table + kLanes, sizeof basis);
    table += 2 * kLanes;
    put<E, kStream>(to + v * kLanes, (to_float(level) - half) / half);
    nan |= z != z;
    level *= basis;
    memcpy(parts + v * kLanes, &level, sizeof level);
  }
  switch (r.channels) {
    case 3: sum_channels<3>(parts, r.indices + i, 3); break;
    case 4: sum_channels<4>(parts, r.indices + i, 4); break;
    case 5: sum_channels<5>(parts, r.indices + i, 5); break;
    case 6: sum_channels<6>(parts, r.indices + i, 6); break;
    default: sum_channels<0>(parts, r.indices + i, r.channels);
  }
  return any(nan);
}

template <class E, bool kStream>
void run_planar(const FsqRun& r, const FsqLevels& l, int64_t whole) {
  constexpr int64_t kBlock = 64 * kLanes;  // its part of the indices stays in the first-level cache
  int32_t parts[kBlock];
  for (int64_t i = 0; i < whole; i += kBlock) {
    const int64_t end = i + kBlock < whole ? i + kBlock : whole;
    vint nan = {};
    for (int64_t c = 0; c < r.channels; ++c) {
      int64_t j = i;
      for (; j + 4 * kLanes <= end; j += 4 * kLanes)
        nan |= adjacent_positions<E, 4, kStream>(r, l, c, j, parts + j - i);
      for (; j < end; j += kLanes) nan |= adjacent_positions<E, 1, kStream>(r, l, c, j, parts + j - i);
    }
    if (any(nan))
      for (int64_t j = i; j < end; ++j) position<E>(r, l, j);
  }
}

template <class E, bool kStream, int kPitch = 0>
void run_interleaved(const FsqRun& r, const FsqLevels& l, int64_t whole) {
  // eight levels at most, as most codebooks have
  if (!kPitch && l.pitch == 7) return run_interleaved<E, kStream, 7>(r, l, whole);
  for (int64_t i = 0; i < whole; i += kLanes)
    if (adjacent_channels<E, kStream, kPitch>(r, l, i))
      for (int j = 0; j < kLanes; ++j) position<E>(r, l, i + j);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(vfloat) == 0; }

template <class E>
void run(const FsqRun& r, const FsqLevels& l) {
  constexpr bool can_stream = sizeof(typename E::type) == 4;
  const bool stream = r.stream && can_stream && aligned(r.codes) && aligned(r.indices);
  const int64_t whole = r.positions / kLanes * kLanes;
  int64_t i = whole;
  if (r.indices_step == 1 && r.z_step == 1 && r.codes_step == 1) {
    if (stream && r.codes_channel % kLanes == 0)
      run_planar<E, can_stream>(r, l, whole);
    else
      run_planar<E, false>(r, l, whole);
  } else if (l.interleaved && r.indices_step == 1 && r.z_channel == 1 && r.codes_channel == 1 &&
             r.z_step == r.channels && r.codes_step == r.channels) {
    if (stream)
      run_interleaved<E, can_stream>(r, l, whole);
    else
      run_interleaved<E, false>(r, l, whole);
  } else {
    i = 0;
  }
  if (stream) stream_fence();
  for (; i < r.positions; ++i) position<E>(r, l, i);
}

}  // namespace

int64_t fsq_interleaved_size(int64_t channels, int64_t pitch) {
  return channels <= kPartsLimit ? channels * (pitch + 2) * kLanes : 0;
}

// Per vector v of a block: pitch vectors of thresholds, one of halves, one of bases (their bits).
void fsq_interleave(const FsqLevels& l, int64_t channels, float* to) {
  for (int64_t v = 0; v < channels; ++v, to += (l.pitch + 2) * kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const int64_t c = (v * kLanes + j) % channels;
      for (int64_t k = 0; k < l.pitch; ++k) to[k * kLanes + j] = l.thresholds[c * l.pitch + k];
      to[l.pitch * kLanes + j] = float(l.levels[c] / 2);
      memcpy(to + (l.pitch + 1) * kLanes + j, l.basis + c, 4);
    }
}

void fsq_run(const FsqRun& r, const FsqLevels& l) {
  switch (r.dtype) {
    case DType::f16: return run<F16>(r, l);
    case DType::bf16: return run<BF16>(r, l);
    default: return run<F32>(r, l);
  }
}

}  // namespace vtok::cpu::VTOK_ISA
