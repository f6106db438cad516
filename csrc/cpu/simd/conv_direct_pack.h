// Packing for the direct convolution: weights into panels once per call, input pixels into blocks right
// before their use.
#pragma once
#include "cpu/simd/conv_direct.h"
#include "cpu/simd/conv_direct_kernels.h"

namespace vtok::cpu::VTOK_ISA {

VTOK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
VTOK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// One weight set: a row phase and a column phase.
struct WeightSet {
  const int *row_begin, *col_begin;
  int row_taps, col_taps;
  int64_t taps() const { return int64_t(row_taps) * col_taps; }
};

// Reads `width` <= kLanes output channels from `first` on, for `count` input channels from c0 on, into
// block[count][kt*kh*kw][kLanes], zeros after `width`.
template <class E>
static void read_weights(const Tensor& w, int64_t first, int64_t width, int64_t c0, int64_t count,
                         float* block) {
  typedef typename E::type type;
  const type* data = static_cast<const type*>(w.data) + first * w.stride[0] + c0 * w.stride[1];
  const int64_t kt = w.size[2], kh = w.size[3], kw = w.size[4], taps = kt * kh * kw;
  auto dense = [&](int axis, int64_t stride) { return w.size[axis] == 1 || w.stride[axis] == stride; };
  if (dense(4, 1) && dense(3, kw) && dense(2, kh * kw) && (count == 1 || w.stride[1] == taps)) {
    // The usual layout: the run (c, kt, kh, kw) is contiguous for each output channel, so the block is a
    // plain transpose.
    for (int64_t k = 0; k < count * taps; k += kLanes, block += kLanes * kLanes) {
      const int n = int(min64(kLanes, count * taps - k));
      vfloat m[kLanes];
      if (n == kLanes && width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) m[i] = E::load(data + i * w.stride[0] + k);
        transpose(m);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(block + i * kLanes, m[i]);
      } else {
        for (int i = 0; i < kLanes; ++i)
          m[i] = i < width ? VTOK_ISA::load_n<E>(data + i * w.stride[0] + k, n) : vfloat{};
        transpose(m);
        for (int i = 0; i < n; ++i) store(block + i * kLanes, m[i]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c)
    for (int64_t t = 0; t < kt; ++t)
      for (int64_t h = 0; h < kh; ++h)
        for (int64_t k = 0; k < kw; ++k, block += kLanes) {
          const type* from = data + c * w.stride[1] + t * w.stride[2] + h * w.stride[3] + k * w.stride[4];
          for (int i = 0; i < kLanes; ++i) block[i] = i < width ? E::get(from + i * w.stride[0]) : 0;
        }
}

// panel[slot][row tap][column tap][channel][vectors * kLanes]: each entry the sum of the taps that it stands
// for. `block` is scratch of kLanes * kt * kh * kw * kLanes floats.
template <class E>
static void pack_panel(const DirectJob& job, const WeightSet& set, int64_t first, int64_t width, float* panel,
                       float* block) {
  const Tensor& w = job.problem->weight;
  const int64_t kt = w.size[2], kh = w.size[3], kw = w.size[4], taps = kt * kh * kw;
  const int64_t line = width > kLanes ? kPanel : kLanes;
  for (int64_t v = 0; v < line; v += kLanes)
    for (int64_t c0 = 0; c0 < job.channels; c0 += kLanes) {
      const int64_t count = min64(kLanes, job.channels - c0);
      read_weights<E>(w, first + v, min64(kLanes, width - v), c0, count, block);
      float* entry = panel + c0 * line + v;
      for (int slot = 0; slot < job.slots; ++slot)
        for (int i = 0; i < set.row_taps; ++i)
          for (int j = 0; j < set.col_taps; ++j, entry += job.channels * line) {
            bool more = false;
            for (int64_t t = 0; t < kt; ++t) {
              if (!(job.slot_mask[slot] >> t & 1)) continue;
              for (int h = set.row_begin[i]; h < set.row_begin[i + 1]; ++h)
                for (int k = set.col_begin[j]; k < set.col_begin[j + 1]; ++k, more = true) {
                  const float* from = block + ((t * kh + h) * kw + k) * kLanes;
                  if (more)
                    for (int64_t c = 0; c < count; ++c)
                      store(entry + c * line, load(entry + c * line) + load(from + c * taps * kLanes));
                  else
                    for (int64_t c = 0; c < count; ++c)
                      store(entry + c * line, load(from + c * taps * kLanes));
                }
            }
          }
    }
}

// For the dot kernel: [slot][vector of (row tap, column tap, channel)][output][lane], each slot padded with
// zeros.
template <class E>
static void pack_dot(const DirectJob& job, const WeightSet& set, int64_t first, float* to) {
  typedef typename E::type type;
  const Tensor& w = job.problem->weight;
  const int64_t outputs = job.out_channels, padded = round_up(set.taps() * job.channels, kLanes);
  for (int slot = 0; slot < job.slots; ++slot, to += padded * outputs)
    for (int64_t o = 0; o < outputs; ++o) {
      const type* data = static_cast<const type*>(w.data) + (first + o) * w.stride[0];
      int64_t k = 0;
      auto put = [&](float value) {
        to[(k / kLanes * outputs + o) * kLanes + k % kLanes] = value;
        ++k;
      };
      for (int i = 0; i < set.row_taps; ++i)
        for (int j = 0; j < set.col_taps; ++j)
          for (int64_t c = 0; c < job.channels; ++c) {
            float sum = 0;
            for (uint64_t mask = job.slot_mask[slot]; mask; mask &= mask - 1)
              for (int h = set.row_begin[i]; h < set.row_begin[i + 1]; ++h)
                for (int x = set.col_begin[j]; x < set.col_begin[j + 1]; ++x)
                  sum += E::get(data + c * w.stride[1] + __builtin_ctzll(mask) * w.stride[2] +
                                h * w.stride[3] + x * w.stride[4]);
            put(sum);
          }
      while (k < padded) put(0);
    }
}

// The output pixels of one task: batch item, frame, row, column of each, and the region they belong to.
struct Tile {
  const DirectRegion* region;
  WeightSet set;
  int rows;
  // number: of w within its phase
  int32_t batch[kTileRows], t[kTileRows], h[kTileRows], w[kTileRows], number[kTileRows];
};

// Copies n channels at stride `stride` as float32. May write up to kLanes - 1 floats after n where they will
// be overwritten or never read.
template <class E>
VTOK_INLINE void copy_channels(float* to, const typename E::type* from, int64_t n, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, E::load(from + i));
#if defined(__AVX512F__) && VTOK_LANES == 16
    if (sizeof(*from) == 4) {
      if (i < n) _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(__mmask16((1u << (n - i)) - 1), from + i));
      return;
    }
#endif
  }
  for (; i < n; ++i) to[i] = E::get(from + i * stride);
}

