// The input and output transforms of Winograd convolution, kLanes channels at a time. Rows and columns come
// from the plan's tables, so every padding and upsampling is a matter of which pixel a tile points at; a
// padded pixel points at zeros.
#include "cpu/simd/conv_epilogue.h"
#include "cpu/simd/conv_winograd.h"
#include "cpu/simd/conv_winograd_tile.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

// Source of element i of a tile that starts at output `first`: table is [out][3]; -1 for zeros and for what
// no output reads.
VTOK_INLINE int32_t source(const int32_t* table, int64_t out, int64_t first, int64_t i) {
  const int64_t o = first + i < out ? first + i : out - 1, tap = first + i - o;
  return tap < 3 ? table[o * 3 + tap] : -1;
}

// The last two elements of a tile are taps 1 and 2 of its last output.
template <int M>
VTOK_INLINE int32_t tile_source(const int32_t* table, int64_t out, int64_t first, int i) {
  const int64_t limit = first + M < out ? first + M : out;
  return source(table, limit, first, i);
}

VTOK_INLINE bool is_finite(float x) { return x - x == 0; }

// Outputs that a tile has along an axis.
template <int M>
VTOK_INLINE int outputs_of(int64_t out, int64_t first) {
  return out - first < M ? int(out - first) : M;
}

// Adds to `energy` the squares at five points, in one of which every pixel has a part except for the corners, and a
// corner is read by one output only.
template <class E, int M>
VTOK_INLINE void transform_tile(const typename E::type* const* pixels, int64_t c, int n, float* v,
                                int64_t v_stride, vfloat* energy) {
  constexpr int N = M + 2;
  vfloat columns[N][N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    vfloat d[N], t[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      d[i] = n == kLanes ? E::load(pixels[i * N + j] + c) : load_n<E>(pixels[i * N + j] + c, n);
    Tile<M>::input(d, t);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) columns[i][j] = t[i];
  }
  vfloat sum = *energy;  // in a register: the compiler cannot tell that v is elsewhere
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    vfloat t[N];
    Tile<M>::input(columns[i], t);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(v + (i * N + j) * v_stride, t[j]);
    if constexpr (!kWinogradChecked) continue;
    if (i <= 1 || i == N - 1) sum = fma(t[1], t[1], sum);
    if (i == 1) sum = fma(t[0], t[0], fma(t[N - 1], t[N - 1], sum));
  }
  *energy = sum;
}

// The energy of one pixel: the sum of its channels' squares.
template <class E>
float energy_of(const typename E::type* pixel, int64_t channels, int64_t stride) {
  vfloat sums = {};
  int64_t c = 0;
  if (stride == 1)
    for (; c + kLanes <= channels; c += kLanes) {
      const vfloat d = E::load(pixel + c);
      sums = fma(d, d, sums);
    }
  float sum = tree_sum(sums);
  for (; c < channels; ++c) sum += E::get(pixel + c * stride) * E::get(pixel + c * stride);
  return sum;
}

// Whether some output's nine pixels hold less than 1 / kContrast^2 of the tile's energy, so that the tile's rounding
// would drown it.
template <class E, int M>
bool too_uneven(const WinogradBlock& b, const Tensor& x, const typename E::type* frame, int64_t tile) {
  constexpr int N = M + 2;
  const ConvPlan& plan = *b.plan;
  const int64_t top = tile / b.tiles_w * M, left = tile % b.tiles_w * M;
  const int height = outputs_of<M>(plan.Ho, top), width = outputs_of<M>(plan.Wo, left);
  float energy[N][N], all = 0;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {
      const int32_t row = tile_source<M>(plan.rows.data(), plan.Ho, top, i);
      const int32_t col = tile_source<M>(plan.cols.data(), plan.Wo, left, j);
      energy[i][j] = row < 0 || col < 0 ? 0
                                        : energy_of<E>(frame + row * x.stride[3] + col * x.stride[4],
                                                       plan.channels, x.stride[1]);
      all += energy[i][j];
    }
  for (int i = 0; i < height; ++i)
    for (int j = 0; j < width; ++j) {
      float own = 0;
      for (int p = 0; p < 3; ++p)
        for (int q = 0; q < 3; ++q) own += energy[i + p][j + q];
      if (!(all <= kContrast * kContrast * own)) return true;
    }
  return false;
}

