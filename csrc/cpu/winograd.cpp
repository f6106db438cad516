// Winograd convolution: which weights to transform, how frames pass through a block, and which thread does
// what.
#include "cpu/winograd.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/simd/conv_winograd.h"
#include "cpu/weight_cache.h"

namespace vtok::cpu {
namespace {

constexpr int kMaxVariants = 64;
// Bytes of transformed weights beyond which they are neither kept nor stored: making them again where they
// are used, a piece at a time in the second-level cache, was measured to be as fast as reading so many from
// memory.
constexpr int64_t kStoredWeights = 16 << 20;
constexpr int64_t kOwnBlock = 4 << 20, kSharedBlock = 16 << 20;  // bytes of V

using Floats = std::shared_ptr<float>;

Floats allocate(int64_t floats) {
  void* p = std::aligned_alloc(64, size_t((floats * 4 + 63) / 64 * 64));
  if (p) advise_huge_pages(p, floats * 4);
  return Floats(static_cast<float*>(p), std::free);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tile_count(const ConvPlan& plan, int m) { return ceil_div(plan.Ho, m) * ceil_div(plan.Wo, m); }

// The terms of every output frame, with source frames numbered along one timeline, the cache's first.
struct Terms {
  struct Term {
    int64_t source;
    int variant;
  };
  std::vector<uint64_t> variants;
  std::vector<std::vector<Term>> frames;
  int64_t cached;

  // Taps that read the same frame are summed in the weights. Where that is rare (the first frame of a long
  // clip under replication) they stay apart instead, which saves transforming and keeping another set of
  // weights.
  Terms(const ConvProblem& p, const ConvPlan& plan, int m)
      : frames(plan.To), cached(p.cache ? p.cache.size[2] : 0) {
    auto extra = [&](uint64_t mask) { return __builtin_popcountll(mask) - 1; };
    std::vector<int64_t> uses(plan.variants.size(), 0);
    for (const FrameTap& tap : plan.frame_taps) ++uses[tap.variant];
    auto single = [&](uint64_t mask) {
      return std::find(plan.variants.begin(), plan.variants.end(), mask) != plan.variants.end();
    };
    auto split = [&](int v) {
      const uint64_t mask = plan.variants[v];
      for (uint64_t rest = mask; rest; rest &= rest - 1)
        if (!single(rest & -rest)) return false;
      const int64_t more = uses[v] * extra(mask);
      return more * 10 <= int64_t(plan.frame_taps.size()) || more * plan.batch * tile_count(plan, m) <= 96;
    };
    for (int64_t t = 0; t < plan.To; ++t)
      for (int64_t i = plan.frame_begin[t]; i < plan.frame_begin[t + 1]; ++i) {
        const FrameTap& tap = plan.frame_taps[i];
        const int64_t source = tap.from_cache ? tap.frame : cached + tap.frame;
        const uint64_t mask = plan.variants[tap.variant];
        if (!extra(mask) || !split(tap.variant)) {
          frames[t].push_back({source, index(mask)});
        } else {
          for (uint64_t rest = mask; rest; rest &= rest - 1)
            frames[t].push_back({source, index(rest & -rest)});
        }
      }
  }
  int index(uint64_t mask) {
    auto found = std::find(variants.begin(), variants.end(), mask);
    if (found == variants.end()) found = variants.insert(found, mask);
    return int(found - variants.begin());
  }
};

// How frames pass through a block: groups of output frames, and a ring of slots for the source frames they
// read.
struct Schedule {
  struct Load {
    int64_t frame;
    bool from_cache;
    int slot;
  };
  struct Group {
    int64_t frame, frames;
    std::vector<Load> loads;  // source frames to transform before this group
    std::vector<WinogradRun> runs;
  };
  int64_t slots = 1, largest = 0;  // frames of the largest group
  std::vector<Group> groups;
  std::vector<WinogradTerm> terms;

  Schedule(const Terms& all, int64_t group_frames) {
    const int64_t To = int64_t(all.frames.size()), n_groups = ceil_div(To, group_frames);
    for (int64_t g = 0; g < n_groups; ++g)
      groups.push_back({To * g / n_groups, To * (g + 1) / n_groups - To * g / n_groups, {}, {}});
    for (const Group& g : groups) {
      int64_t low = INT64_MAX, high = -1;
      for (int64_t t = g.frame; t < g.frame + g.frames; ++t)
        for (auto& term : all.frames[t]) low = std::min(low, term.source), high = std::max(high, term.source);
      slots = std::max(slots, high - low + 1);
      largest = std::max(largest, g.frames);
    }
    std::vector<int64_t> holds(slots, -1);
    for (Group& g : groups)
      for (int64_t t = g.frame; t < g.frame + g.frames; ++t) {
        const auto& frame = all.frames[t];
        const int32_t first = int32_t(terms.size());
        for (auto& term : frame) {
          const int slot = int(term.source % slots);
          terms.push_back({slot, term.variant});
          if (holds[slot] == term.source) continue;
          holds[slot] = term.source;
          const bool from_cache = term.source < all.cached;
          g.loads.push_back({from_cache ? term.source : term.source - all.cached, from_cache, slot});
        }
        if (!g.runs.empty() && continues(g.runs.back(), first, int32_t(frame.size())))
          ++g.runs.back().frames;
        else
          g.runs.push_back({int32_t(t - g.frame), 1, first, int32_t(frame.size())});
      }
  }

 private:
  bool continues(const WinogradRun& run, int32_t first, int32_t count) const {
    if (run.terms != count) return false;
    for (int32_t i = 0; i < count; ++i)
      if (terms[first + i].variant != terms[run.term + i].variant ||
          terms[first + i].slot != terms[run.term + i].slot + run.frames)
        return false;
    return true;
  }
};

// Transformed weights of a call, from the cache or made in advance, or made panel by panel where they are
// used ("fused").
struct Weights {
  const Tensor& weight;
  const std::vector<uint64_t>& variants;
  int m, points, panel;
  int64_t channels, panels, stride;  // floats from xi to xi of one panel
  std::vector<std::shared_ptr<const float>> sets;
  bool fused;

  Weights(const Tensor& w, const std::vector<uint64_t>& variants, int m)
      : weight(w), variants(variants), m(m), points((m + 2) * (m + 2)),
        panel(VTOK_DISPATCH(winograd_panel())), channels(w.size[1]), panels(ceil_div(w.size[0], panel)),
        stride(channels * panel + 16), fused(set_bytes() * int64_t(variants.size()) > kStoredWeights) {}

  int64_t set_bytes() const { return panels * points * stride * 4; }

  Status prepare(int threads) {
    if (fused) return Status::Ok();
    sets.assign(variants.size(), nullptr);
    WeightKey key = weight_key(weight, m, panel);
    const bool caching = weight_cache_enabled();
    if (caching) checksum_weights(weight, threads, key.sum);
    std::vector<size_t> missing;
    for (size_t i = 0; i < variants.size(); ++i) {
      key.taps = variants[i];
      if (caching) sets[i] = find_weights(key);
      if (!sets[i]) missing.push_back(i);
    }
    const bool keep = caching && weight_cache_has_room(key, set_bytes() * int64_t(missing.size()));
    std::vector<float*> made;
    for (size_t i : missing) {
      Floats set = allocate(set_bytes() / 4);
      if (!set) return Status::OutOfMemory("causal_conv3d: no memory for transformed weights");
      made.push_back(set.get());
      sets[i] = std::move(set);
    }
    constexpr int64_t kPiece = 32;  // input channels
    const int64_t pieces = ceil_div(channels, kPiece);
    parallel_for(int64_t(missing.size()) * panels * pieces, threads, [&](int64_t task, int) {
      const int64_t c = task % pieces * kPiece, p = task / pieces % panels, i = task / pieces / panels;
      VTOK_DISPATCH(winograd_weights(weight, m, variants[missing[i]], p, c, std::min(c + kPiece, channels),
                                     made[i] + p * points * stride + c * panel, stride));
    });
    if (keep)
      for (size_t i : missing) {
        key.taps = variants[i];
        insert_weights(key, sets[i], set_bytes());
      }
    return Status::Ok();
  }

  int64_t scratch_floats() const { return fused ? points * (kWinogradChunk * panel + 16) : 0; }

  // acc = V * U of one panel.
  void multiply(const WinogradBlock& block, int64_t p, float* acc, float* scratch) const {
    const float* u[kMaxVariants];
    WinogradPanel w{u, stride, 0, channels, -1, false};
    if (!fused) {
      for (size_t i = 0; i < sets.size(); ++i) u[i] = sets[i].get() + p * points * stride;
      VTOK_DISPATCH(winograd_gemm(block, w, acc));
      return;
    }
    std::fill(acc, acc + points * winograd_acc_stride(block.frames * block.tiles, panel), 0.0f);
    w.add = true, w.u_stride = kWinogradChunk * panel + 16;
    for (w.c_begin = 0; w.c_begin < channels; w.c_begin = w.c_end) {
      w.c_end = std::min(w.c_begin + block.pitch, channels);
      for (size_t i = 0; i < variants.size(); ++i) {
        u[i] = scratch, w.variant = int(i);
        VTOK_DISPATCH(winograd_weights(weight, m, variants[i], p, w.c_begin, w.c_end, scratch, w.u_stride));
        VTOK_DISPATCH(winograd_gemm(block, w, acc));
      }
    }
  }
};

}  // namespace

bool winograd_can_run(const ConvProblem& p, const ConvPlan& plan, int m) {
  return (m == 2 || m == 4) && plan.kh == 3 && plan.kw == 3 && p.groups == 1 && p.stride[1] == 1 &&
         p.stride[2] == 1 && p.dilation[1] == 1 && p.dilation[2] == 1 && plan.channels > 0 &&
         plan.batch > 0 && plan.out_channels > 0 && plan.To > 0 && plan.Ho > 0 && plan.Wo > 0 &&
         plan.variants.size() <= kMaxVariants;
}

Status conv_winograd(const ConvProblem& p, const ConvPlan& plan, int m) {
  if (!winograd_can_run(p, plan, m))
    return Status::Unsupported(
        "causal_conv3d: Winograd needs a 3x3 plane at stride and dilation 1, one group");
  const int threads = std::max(p.threads, 1);
  const Terms terms(p, plan, m);
  Weights weights(p.weight, terms.variants, m);
  VTOK_RETURN_IF_ERROR(weights.prepare(threads));

  const int64_t tiles = tile_count(plan, m), points = weights.points;
  const int64_t chunk = winograd_chunk(plan.channels), pitch = chunk * winograd_chunks(plan.channels);
  // The points an odd number of cache lines apart, so that the transforms' stores do not share a set.
  auto v_stride = [&](int64_t rows) { return rows * pitch + (rows * pitch / 16 % 2 ? 0 : 16); };

  // Each thread has blocks of its own, unless there are few rows or the weights are made on the way: then all
  // threads share a larger block and take panels of it, so that the weights pass once for many rows.
  const bool shared = weights.fused || (tiles * plan.To < 48 * threads && weights.panels >= 2 * threads);
  const int64_t limit = (shared ? kSharedBlock : kOwnBlock) / 4;
  const int64_t want_rows = shared ? 512 : 96;
  int64_t group = std::min<int64_t>(plan.To, 8);
  int64_t block_tiles = std::min(tiles, std::max<int64_t>(want_rows / group, 8));
  std::unique_ptr<Schedule> schedule;
  for (;;) {
    schedule = std::make_unique<Schedule>(terms, group);
    const int64_t most = limit / (points * pitch * schedule->slots);
    if (most >= block_tiles) break;
    if (most >= 14 || (group == 1 && most >= 1) || block_tiles == 1) {
      block_tiles = std::max<int64_t>(most, 1);
      break;
    }
    if (group > 1)
      group = (group + 1) / 2;
    else
      block_tiles = std::max<int64_t>(block_tiles / 2, 1);
  }
  int64_t blocks = ceil_div(tiles, block_tiles);
  if (!shared)
    blocks = std::min(
        tiles, ceil_div(blocks * plan.batch, threads) * threads / plan.batch + (threads % plan.batch != 0));
  blocks = std::max<int64_t>(blocks, 1);
  block_tiles = ceil_div(tiles, blocks);
  blocks = ceil_div(tiles, block_tiles);

  const int workers = int(std::min<int64_t>(threads, shared ? threads : blocks * plan.batch));
  const int64_t v_floats = points * v_stride(schedule->slots * block_tiles);
  const int64_t acc_floats = points * winograd_acc_stride(schedule->largest * block_tiles, weights.panel);
  const int64_t own = ceil_div((shared ? 0 : v_floats) + acc_floats + weights.scratch_floats(), 16) * 16 + 16;
  Floats scratch = allocate((shared ? v_floats : 0) + own * workers);
  std::unique_ptr<char[]> zeros(new (std::nothrow) char[plan.channels * 4 + 64]());
  std::unique_ptr<float[]> bias;
  if (!scratch || !zeros) return Status::OutOfMemory("causal_conv3d: no memory for the Winograd scratch");
  auto own_of = [&](int thread) { return scratch.get() + (shared ? v_floats : 0) + own * thread; };

  WinogradBlock common{};
  common.problem = &p, common.plan = &plan, common.zeros = zeros.get(), common.m = m;
  if (p.bias) {
    bias.reset(new (std::nothrow) float[plan.out_channels]);
    if (!bias) return Status::OutOfMemory("causal_conv3d: no memory for the bias");
    VTOK_DISPATCH(winograd_bias(p.bias, bias.get()));
  }
  common.bias = bias.get();
  common.tiles_w = ceil_div(plan.Wo, m), common.terms = schedule->terms.data();
  common.pitch = chunk;
  auto block_at = [&](int64_t index, const Schedule::Group& g, float* v) {
    WinogradBlock b = common;
    b.batch = index / blocks, b.tile = index % blocks * block_tiles,
    b.tiles = std::min(block_tiles, tiles - b.tile);
    b.frame = g.frame, b.frames = g.frames, b.runs = g.runs.data(), b.n_runs = int(g.runs.size());
    b.v = v, b.chunk_stride = schedule->slots * b.tiles * chunk,
    b.v_stride = v_stride(schedule->slots * b.tiles);
    return b;
  };
  auto panel_step = [&](const WinogradBlock& b, int64_t panel, float* acc) {
    weights.multiply(b, panel, acc, acc + acc_floats);
    VTOK_DISPATCH(winograd_output(b, panel, acc));
  };

  if (!shared) {
    parallel_for(blocks * plan.batch, workers, [&](int64_t task, int thread) {
      float* v = own_of(thread);
      for (const auto& g : schedule->groups) {
        const WinogradBlock b = block_at(task, g, v);
        for (const auto& load : g.loads)
          VTOK_DISPATCH(winograd_input(b, load.frame, load.from_cache, load.slot, 0, b.tiles));
        for (int64_t panel = 0; panel < weights.panels; ++panel) panel_step(b, panel, v + v_floats);
      }
    });
    return Status::Ok();
  }
  for (int64_t index = 0; index < blocks * plan.batch; ++index)
    for (const auto& g : schedule->groups) {
      const WinogradBlock b = block_at(index, g, scratch.get());
      constexpr int64_t kPiece = 8;  // tiles
      const int64_t pieces = ceil_div(b.tiles, kPiece);
      parallel_for(int64_t(g.loads.size()) * pieces, threads, [&](int64_t task, int) {
        const auto& load = g.loads[task / pieces];
        const int64_t begin = task % pieces * kPiece;
        VTOK_DISPATCH(winograd_input(b, load.frame, load.from_cache, load.slot, begin,
                                     std::min(begin + kPiece, b.tiles)));
      });
      parallel_for(weights.panels, workers,
                   [&](int64_t panel, int thread) { panel_step(b, panel, own_of(thread)); });
    }
  return Status::Ok();
}

// Constants per thread, measured on one core of a Zen 5 server in CPU time; the rates are those of the direct
// convolution's model except for AVX-512, whose larger matrices wait for the last-level cache a little.
double winograd_seconds(const ConvProblem& p, const ConvPlan& plan, int m) {
  // flop/s of the products; seconds per pixel and channel of one plane's transform
  double rate = 41e9, move = 0.9e-9;
  switch (active_isa()) {
    case Isa::avx512: rate = 205e9, move = 0.45e-9; break;
    case Isa::avx2: rate = 106e9, move = 0.45e-9; break;
    case Isa::wide: rate = 15e9; break;
    case Isa::portable: break;
  }
  const Terms terms(p, plan, m);
  Weights weights(p.weight, terms.variants, m);
  std::vector<int64_t> sources;
  int64_t count = 0;
  for (const auto& frame : terms.frames)
    for (const auto& term : frame) ++count, sources.push_back(term.source);
  std::sort(sources.begin(), sources.end());
  const auto distinct = std::unique(sources.begin(), sources.end()) - sources.begin();

  const double rows = double(plan.batch) * tile_count(plan, m), depth = double(plan.channels);
  const double columns = double(weights.panels) * weights.panel, sets = double(terms.variants.size());
  const double product = 2.0 * weights.points * rows * count * depth * columns / rate;
  const double moved = move * rows * m * m * (distinct * depth + plan.To * columns);
  double streamed = 0, prepared = sets * weights.points * depth * columns * 0.2e-9;
  if (weights.fused) {  // once for each block of V
    prepared *= std::max(1.0, rows * plan.To * 1.2 * depth * weights.points * 4 / kSharedBlock);
  } else {
    streamed = sets * weights.set_bytes() * std::max(1.0, rows * plan.To / 96) / 20e9;
    if (weight_cache_enabled() &&
        weight_cache_expects(weight_key(p.weight, m, weights.panel), int64_t(sets) * weights.set_bytes()))
      // the checksum
      prepared = depth * plan.out_channels * plan.kt * 9 * element_size(p.weight.dtype) / 15e9;
  }
  return 15e-6 + (std::max(product, streamed) + moved + prepared) / std::max(p.threads, 1);
}

}  // namespace vtok::cpu