// Rows [r0, r1) of the tile, inner indices [k0, k1) counted from term `term` on, as to[row -
// r0][RowMajor::row]; zeros from k1 to the next multiple of kLanes where the block ends with the term.
template <class E>
static void gather_rows(const DirectJob& job, const Tile& tile, int r0, int r1, int64_t channel0, int term,
                        int64_t k0, int64_t k1, float* to) {
  typedef typename E::type type;
  const int64_t C = job.channels;
  const int row_taps = tile.set.row_taps, col_taps = tile.set.col_taps;
  const int64_t segment = k0 / C;
  const int first_col = int(segment % col_taps), first_row = int(segment / col_taps % row_taps);
  const int first_term = term + int(segment / col_taps / row_taps);
  for (int r = r0; r < r1; ++r, to += RowMajor::row) {
    const DirectTerm* terms = job.terms + job.term_begin[tile.t[r]];
    const int32_t* rows = job.row.source + int64_t(tile.h[r]) * job.row.max_taps;
    const int32_t* cols = job.col.source + int64_t(tile.w[r]) * job.col.max_taps;
    int x = first_term, i = first_row, j = first_col;
    int64_t c = k0 % C;
    float* at = to;
    for (int64_t left = k1 - k0; left > 0;) {
      const int64_t* stride = terms[x].stride;
      const int row = rows[i], col = cols[j];
      int64_t n = min64(C - c, left);
      const int j0 = j;
      ++j;
      if (row < 0 || col < 0) {
        for (int64_t q = 0; q < n; q += kLanes) store(at + q, vfloat{});
      } else {
        // Few channels: neighboring columns that are neighbors in memory are copied as one run.
        if (C < kLanes && stride[4] == C && stride[1] == 1 && job.problem->groups == 1)
          for (; j < col_taps && cols[j] == col + (j - j0) && n < left; ++j) n = min64(n + C, left);
        const type* from = reinterpret_cast<const type*>(terms[x].base) + tile.batch[r] * stride[0] +
                           row * stride[3] + col * stride[4] + (channel0 + c) * stride[1];
        copy_channels<E>(at, from, n, stride[1]);
      }
      at += n;
      left -= n;
      c = 0;
      if (j == col_taps) {
        j = 0;
        if (++i == row_taps) {
          i = 0;
          ++x;
        }
      }
    }
    for (int64_t q = k1 - k0; q % kLanes; ++q) to[q] = 0;
  }
}