// Where channels are adjacent in memory.
template <class E, int M>
void input_tile(const WinogradBlock& b, const typename E::type* frame, const int64_t* stride, int64_t tile,
                float* v, vfloat* energy) {
  constexpr int N = M + 2;
  const ConvPlan& plan = *b.plan;
  const typename E::type *pixels[N * N], *zeros = static_cast<const typename E::type*>(b.zeros);
  const int64_t top = tile / b.tiles_w * M, left = tile % b.tiles_w * M;
  int32_t cols[N];
  for (int j = 0; j < N; ++j) cols[j] = tile_source<M>(plan.cols.data(), plan.Wo, left, j);
  for (int i = 0; i < N; ++i) {
    const int32_t row = tile_source<M>(plan.rows.data(), plan.Ho, top, i);
    for (int j = 0; j < N; ++j)
      pixels[i * N + j] = row < 0 || cols[j] < 0 ? zeros : frame + row * stride[3] + cols[j] * stride[4];
  }
  for (int64_t c0 = 0; c0 < plan.channels; c0 += b.pitch, v += b.chunk_stride) {
    const int64_t end = plan.channels - c0 < b.pitch ? plan.channels : c0 + b.pitch;
    int64_t c = c0;
    for (; c + kLanes <= end; c += kLanes)
      transform_tile<E, M>(pixels, c, kLanes, v + (c - c0), b.v_stride, energy);
    if (c < end) transform_tile<E, M>(pixels, c, int(end - c), v + (c - c0), b.v_stride, energy);
  }
}

typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_index __attribute__((vector_size(16)));

// to[column][channel] = from[channel][column], for kLanes channels and n columns at stride 1.
VTOK_INLINE void transpose(const float* from, int64_t channel_stride, int n, float* to) {
  for (int c = 0; c < kLanes; c += 4) {
    const float* at = from + c * channel_stride;
    int j = 0;
    for (; j + 4 <= n; j += 4) {
      quad r[4];
      for (int i = 0; i < 4; ++i) memcpy(&r[i], at + i * channel_stride + j, sizeof r[i]);
      const quad_index low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
      const quad a = shuffle(r[0], r[2], low), b = shuffle(r[1], r[3], low);
      const quad d = shuffle(r[0], r[2], high), e = shuffle(r[1], r[3], high);
      r[0] = shuffle(a, b, low);
      r[1] = shuffle(a, b, high);
      r[2] = shuffle(d, e, low);
      r[3] = shuffle(d, e, high);
      for (int i = 0; i < 4; ++i) memcpy(to + (j + i) * kLanes + c, &r[i], sizeof r[i]);
    }
    for (; j < n; ++j)
      for (int i = 0; i < 4; ++i) to[j * kLanes + c + i] = at[i * channel_stride + j];
  }
}

constexpr int kStrip = 8;  // tiles gathered together where channels are not adjacent

// A strip of tiles in one row of tiles: its pixels are gathered once, channels last, and transformed from
// there.
template <class E, int M>
void input_strip(const WinogradBlock& b, const typename E::type* frame, const int64_t* stride, int64_t tile,
                 int tiles, float* v, vfloat* energy) {
  constexpr int N = M + 2, kColumns = kStrip * M + 2;
  const ConvPlan& plan = *b.plan;
  const int64_t top = tile / b.tiles_w * M, left = tile % b.tiles_w * M;
  const int width = tiles * M + 2;
  int32_t cols[kColumns];
  const int64_t limit = left + tiles * M < plan.Wo ? left + tiles * M : plan.Wo;
  for (int j = 0; j < width; ++j) cols[j] = source(plan.cols.data(), limit, left, j);
  int first = 0, end = width;  // columns [first, end) are adjacent in memory
  while (first < width && cols[first] < 0) ++first;
  for (int j = first; j < end; ++j)
    if (cols[j] != cols[first] + (j - first)) end = j;
  float strip[N * kColumns * kLanes];
  for (int64_t c0 = 0; c0 < plan.channels; c0 += kLanes) {
    const int n = plan.channels - c0 < kLanes ? int(plan.channels - c0) : kLanes;
    for (int i = 0; i < N; ++i) {
      float* to = strip + i * kColumns * kLanes;
      const int32_t row = tile_source<M>(plan.rows.data(), plan.Ho, top, i);
      if (row < 0 || n < kLanes) memset(to, 0, width * kLanes * sizeof *to);
      if (row < 0) continue;
      const typename E::type* from = frame + c0 * stride[1] + row * stride[3];
      int j = 0;
      auto gather = [&](int stop) {
        for (; j < stop; ++j)
          for (int c = 0; c < n; ++c)
            to[j * kLanes + c] = cols[j] < 0 ? 0 : E::get(from + c * stride[1] + cols[j] * stride[4]);
      };
      if constexpr (sizeof(typename E::type) == 4)
        if (stride[4] == 1 && n == kLanes && first < end) {
          gather(first);
          transpose((const float*)from + cols[first], stride[1], end - first, to + first * kLanes);
          j = end;
        }
      gather(width);
    }
    for (int t = 0; t < tiles; ++t) {
      const float* pixels[N * N];
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) pixels[i * N + j] = strip + (i * kColumns + t * M + j) * kLanes;
      transform_tile<F32, M>(pixels, 0, kLanes,
                             v + c0 / b.pitch * b.chunk_stride + t * b.pitch + c0 % b.pitch, b.v_stride,
                             energy + t);
    }
  }
}

