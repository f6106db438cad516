// Normalization in float32, each value read from memory once: a row of channels (channels-last), or a block
// of neighboring pixels of all channels (planes), is copied to scratch that stays in cache, and the mean,
// the squares about it and the result are computed there. Squares are taken about the mean and corrected by
// the remaining sum of differences, so a large mean costs no accuracy.
#include "cpu/norm_act.h"
#include "cpu/vec.h"

#define VTOK_LAMBDA __attribute__((always_inline))

namespace vtok::cpu::VTOK_ISA {
namespace {

VTOK_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
VTOK_INLINE int64_t rounded_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Lane i's partner at each step of a butterfly: i ^ 8, i ^ 4, i ^ 2, i ^ 1.
alignas(64) const int32_t kPartner[4][16] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                                             {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                                             {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                                             {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};

// The sum of all lanes in log2(lanes) dependent additions instead of lanes.
VTOK_INLINE float total(vfloat v) {
  constexpr int kFirst = 16 / kLanes / 2;  // wider partners do not exist
  for (int step = kFirst; step < 4; ++step) {
    vint partner;
    memcpy(&partner, kPartner[step], sizeof partner);
    v += shuffle(v, partner);
  }
  return v[0];
}

VTOK_INLINE float reciprocal_std(float mean_square, float eps) {
  return 1.0f / __builtin_sqrtf(mean_square + eps);
}

// The first n of kLanes values; the whole vector where n says so.
template <class E>
VTOK_INLINE vfloat read(const typename E::type* p, int n) {
  return n == kLanes ? E::load(p) : load_n<E>(p, n);
}

// A run of pixels of one frame, whose addresses advance by constant steps. Absent tensors are null.
template <class E>
struct Run {
  typedef typename E::type type;
  const type *x, *residual, *scale, *shift;
  type* out;
  int64_t x_step, residual_step, scale_step, shift_step, out_step;
  int64_t pixels;

  VTOK_INLINE_MEMBER void move(int64_t by) {
    x += by * x_step;
    out += by * out_step;
    if (residual) residual += by * residual_step;
    if (scale) scale += by * scale_step;
    if (shift) shift += by * shift_step;
  }
};

template <class E>
VTOK_INLINE const typename E::type* address(const void* data, const int64_t* stride, NormTask k, int64_t c,
                                            int64_t h, int64_t w) {
  if (!data) return nullptr;
  const int64_t at = k.b * stride[0] + c * stride[1] + k.t * stride[2] + h * stride[3] + w * stride[4];
  return static_cast<const typename E::type*>(data) + at;
}

// The pixels of a task from its `done`-th on that lie in one image row, at channel c.
template <class E>
VTOK_INLINE Run<E> run_at(const NormPlan& p, NormTask k, int64_t done, int64_t c) {
  const int64_t h = (k.first + done) / p.width, w = (k.first + done) % p.width;
  return {address<E>(p.x, p.x_stride, k, c, h, w),
          address<E>(p.residual, p.residual_stride, k, c, h, w),
          address<E>(p.scale, p.scale_stride, k, c, h, w),
          address<E>(p.shift, p.shift_stride, k, c, h, w),
          const_cast<typename E::type*>(address<E>(p.out, p.out_stride, k, c, h, w)),
          p.x_stride[4],
          p.residual_stride[4],
          p.scale_stride[4],
          p.shift_stride[4],
          p.out_stride[4],
          at_most(p.width - w, k.count - done)};
}

// What follows the affine part: modulation, SiLU, rounding, store, of the n lanes at out. kPlain: there is no
// modulation.
template <class E, bool kSilu, bool kPlain>
VTOK_INLINE void finish(vfloat y, const typename E::type* scale, const typename E::type* shift,
                        typename E::type* out, int n) {
  if (!kPlain && scale) y *= read<E>(scale, n);
  if (!kPlain && shift) y += read<E>(shift, n);
  if (kSilu) y = silu(y);
  if (n == kLanes)
    E::store(out, y);
  else
    store_n<E>(out, y, n);
}

template <class T>
VTOK_INLINE T* moved(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

// ---- channels-last ----------------------------------------------------------------------------------------

// Calls body(c, n) for each vector of n channels: whole ones, of which the last may overlap the one before it
// (harmless, the same values are computed again), or a single part of one where there are fewer channels than
// lanes.
template <class F>
VTOK_INLINE void for_channels(int64_t channels, F&& body) {
  if (channels < kLanes) return body(int64_t(0), int(channels));
  for (int64_t c = 0; c + kLanes <= channels; c += kLanes) body(c, int(kLanes));
  if (channels % kLanes) body(channels - kLanes, int(kLanes));
}

// Channels [0, n) of one pixel into `row` as float32, residual added, and kLanes zeros after it.
template <class E>
VTOK_INLINE void fill_row(const typename E::type* x, const typename E::type* residual, int64_t channels,
                          float* row) {
  if (residual)
    for_channels(channels, [&](int64_t c, int n)
                               VTOK_LAMBDA { store(row + c, read<E>(x + c, n) + read<E>(residual + c, n)); });
  else
    for_channels(channels, [&](int64_t c, int n) VTOK_LAMBDA { store(row + c, read<E>(x + c, n)); });
  store(row + channels, vfloat{});
}

// LayerNorm or RMSNorm of the `channels` values of every pixel of a run. A few pixels go through each step
// together, because a pixel alone is one long chain of dependent sums, a root and a quotient.
template <class E, bool kSilu, bool kPlain>
void normalize_run(Run<E> r, const float* weight, const float* bias, int64_t channels, bool centered,
                   float eps, float* rows) {
  constexpr int kTogether = 8;
  const int64_t pitch = rounded_up(channels) + kLanes;
  const float inverse = 1.0f / channels;
  float mean[kTogether] = {}, gain[kTogether], offset[kTogether];
  for (int64_t done = 0; done < r.pixels; done += kTogether, r.move(kTogether)) {
    const int together = int(at_most(kTogether, r.pixels - done));
    for (int j = 0; j < together; ++j)
      fill_row<E>(r.x + j * r.x_step, moved(r.residual, j * r.residual_step), channels, rows + j * pitch);
    if (centered)
      for (int j = 0; j < together; ++j) {
        float* row = rows + j * pitch;
        vfloat s = {};
        for (int64_t c = 0; c < channels; c += kLanes) s += load(row + c);
        mean[j] = total(s) * inverse;
        // the lanes after the row equal the mean
        store(row + channels, broadcast(mean[j]));
      }
    for (int j = 0; j < together; ++j) {
      const float* row = rows + j * pitch;
      vfloat d = {}, q = {};
      for (int64_t c = 0; c < channels; c += kLanes) {
        vfloat v = load(row + c) - mean[j];
        d += v;
        q = fma(v, v, q);
      }
      const float left = centered ? total(d) * inverse : 0;
      gain[j] = reciprocal_std(total(q) * inverse - left * left, eps);
      offset[j] = -left * gain[j];
    }
    for (int j = 0; j < together; ++j) {
      const float* row = rows + j * pitch;
      const typename E::type *scale = moved(r.scale, j * r.scale_step),
                             *shift = moved(r.shift, j * r.shift_step);
      typename E::type* out = r.out + j * r.out_step;
      const vfloat m = broadcast(mean[j]), a = broadcast(gain[j]), b = broadcast(offset[j]);
      for_channels(channels, [&](int64_t c, int n) VTOK_LAMBDA {
        vfloat y = fma(fma(load(row + c) - m, a, b), load(weight + c), load(bias + c));
        finish<E, kSilu, kPlain>(y, moved(scale, c), moved(shift, c), out + c, n);
      });
    }
  }
}

template <class E, bool kSilu, bool kPlain>
void positions_rows(const NormPlan& p, NormTask k, float* rows) {
  const int64_t cg = p.channels / p.groups;
  for (int64_t done = 0; done < k.count; done += run_at<E>(p, k, done, 0).pixels)
    for (int64_t c = 0; c < p.channels; c += cg)
      normalize_run<E, kSilu, kPlain>(run_at<E>(p, k, done, c), p.weight + c, p.bias + c, cg, p.centered,
                                      p.eps, rows);
}

// Moments of each group over a task's pixels: the task is copied to scratch, then summed channel by channel.
template <class E>
void moments_rows(const NormPlan& p, NormTask k, Moments* out, float* scratch) {
  const int64_t C = p.channels, cg = C / p.groups, pitch = rounded_up(C) + kLanes;
  float* sums = scratch + k.count * C + kLanes;  // pitch floats each: sum or difference, square, mean
  float *squares = sums + pitch, *means = squares + pitch, *row = scratch;
  for (int64_t done = 0; done < k.count;) {
    Run<E> r = run_at<E>(p, k, done, 0);
    for (int64_t i = 0; i < r.pixels; ++i, row += C)  // the next row overwrites the zeros after each row
      fill_row<E>(r.x + i * r.x_step, moved(r.residual, i * r.residual_step), C, row);
    done += r.pixels;
  }
  const double n = double(k.count) * cg;
  for (int g = 0; g < p.groups; ++g) out[g] = {n, 0, 0};
  if (p.centered) {
    for (int64_t c = 0; c < C; c += kLanes) {
      vfloat even = {}, odd = {};
      for (int64_t i = 0; i + 1 < k.count; i += 2) {
        even += load(scratch + i * C + c);
        odd += load(scratch + (i + 1) * C + c);
      }
      if (k.count % 2) even += load(scratch + (k.count - 1) * C + c);
      store(sums + c, even + odd);
    }
    for (int g = 0; g < p.groups; ++g) {
      double s = 0;
      for (int64_t c = 0; c < cg; ++c) s += sums[g * cg + c];
      out[g].mean = float(s / n);
    }
  }
  for (int g = 0; g < p.groups; ++g)
    for (int64_t c = g * cg; c < (g + 1) * cg; ++c) means[c] = float(out[g].mean);
  for (int64_t c = 0; c < C; c += kLanes) {
    const vfloat mean = load(means + c);
    vfloat d[2] = {}, q[2] = {};  // two chains of sums, even and odd pixels
    for (int64_t i = 0; i < k.count; i += 2)
      for (int j = 0; j < 2 && i + j < k.count; ++j) {
        vfloat v = load(scratch + (i + j) * C + c) - mean;
        d[j] += v;
        q[j] = fma(v, v, q[j]);
      }
    store(sums + c, d[0] + d[1]);
    store(squares + c, q[0] + q[1]);
  }
  for (int g = 0; g < p.groups; ++g) {
    double d = 0, q = 0;
    for (int64_t c = g * cg; c < (g + 1) * cg; ++c) {
      d += sums[c];
      q += squares[c];
    }
    out[g].m2 = p.centered ? q - d * d / n : q;
    if (p.centered) out[g].mean += d / n;
  }
}

template <class E, bool kSilu, bool kPlain>
void apply_rows(const NormPlan& p, NormTask k) {
  const int64_t C = p.channels, span = (p.per_frame ? k.b * p.frames + k.t : k.b) * C;
  const float *mean = p.mean + span, *gain = p.gain + span, *offset = p.offset + span;
  for (int64_t done = 0; done < k.count;) {
    Run<E> r = run_at<E>(p, k, done, 0);
    done += r.pixels;
    for (int64_t i = 0; i < r.pixels; ++i, r.move(1))
      for_channels(C, [&](int64_t c, int n) VTOK_LAMBDA {
        vfloat v = read<E>(r.x + c, n);
        if (!kPlain && r.residual) v += read<E>(r.residual + c, n);
        finish<E, kSilu, kPlain>(fma(v - load(mean + c), load(gain + c), load(offset + c)), moved(r.scale, c),
                                 moved(r.shift, c), r.out + c, n);
      });
  }
}

// ---- planes -----------------------------------------------------------------------------------------------

// Neighboring pixels of one channel into `run` as float32, padded with zeros to a whole vector.
template <class E>
VTOK_INLINE void fill_run(const Run<E>& r, float* run) {
  for (int64_t i = 0; i < r.pixels; i += kLanes) {
    const int n = int(at_most(kLanes, r.pixels - i));
    vfloat v = read<E>(r.x + i, n);
    if (r.residual) v += read<E>(r.residual + i, n);
    store(run + i, v);
  }
}

// The results of a run of one channel; value(i, n) gives the vector at pixel i before modulation, which
// varies along the run or is constant there (step 0).
template <class E, bool kSilu, bool kPlain, class F>
VTOK_INLINE void finish_run(const Run<E>& r, F&& value) {
  const bool along = kPlain || ((!r.scale || r.scale_step) && (!r.shift || r.shift_step));
  int64_t i = 0;
  for (; i + kLanes <= r.pixels && along; i += kLanes)
    finish<E, kSilu, kPlain>(value(i, int(kLanes)), moved(r.scale, i), moved(r.shift, i), r.out + i, kLanes);
  for (; i < r.pixels; i += kLanes) {
    const int n = int(at_most(kLanes, r.pixels - i));
    vfloat y = value(i, n);
    if (!kPlain && r.scale) y *= r.scale_step ? read<E>(r.scale + i, n) : broadcast(E::get(r.scale));
    if (!kPlain && r.shift) y += r.shift_step ? read<E>(r.shift + i, n) : broadcast(E::get(r.shift));
    finish<E, kSilu, true>(y, nullptr, nullptr, r.out + i, n);
  }
}

template <class E, bool kSilu, bool kPlain>
void positions_planes(const NormPlan& p, NormTask k, float* scratch) {
  const int64_t cg = p.channels / p.groups, n = k.count, pitch = rounded_up(n);
  const float inverse = 1.0f / cg;
  float *mean = scratch, *left = mean + pitch, *square = left + pitch, *block = square + pitch;
  for (int64_t c0 = 0; c0 < p.channels; c0 += cg) {
    memset(scratch, 0, 3 * pitch * sizeof(float));
    for (int64_t c = 0; c < cg; ++c) {
      float* run = block + c * pitch;
      fill_run<E>(run_at<E>(p, k, 0, c0 + c), run);
      if (p.centered)
        for (int64_t i = 0; i < n; i += kLanes) store(mean + i, load(mean + i) + load(run + i));
    }
    for (int64_t i = 0; i < n; i += kLanes) store(mean + i, load(mean + i) * inverse);
    for (int64_t c = 0; c < cg; ++c)
      for (int64_t i = 0; i < n; i += kLanes) {
        vfloat v = load(block + c * pitch + i) - load(mean + i);
        store(left + i, load(left + i) + v);
        store(square + i, fma(v, v, load(square + i)));
      }
    for (int64_t i = 0; i < n; i += kLanes) {  // from here on left = -left * rstd, square = rstd
      vfloat d = p.centered ? load(left + i) * inverse : vfloat{}, q = load(square + i) * inverse - d * d,
             rstd;
      for (int j = 0; j < kLanes; ++j) rstd[j] = reciprocal_std(q[j], p.eps);
      store(left + i, -d * rstd);
      store(square + i, rstd);
    }
    for (int64_t c = 0; c < cg; ++c) {
      const float* run = block + c * pitch;
      const vfloat weight = broadcast(p.weight[c0 + c]), bias = broadcast(p.bias[c0 + c]);
      finish_run<E, kSilu, kPlain>(run_at<E>(p, k, 0, c0 + c), [&](int64_t i, int) VTOK_LAMBDA {
        return fma(fma(load(run + i) - load(mean + i), load(square + i), load(left + i)), weight, bias);
      });
    }
  }
}

constexpr int kChains = 4;  // independent sums: one alone would wait for each addition

// The sums of v - pivot and of its square over n values, which are followed by kChains vectors of room.
VTOK_INLINE void differences(float* run, int64_t n, float pivot, float* d, float* q) {
  vfloat ds[kChains] = {}, qs[kChains] = {};
  for (int j = 0; j < kChains; ++j) store(run + n + j * kLanes, broadcast(pivot));  // what differs by nothing
  for (int64_t i = 0; i < n; i += kChains * kLanes)
    for (int j = 0; j < kChains; ++j) {
      vfloat v = load(run + i + j * kLanes) - pivot;
      ds[j] += v;
      qs[j] = fma(v, v, qs[j]);
    }
  *d = total((ds[0] + ds[1]) + (ds[2] + ds[3]));
  *q = total((qs[0] + qs[1]) + (qs[2] + qs[3]));
}

template <class E>
void moments_planes(const NormPlan& p, NormTask k, Moments* out, float* run) {
  const int64_t cg = p.channels / p.groups, n = k.count;
  for (int g = 0; g < p.groups; ++g) {
    double mean = 0, m2 = 0;
    for (int64_t c = 0; c < cg; ++c) {
      fill_run<E>(run_at<E>(p, k, 0, g * cg + c), run);
      float pivot = 0, d, q;
      if (p.centered) {  // any value near the mean will do: that of the first few pixels
        const int64_t few = at_most(n, 16 * kLanes);
        vfloat s = {};
        for (int64_t i = 0; i < few; i += kLanes) s += load(run + i);
        pivot = total(s) / few;
      }
      differences(run, n, pivot, &d, &q);
      if (p.centered) {  // Chan's rule: this channel joins the ones before it
        const double left = double(d) / n, own = pivot + left, delta = own - mean, before = double(n) * c;
        m2 += q - left * left * n + delta * delta * (before * n / (before + n));
        mean += delta * (n / (before + n));
      } else {
        m2 += q;
      }
    }
    out[g] = {double(n) * cg, mean, m2};
  }
}

template <class E, bool kSilu, bool kPlain>
void apply_planes(const NormPlan& p, NormTask k) {
  const int64_t span = (p.per_frame ? k.b * p.frames + k.t : k.b) * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    const Run<E> r = run_at<E>(p, k, 0, c);
    const vfloat mean = broadcast(p.mean[span + c]), gain = broadcast(p.gain[span + c]),
                 offset = broadcast(p.offset[span + c]);
    finish_run<E, kSilu, kPlain>(r, [&](int64_t i, int n) VTOK_LAMBDA {
      vfloat v = read<E>(r.x + i, n);
      if (!kPlain && r.residual) v += read<E>(r.residual + i, n);
      return fma(v - mean, gain, offset);
    });
  }
}

// ---- choice -----------------------------------------------------------------------------------------------

struct No {
  static constexpr bool value = false;
};
struct Yes {
  static constexpr bool value = true;
};

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16: return f(F16{});
    case DType::bf16: return f(BF16{});
    default: return f(F32{});
  }
}

// f(element type, whether SiLU follows, whether nothing is added or modulated).
template <class F>
void with_epilogue(const NormPlan& p, F&& f) {
  with_type(p.dtype, [&](auto e) {
    const bool plain = !p.residual && !p.scale && !p.shift;
    if (p.silu)
      plain ? f(e, Yes{}, Yes{}) : f(e, Yes{}, No{});
    else
      plain ? f(e, No{}, Yes{}) : f(e, No{}, No{});
  });
}

}  // namespace

int64_t norm_scratch(const NormPlan& p) {
  const int64_t cg = p.channels / p.groups;
  const int64_t rows = (p.chunk + 16) * (p.channels + 2 * kLanes),
                planes = (3 + cg) * rounded_up(p.chunk) + (kChains + 1) * kLanes;
  return p.channels_last ? rows : planes;
}

void norm_positions(const NormPlan& p, NormTask k, float* scratch) {
  with_epilogue(p, [&](auto e, auto silu, auto plain) {
    using E = decltype(e);
    (p.channels_last ? positions_rows<E, silu.value, plain.value>
                     : positions_planes<E, silu.value, plain.value>)(p, k, scratch);
  });
}

void group_moments(const NormPlan& p, NormTask k, Moments* out, float* scratch) {
  with_type(p.dtype, [&](auto e) {
    using E = decltype(e);
    (p.channels_last ? moments_rows<E> : moments_planes<E>)(p, k, out, scratch);
  });
}

void group_apply(const NormPlan& p, NormTask k) {
  with_epilogue(p, [&](auto e, auto silu, auto plain) {
    using E = decltype(e);
    (p.channels_last ? apply_rows<E, silu.value, plain.value> : apply_planes<E, silu.value, plain.value>)(p,
                                                                                                          k);
  });
}

}  // namespace vtok::cpu::VTOK_ISA
