// Winograd convolution: which weights to transform, the sizes of a block, and which thread does what.
#include "cpu/conv_winograd.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/conv_weight_cache.h"
#include "cpu/conv_winograd_schedule.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

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
    w.add = true;
    w.u_stride = kWinogradChunk * panel + 16;
    for (w.c_begin = 0; w.c_begin < channels; w.c_begin = w.c_end) {
      w.c_end = std::min(w.c_begin + block.pitch, channels);
      for (size_t i = 0; i < variants.size(); ++i) {
        u[i] = scratch;
        w.variant = int(i);
        VTOK_DISPATCH(winograd_weights(weight, m, variants[i], p, w.c_begin, w.c_end, scratch, w.u_stride));
        VTOK_DISPATCH(winograd_gemm(block, w, acc));
      }
    }
  }
};

// How a plane is cut: `count` blocks of at most `tiles` tiles.
struct BlockPlan {
  // Each thread has blocks of its own, unless there are few rows or the weights are made on the way: then all
  // threads share a larger block and take panels of it, so that the weights pass once for many rows.
  bool shared;
  int64_t tiles, count;
  Schedule schedule;
};

// The points an odd number of cache lines apart, so that the transforms' stores do not share a set.
int64_t v_stride(int64_t rows, int64_t pitch) { return rows * pitch + (rows * pitch / 16 % 2 ? 0 : 16); }

BlockPlan block_plan(const ConvPlan& plan, const Terms& terms, const Weights& weights, int64_t pitch) {
  const int64_t tiles = tile_count(plan, weights.m);
  const bool shared =
      weights.fused || (tiles * plan.To < 48 * plan.threads && weights.panels >= 2 * plan.threads);
  const int64_t limit = (shared ? kSharedBlock : kOwnBlock) / 4;
  const int64_t want_rows = shared ? 512 : 96;
  int64_t group = std::min<int64_t>(plan.To, 8);
  int64_t block_tiles = std::min(tiles, std::max<int64_t>(want_rows / group, 8));
  for (;;) {
    Schedule schedule(terms, group);
    const int64_t most = limit / (weights.points * pitch * schedule.slots);
    const bool fits = most >= block_tiles;
    if (fits || most >= 14 || (group == 1 && most >= 1) || block_tiles == 1) {
      if (!fits) block_tiles = std::max<int64_t>(most, 1);
      int64_t blocks = ceil_div(tiles, block_tiles);
      if (!shared) {  // as many for every thread
        const int64_t rounds = ceil_div(blocks * plan.batch, plan.threads);
        blocks = std::min(tiles, rounds * plan.threads / plan.batch + (plan.threads % plan.batch != 0));
      }
      block_tiles = ceil_div(tiles, std::max<int64_t>(blocks, 1));
      return {shared, block_tiles, ceil_div(tiles, block_tiles), std::move(schedule)};
    }
    if (group > 1)
      group = (group + 1) / 2;
    else
      block_tiles = std::max<int64_t>(block_tiles / 2, 1);
  }
}

// One call: its memory, and the two orders of work.
class Convolution {
 public:
  Convolution(const ConvProblem& p, const ConvPlan& plan, const Terms& terms, const Weights& weights)
      : plan_(plan), weights_(weights), tiles_(tile_count(plan, weights.m)),
        chunk_(winograd_chunk(plan.channels)), pitch_(chunk_ * winograd_chunks(plan.channels)),
        blocks_(block_plan(plan, terms, weights, pitch_)), sources_(terms.cached + plan.T),
        workers_(blocks_.shared ? plan.threads
                                : int(std::min<int64_t>(plan.threads, blocks_.count * plan.batch))) {
    common_.problem = &p;
    common_.plan = &plan;
    common_.m = weights.m;
    common_.tiles_w = ceil_div(plan.Wo, weights.m);
    common_.all_tiles = tiles_;
    common_.terms = blocks_.schedule.terms.data();
    common_.pitch = chunk_;
    cached_ = terms.cached;
  }

  Status allocate_memory() {
    const Schedule& s = blocks_.schedule;
    v_floats_ = weights_.points * v_stride(s.slots * blocks_.tiles, pitch_);
    acc_floats_ = weights_.points * winograd_acc_stride(s.largest * blocks_.tiles, weights_.panel);
    const int64_t own = (blocks_.shared ? 0 : v_floats_) + acc_floats_ + weights_.scratch_floats();
    own_floats_ = ceil_div(own, 16) * 16 + 16;
    scratch_ = allocate((blocks_.shared ? v_floats_ : 0) + own_floats_ * workers_);
    zeros_.reset(new (std::nothrow) char[plan_.channels * 4 + 64]());
    if (!scratch_ || !zeros_) return Status::OutOfMemory("causal_conv3d: no memory for the Winograd scratch");
    common_.zeros = zeros_.get();
    if (common_.problem->bias) {
      bias_.reset(new (std::nothrow) float[plan_.out_channels]);
      if (!bias_) return Status::OutOfMemory("causal_conv3d: no memory for the bias");
      VTOK_DISPATCH(winograd_bias(common_.problem->bias, bias_.get()));
    }
    common_.bias = bias_.get();
    uneven.assign(plan_.batch * sources_ * tiles_, 0);
    broken.assign(plan_.batch * plan_.To * tiles_, 0);
    return Status::Ok();
  }