// Tiles whose energies are compared with each other. Of fewer than kFewest each may be an outlier: one bad pixel is
// in up to three of them.
constexpr int64_t kCompared = 64, kFewest = 4;
constexpr float kSuspicious = 256;

// Marks what too_uneven() says of the tiles that have, in some lane of channels, much more energy than another tile
// among those compared, and the tiles with something that is not finite.
template <class E, int M>
void find_uneven(const WinogradBlock& b, const Tensor& x, const typename E::type* frame, int64_t begin,
                 int64_t end, const vfloat* energy, uint8_t* uneven) {
  const vfloat largest = broadcast(3.4028235e38f);
  vfloat least = largest;
  for (int64_t i = 0; i < end - begin; ++i) least = energy[i] < least ? energy[i] : least;
  vfloat limit = least * kSuspicious;
  limit = limit < largest ? limit : largest;
  if (end - begin < kFewest) limit = broadcast(-1.0f);
  vint within = ~vint{};
  for (int64_t i = 0; i < end - begin; ++i) within &= energy[i] <= limit;
  if (tree_sum(within ? vfloat{} : broadcast(1.0f)) == 0) return;
  for (int64_t i = 0; i < end - begin; ++i) {
    if (tree_sum(energy[i] <= limit ? vfloat{} : broadcast(1.0f)) == 0) continue;
    if (!is_finite(tree_sum(energy[i])) || too_uneven<E, M>(b, x, frame, b.tile + begin + i))
      uneven[b.tile + begin + i] = 1;
  }
}

template <class E, int M>
void input(const WinogradBlock& b, int64_t t, bool from_cache, int slot, int64_t begin, int64_t end,
           uint8_t* uneven) {
  const Tensor& x = from_cache ? b.problem->cache : b.problem->x;
  const typename E::type* frame =
      static_cast<const typename E::type*>(x.data) + b.batch * x.stride[0] + t * x.stride[2];
  float* v = b.v + slot * b.tiles * b.pitch;
  const bool adjacent = x.stride[1] == 1 || x.size[1] == 1;
  for (int64_t first = begin, stop; first < end; first = stop) {
    stop = end - first < kCompared ? end : first + kCompared;
    vfloat energy[kCompared] = {};
    for (int64_t i = first; i < stop;) {
      const int64_t tile = b.tile + i;
      if (adjacent) {
        input_tile<E, M>(b, frame, x.stride, tile, v + i * b.pitch, energy + (i - first));
        ++i;
      } else {
        int64_t tiles = b.tiles_w - tile % b.tiles_w;
        if (tiles > stop - i) tiles = stop - i;
        if (tiles > kStrip) tiles = kStrip;
        input_strip<E, M>(b, frame, x.stride, tile, int(tiles), v + i * b.pitch, energy + (i - first));
        i += tiles;
      }
    }
    if constexpr (kWinogradChecked) find_uneven<E, M>(b, x, frame, first, stop, energy, uneven);
  }
}