// The same block as to[k - k0][row], for inputs whose pixels of a row are adjacent.
template <class E>
static void gather_columns(const DirectJob& job, const Tile& tile, int64_t channel0, int term, int64_t k0,
                           int64_t k1, float* to) {
  typedef typename E::type type;
  struct Run {
    const type* from;  // of channel 0, or null for zeros
    int row, count;
    int64_t step, channel_stride;
  } runs[kTileRows];
  const int64_t C = job.channels;
  const int row_taps = tile.set.row_taps, col_taps = tile.set.col_taps;
  for (int64_t k = k0; k < k1;) {
    const int64_t segment = k / C, c0 = k % C, n = min64(C - c0, k1 - k);
    const int j = int(segment % col_taps), i = int(segment / col_taps % row_taps),
              x = term + int(segment / col_taps / row_taps);
    const DirectAxis::Affine& affine = job.col.affine[tile.region->col_phase * job.col.max_taps + j];
    int count = 0;
    for (int r = 0; r < tile.rows;) {
      const DirectTerm& source = job.terms[job.term_begin[tile.t[r]] + x];
      const int64_t* stride = source.stride;
      // The rows r .. line - 1 lie on one line.
      const int line = int(min64(tile.rows, r + job.col.count(tile.region->col_phase) - tile.number[r]));
      const int row = job.row.source[int64_t(tile.h[r]) * job.row.max_taps + i];
      const type* base =
          reinterpret_cast<const type*>(source.base) + tile.batch[r] * stride[0] + row * stride[3];
      while (r < line) {
        Run& run = runs[count++];
        run.row = r;
        run.channel_stride = stride[1];
        if (row < 0) {
          run.from = nullptr;
          run.count = line - r;
        } else if (tile.number[r] >= affine.lo && tile.number[r] < affine.hi) {
          run.from = base + (affine.first + (tile.number[r] - affine.lo) * affine.step) * stride[4] +
                     channel0 * stride[1];
          run.count = int(min64(line - r, affine.hi - tile.number[r]));
          run.step = affine.step * stride[4];
        } else {
          const int32_t col = job.col.source[int64_t(tile.w[r]) * job.col.max_taps + j];
          run.from = col < 0 ? nullptr : base + col * stride[4] + channel0 * stride[1];
          run.count = 1;
          run.step = 1;
        }
        r += run.count;
      }
    }
    for (int64_t c = c0; c < c0 + n; ++c, ++k) {
      float* line = to + (k - k0) * InnerMajor::inner;
      for (int q = 0; q < count; ++q) {
        const Run& run = runs[q];
        float* at = line + run.row;
        if (!run.from) {
          for (int p = 0; p < run.count; ++p) at[p] = 0;
        } else {
          copy_channels<E>(at, run.from + c * run.channel_stride, run.count, run.step);
        }
      }
    }
  }
}

}  // namespace vtok::cpu::VTOK_ISA
