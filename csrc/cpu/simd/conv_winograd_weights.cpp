// The weight transform of Winograd convolution, computed in double and rounded once, and the checksum that
// names its result.
#include "cpu/simd/conv_winograd.h"
#include "cpu/simd/conv_winograd_tile.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

constexpr int kHalf = kLanes / 2;
typedef double vdouble __attribute__((vector_size(8 * kHalf)));
typedef float vnarrow __attribute__((vector_size(4 * kHalf)));

// filters[9][kLanes] to U[xi][o], half a vector at a time.
template <int M>
VTOK_INLINE void transform_filters(const float* filters, float* u, int64_t u_stride) {
  constexpr int N = M + 2;
  for (int half = 0; half < kLanes; half += kHalf) {
    vdouble columns[N][3];
#pragma GCC unroll 8
    for (int j = 0; j < 3; ++j) {
      vdouble g[3], t[N];
#pragma GCC unroll 8
      for (int i = 0; i < 3; ++i) {
        vnarrow narrow;
        memcpy(&narrow, filters + (i * 3 + j) * kLanes + half, sizeof narrow);
        g[i] = __builtin_convertvector(narrow, vdouble);
      }
      Tile<M>::weight(g, t);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) columns[i][j] = t[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      vdouble t[N];
      Tile<M>::weight(columns[i], t);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const vnarrow rounded = __builtin_convertvector(t[j], vnarrow);
        memcpy(u + (i * N + j) * u_stride + half, &rounded, sizeof rounded);
      }
    }
  }
}

template <class E, int M>
void weights(const Tensor& w, uint64_t taps, int64_t panel, int64_t c_begin, int64_t c_end, float* u,
             int64_t u_stride) {
  constexpr int kBatch = 32;  // input channels read before they are transformed
  alignas(64) float filters[kBatch][9][kLanes];
  int64_t tap[64], element[9];
  int n_taps = 0;
  for (int t = 0; t < w.size[2]; ++t)
    if (taps >> t & 1) tap[n_taps++] = t * w.stride[2];
  for (int i = 0; i < 9; ++i) element[i] = i / 3 * w.stride[3] + i % 3 * w.stride[4];
  for (int64_t c0 = c_begin; c0 < c_end; c0 += kBatch) {
    const int batch = c_end - c0 < kBatch ? int(c_end - c0) : kBatch;
    for (int j = 0; j < kVectors; ++j) {
      const int64_t o0 = panel * kPanel + j * kLanes;
      const int lanes = w.size[0] - o0 < kLanes ? int(w.size[0] - o0) : kLanes;
      if (lanes < kLanes) memset(filters, 0, sizeof filters);
      for (int o = 0; o < lanes; ++o)
        for (int c = 0; c < batch; ++c) {
          const typename E::type* at = static_cast<const typename E::type*>(w.data) + (o0 + o) * w.stride[0] +
                                       (c0 + c) * w.stride[1] + tap[0];
          // output channels lie far apart: no hardware stream follows them
          __builtin_prefetch(at + 2 * w.stride[0]);
          __builtin_prefetch(at + 2 * w.stride[0] + 16);
          if (n_taps == 1) {
#pragma GCC unroll 9
            for (int i = 0; i < 9; ++i) filters[c][i][o] = E::get(at + element[i]);
            continue;
          }
          for (int i = 0; i < 9; ++i) {
            double sum = 0;
            for (int t = 0; t < n_taps; ++t) sum += E::get(at + (tap[t] - tap[0]) + element[i]);
            filters[c][i][o] = float(sum);
          }
        }
      for (int c = 0; c < batch; ++c)
        transform_filters<M>(&filters[c][0][0], u + (c0 + c - c_begin) * kPanel + j * kLanes, u_stride);
    }
  }
}

template <class E>
void weights_any(const Tensor& w, int m, uint64_t taps, int64_t panel, int64_t c_begin, int64_t c_end,
                 float* u, int64_t u_stride) {
  m == 4 ? weights<E, 4>(w, taps, panel, c_begin, c_end, u, u_stride)
         : weights<E, 2>(w, taps, panel, c_begin, c_end, u, u_stride);
}

typedef uint64_t vword __attribute__((vector_size(4 * VTOK_LANES)));

}  // namespace

void winograd_weights(const Tensor& w, int m, uint64_t taps, int64_t panel, int64_t c_begin, int64_t c_end,
                      float* u, int64_t u_stride) {
  switch (w.dtype) {
    case DType::f16: return weights_any<F16>(w, m, taps, panel, c_begin, c_end, u, u_stride);
    case DType::bf16: return weights_any<BF16>(w, m, taps, panel, c_begin, c_end, u, u_stride);
    default: return weights_any<F32>(w, m, taps, panel, c_begin, c_end, u, u_stride);
  }
}

// 32 chains of 64-bit words, whatever the vector width. A step is a bijection of its chain for any word, so a
// single changed word always changes the sum; the rotation carries the sign bit of a float into the low bits,
// which a product alone would not.
void checksum(const void* data, int64_t bytes, uint64_t sum[2]) {
  constexpr int kChains = 32, kWords = sizeof(vword) / 8, kVecs = kChains / kWords;
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
  vword state[kVecs];
  for (int i = 0; i < kVecs; ++i)
    for (int j = 0; j < kWords; ++j) state[i][j] = (i * kWords + j + 1) * 0xd1342543de82ef95u;
  const char* at = static_cast<const char*>(data);
  auto step = [&](const char* from) {
#pragma GCC unroll 32
    for (int i = 0; i < kVecs; ++i) {
      vword w;
      memcpy(&w, from + i * sizeof w, sizeof w);
      w = (state[i] ^ w) * kFactor;
      state[i] = w << 29 | w >> 35;
    }
  };
  int64_t left = bytes;
  for (; left >= kChains * 8; left -= kChains * 8, at += kChains * 8) step(at);
  if (left) {
    char tail[kChains * 8] = {};
    memcpy(tail, at, left);
    step(tail);
  }
  auto mix = [](uint64_t h) {
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
  };
  sum[0] = sum[1] = mix(uint64_t(bytes) + kFactor);
  for (int i = 0; i < kVecs; ++i)
    for (int j = 0; j < kWords; ++j) {
      const uint64_t word = state[i][j];
      sum[0] = mix(sum[0] ^ word);
      sum[1] = mix(sum[1] * kFactor + (word << 17 | word >> 47));
    }
}

}  // namespace vtok::cpu::VTOK_ISA