template <class E, int M>
void output(const WinogradBlock& b, int64_t panel, const float* acc) {
  constexpr int N = M + 2;
  const ConvPlan& plan = *b.plan;
  const Epilogue<E> epilogue(*b.problem, plan, b.bias);
  const int64_t stride = winograd_acc_stride(b.frames * b.tiles, kPanel);
  // Point (1, 1) takes part of every pixel and every tap: of a weight that is not finite, and of sums that come near
  // the end of float32.
  const float* inner = acc + (N + 1) * stride;
  vfloat squares = {};
  for (int64_t f = 0; f < b.frames; ++f)
    for (int64_t i = 0; i < b.tiles; ++i) {
      const int64_t t = b.frame + f, top = (b.tile + i) / b.tiles_w * M, left = (b.tile + i) % b.tiles_w * M;
      const int height = outputs_of<M>(plan.Ho, top), width = outputs_of<M>(plan.Wo, left);
      for (int j = 0; j < kVectors; ++j) {
        const int64_t o = panel * kPanel + j * kLanes;
        if (o >= plan.out_channels) break;
        const int n = plan.out_channels - o < kLanes ? int(plan.out_channels - o) : kLanes;
        const float* at = acc + (f * b.tiles + i) * kPanel + j * kLanes;
        const vfloat d = load(at + (inner - acc));
        if constexpr (kWinogradChecked) squares = fma(d, d, squares);
        vfloat columns[M][N];
#pragma GCC unroll 8
        for (int q = 0; q < N; ++q) {
          vfloat m[N], y[M];
#pragma GCC unroll 8
          for (int p = 0; p < N; ++p) m[p] = load(at + (p * N + q) * stride);
          Tile<M>::output(m, y);
#pragma GCC unroll 8
          for (int p = 0; p < M; ++p) columns[p][q] = y[p];
        }
        for (int p = 0; p < height; ++p) {
          vfloat y[M];
          Tile<M>::output(columns[p], y);
          for (int q = 0; q < width; ++q)
            epilogue.finish(y[q], o, epilogue.out_pixel(b.batch, t, top + p, left + q),
                            epilogue.residual_pixel(b.batch, t, top + p, left + q), n);
        }
      }
    }
  if (!kWinogradChecked || is_finite(tree_sum(squares))) return;
  for (int64_t i = 0; i < b.frames * b.tiles; ++i) {
    vfloat own = {};
    for (int j = 0; j < kVectors; ++j) {
      const vfloat d = load(inner + i * kPanel + j * kLanes);
      own = fma(d, d, own);
    }
    uint8_t* mark = &b.broken[(b.frame + i / b.tiles) * b.all_tiles + b.tile + i % b.tiles];
    if (!is_finite(tree_sum(own))) __atomic_store_n(mark, 1, __ATOMIC_RELAXED);
  }
}

template <class E>
void input_any(const WinogradBlock& b, int64_t t, bool from_cache, int slot, int64_t begin, int64_t end,
               uint8_t* uneven) {
  b.m == 4 ? input<E, 4>(b, t, from_cache, slot, begin, end, uneven)
           : input<E, 2>(b, t, from_cache, slot, begin, end, uneven);
}
template <class E>
void output_any(const WinogradBlock& b, int64_t panel, const float* acc) {
  b.m == 4 ? output<E, 4>(b, panel, acc) : output<E, 2>(b, panel, acc);
}

template <class E>
void bias_any(const Tensor& bias, float* to) {
  for (int64_t i = 0; i < bias.size[0]; ++i)
    to[i] = E::get(static_cast<const typename E::type*>(bias.data) + i);
}

}  // namespace

void winograd_bias(const Tensor& bias, float* to) {
  switch (bias.dtype) {
    case DType::f16: return bias_any<F16>(bias, to);
    case DType::bf16: return bias_any<BF16>(bias, to);
    default: return bias_any<F32>(bias, to);
  }
}

void winograd_input(const WinogradBlock& b, int64_t frame, bool from_cache, int slot, int64_t begin,
                    int64_t end, uint8_t* uneven) {
  switch (b.problem->x.dtype) {
    case DType::f16: return input_any<F16>(b, frame, from_cache, slot, begin, end, uneven);
    case DType::bf16: return input_any<BF16>(b, frame, from_cache, slot, begin, end, uneven);
    default: return input_any<F32>(b, frame, from_cache, slot, begin, end, uneven);
  }
}

void winograd_output(const WinogradBlock& b, int64_t panel, const float* acc) {
  switch (b.problem->out.dtype) {
    case DType::f16: return output_any<F16>(b, panel, acc);
    case DType::bf16: return output_any<BF16>(b, panel, acc);
    default: return output_any<F32>(b, panel, acc);
  }
}

}  // namespace vtok::cpu::VTOK_ISA