  void run() { blocks_.shared ? run_shared() : run_own(); }

  std::vector<uint8_t> uneven, broken;  // of redo_directly

 private:
  float* own_of(int thread) const {
    return scratch_.get() + (blocks_.shared ? v_floats_ : 0) + own_floats_ * thread;
  }

  WinogradBlock block_at(int64_t index, const Schedule::Group& g, float* v) {
    WinogradBlock b = common_;
    b.batch = index / blocks_.count;
    b.tile = index % blocks_.count * blocks_.tiles;
    b.tiles = std::min(blocks_.tiles, tiles_ - b.tile);
    b.frame = g.frame;
    b.frames = g.frames;
    b.runs = g.runs.data();
    b.n_runs = int(g.runs.size());
    b.broken = &broken[b.batch * plan_.To * tiles_];
    b.v = v;
    b.chunk_stride = blocks_.schedule.slots * b.tiles * chunk_;
    b.v_stride = v_stride(blocks_.schedule.slots * b.tiles, pitch_);
    return b;
  }

  void transform_input(const WinogradBlock& b, const Schedule::Load& load, int64_t begin, int64_t end) {
    const int64_t source = load.from_cache ? load.frame : cached_ + load.frame;
    uint8_t* marks = &uneven[(b.batch * sources_ + source) * tiles_];
    VTOK_DISPATCH(winograd_input(b, load.frame, load.from_cache, load.slot, begin, end, marks));
  }

  void panel_step(const WinogradBlock& b, int64_t panel, float* acc) {
    weights_.multiply(b, panel, acc, acc + acc_floats_);
    VTOK_DISPATCH(winograd_output(b, panel, acc));
  }

  void run_own() {
    parallel_for(blocks_.count * plan_.batch, workers_, [&](int64_t task, int thread) {
      float* v = own_of(thread);
      for (const auto& g : blocks_.schedule.groups) {
        const WinogradBlock b = block_at(task, g, v);
        for (const auto& load : g.loads) transform_input(b, load, 0, b.tiles);
        for (int64_t panel = 0; panel < weights_.panels; ++panel) panel_step(b, panel, v + v_floats_);
      }
    });
  }

  void run_shared() {
    for (int64_t index = 0; index < blocks_.count * plan_.batch; ++index)
      for (const auto& g : blocks_.schedule.groups) {
        const WinogradBlock b = block_at(index, g, scratch_.get());
        constexpr int64_t kPiece = 8;  // tiles
        const int64_t pieces = ceil_div(b.tiles, kPiece);
        parallel_for(int64_t(g.loads.size()) * pieces, plan_.threads, [&](int64_t task, int) {
          const int64_t begin = task % pieces * kPiece;
          transform_input(b, g.loads[task / pieces], begin, std::min(begin + kPiece, b.tiles));
        });
        parallel_for(weights_.panels, workers_,
                     [&](int64_t panel, int thread) { panel_step(b, panel, own_of(thread)); });
      }
  }

  const ConvPlan& plan_;
  const Weights& weights_;
  const int64_t tiles_, chunk_, pitch_;
  const BlockPlan blocks_;
  const int64_t sources_;  // source frames, the cache's first
  const int workers_;
  int64_t cached_ = 0, v_floats_ = 0, acc_floats_ = 0, own_floats_ = 0;
  WinogradBlock common_{};
  Floats scratch_;
  std::unique_ptr<char[]> zeros_;
  std::unique_ptr<float[]> bias_;
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
  const Terms terms(p, plan, m);
  Weights weights(p.weight, terms.variants, m);
  VTOK_RETURN_IF_ERROR(weights.prepare(plan.threads));
  Convolution convolution(p, plan, terms, weights);
  VTOK_RETURN_IF_ERROR(convolution.allocate_memory());
  convolution.run();
  return redo_directly(p, plan, m, terms, convolution.uneven, convolution.broken);
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
    for (const auto& term : frame) {
      ++count;
      sources.push_back(term.source);
    }
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
  return 15e-6 + (std::max(product, streamed) + moved + prepared) / plan.threads;
}

}  // namespace vtok::cpu
