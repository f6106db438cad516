// What Winograd convolution does with time: the terms of every output frame, and how frames pass through a block.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_plan.h"
#include "cpu/simd/conv_winograd.h"

namespace vtok::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tile_count(const ConvPlan& plan, int m) { return ceil_div(plan.Ho, m) * ceil_div(plan.Wo, m); }

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
        for (auto& term : all.frames[t]) {
          low = std::min(low, term.source);
          high = std::max(high, term.source);
        }
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

// Computes directly what Winograd must not: the output tiles that read a tile of `uneven` ([batch][source frame]
// [tile], source frames as Terms numbers them), and those of `broken` ([batch][To][tile]).
Status redo_directly(const ConvProblem& problem, const ConvPlan& plan, int m, const Terms& terms,
                     const std::vector<uint8_t>& uneven, std::vector<uint8_t>& broken);

}  // namespace vtok::cpu
