// The direct convolution on one instruction set: weights are packed once per call, then every task gathers a
// block of input pixels (zeros, border copies and upsampling happen in that gather), multiplies it with all
// panels of its output channels, and finishes the tile (bias, activation, residual, type) while it is in the
// cache.
#include "cpu/simd/conv_direct.h"

#include <cstdlib>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "cpu/simd/conv_direct_pack.h"
#include "cpu/simd/conv_epilogue.h"

namespace vtok::cpu::VTOK_ISA {
namespace {

template <class E>
struct Direct {
  typedef typename E::type type;
  const DirectJob& job;
  const ConvProblem& problem;
  const ConvPlan& plan;
  bool dot, inner_major;
  int sets, groups, threads;
  int64_t panels;        // of one group
  int64_t panel_floats;  // of the largest weight set
  // output pixels of a task at most; tasks that share one group's output channels
  int64_t tile_rows = 0, splits = 1;
  float* weights = nullptr;
  float* scratch = nullptr;
  float* bias = nullptr;
  float* zero_line = nullptr;  // the channels of a pixel in the padding
  int64_t scratch_floats = 0;

  explicit Direct(const DirectJob& j) : job(j), problem(*j.problem), plan(*j.plan) {
    const int64_t* stride = problem.x.stride;
    inner_major = stride[1] != 1 && stride[4] == 1 && job.channels > 1;
    dot = !inner_major && job.out_channels <= kFewOutputs;
    sets = job.row.phases * job.col.phases;
    groups = problem.groups;
    threads = plan.threads;
    panels = dot ? 1 : (job.out_channels + kPanel - 1) / kPanel;
  }

  WeightSet set_of(int row_phase, int col_phase) const {
    return {job.row.begin + row_phase * (job.row.max_taps + 1),
            job.col.begin + col_phase * (job.col.max_taps + 1), job.row.taps[row_phase],
            job.col.taps[col_phase]};
  }
  float* panel_at(int set, int group, int64_t panel) const {
    return weights + ((int64_t(set) * groups + group) * panels + panel) * panel_floats;
  }
  int set_index(const DirectRegion& region) const {
    return region.row_phase * job.col.phases + region.col_phase;
  }
  int64_t slot_depth(const WeightSet& set) const {
    const int64_t depth = set.taps() * job.channels;
    return dot ? round_up(depth, kLanes) : depth;
  }
  int64_t tiles_of(const DirectRegion& region) const { return (region.pixels + tile_rows - 1) / tile_rows; }

  // Tiles as large as the cache likes; split over the output channels, then smaller, where that would leave
  // threads idle.
  void choose_tasks() {
    int64_t pixels = 0;
    for (int64_t i = 0; i < job.region_count; ++i) pixels += job.regions[i].pixels;
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;
    tile_rows = kTileRows;
    splits = (panels * kPanel + kMostChannels - 1) / kMostChannels;
    auto tasks = [&] { return (pixels + tile_rows - 1) / tile_rows * groups * splits; };
    while (tasks() < wanted && panels >= (splits + 1) * 4) ++splits;
    while (tasks() < wanted && tile_rows > 4 * kRows) tile_rows -= kRows;
    while (tasks() < wanted && panels > splits) ++splits;
  }

  // of one task: bounds its sums to a quarter of a usual L2 cache
  static constexpr int64_t kMostChannels = 512;
  static constexpr int64_t kDotSums = 32 * kLanes;

  int64_t block_floats() const {
    return inner_major ? int64_t(kDepth) * kTileRows + kLanes : int64_t(kTileRows) * kDepthStride;
  }
  int64_t panels_per_task() const { return (panels + splits - 1) / splits; }

  bool allocate() {
    const int64_t taps = problem.weight.size[2] * problem.weight.size[3] * problem.weight.size[4];
    panel_floats = 0;
    for (int i = 0; i < job.row.phases; ++i)
      for (int j = 0; j < job.col.phases; ++j) {
        const int64_t depth = slot_depth(set_of(i, j)) * job.slots;
        panel_floats = depth > panel_floats ? depth : panel_floats;
      }
    if (dot)
      panel_floats *= job.out_channels;
    else
      panel_floats *= job.out_channels <= kLanes ? kLanes : kPanel;
    const int64_t segments = job.slots ? max_terms() * max_set_taps() : 0;
    const int64_t for_panels = dot ? round_up(segments * 16 * int64_t(sizeof(float*)) / 4, kLanes) + kDotSums
                                   : panels_per_task() * kTileRows * kPanel;
    const int64_t for_packing = dot ? 0 : kLanes * taps * kLanes;
    scratch_floats = block_floats() + for_panels;
    if (scratch_floats < for_packing) scratch_floats = for_packing;
    scratch_floats = round_up(scratch_floats, 16) + 16;
    const int64_t weight_floats = round_up(int64_t(sets) * groups * panels * panel_floats, 16);
    const int64_t bias_floats = round_up(plan.out_channels, 16);
    const int64_t zero_floats = round_up(job.channels, 16);
    const int64_t total = (weight_floats + bias_floats + zero_floats + threads * scratch_floats) * 4;
    weights = static_cast<float*>(aligned_alloc(64, size_t(total)));
    if (!weights) return false;
    advise_huge_pages(weights, total);
    bias = weights + weight_floats;
    zero_line = bias + bias_floats;
    scratch = zero_line + zero_floats;
    for (int64_t i = 0; i < zero_floats; ++i) zero_line[i] = 0;
    return true;
  }
  int64_t max_terms() const {
    int64_t most = 0;
    for (int64_t t = 0; t < plan.To; ++t) {
      const int64_t n = job.term_begin[t + 1] - job.term_begin[t];
      most = n > most ? n : most;
    }
    return most;
  }
  int64_t max_set_taps() const { return int64_t(job.row.max_taps) * job.col.max_taps; }

  void pack_weights() {
    parallel_for(int64_t(sets) * groups * panels, threads, [&](int64_t task, int thread) {
      const int64_t panel = task % panels;
      const int group = int(task / panels % groups), set = int(task / panels / groups);
      const WeightSet weight_set = set_of(set / job.col.phases, set % job.col.phases);
      const int64_t first = group * job.out_channels + panel * kPanel;
      if (dot)
        pack_dot<E>(job, weight_set, first, panel_at(set, group, 0));
      else
        pack_panel<E>(job, weight_set, first, min64(kPanel, job.out_channels - panel * kPanel),
                      panel_at(set, group, panel), scratch + thread * scratch_floats);
    });
  }

  // Tile number `index` of a region, whose pixels are ordered (batch, frame, row, column).
  void fill(Tile* tile, const DirectRegion& region, int64_t index) const {
    const DirectPattern& pattern = job.patterns[region.pattern];
    const int64_t ws = job.col.count(region.col_phase), hs = job.row.count(region.row_phase);
    tile->region = &region;
    tile->set = set_of(region.row_phase, region.col_phase);
    const int64_t tiles = tiles_of(region), first = region.pixels * index / tiles;
    tile->rows = int(region.pixels * (index + 1) / tiles - first);
    int64_t w = first % ws, h = first / ws % hs, t = first / ws / hs % pattern.count,
            b = first / ws / hs / pattern.count;
    for (int r = 0; r < tile->rows; ++r) {
      tile->batch[r] = int32_t(b);
      tile->t[r] = pattern.frames[t];
      tile->number[r] = int32_t(w);
      tile->h[r] = int32_t(region.row_phase + h * job.row.phases);
      tile->w[r] = int32_t(region.col_phase + w * job.col.phases);
      if (++w < ws) continue;
      w = 0;
      if (++h < hs) continue;
      h = 0;
      if (++t < pattern.count) continue;
      t = 0;
      ++b;
    }
  }

  void multiply_task(const Tile& tile, int group, int64_t split, float* block) const {
    const int64_t panel0 = split * panels / splits, panel1 = (split + 1) * panels / splits;
    float* sums = block + block_floats();
    const int row_groups = (tile.rows + kRows - 1) / kRows;
    const int terms = job.patterns[tile.region->pattern].terms;
    // slots are the same for all rows of a tile
    const DirectTerm* term = job.terms + job.term_begin[tile.t[0]];
    const int64_t depth_of_slot = slot_depth(tile.set);
    const Epilogue<E> epilogue(problem, plan, problem.bias ? bias : nullptr);
    bool first = true;
    auto multiply_block = [&](int64_t weight_row, int64_t depth, bool last) {
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const int64_t width = min64(kPanel, job.out_channels - panel * kPanel);
        const int vectors = width > kLanes ? kVectors : 1;
        const float* b = panel_at(set_index(*tile.region), group, panel) + weight_row * vectors * kLanes;
        float* c = sums + (panel - panel0) * kTileRows * kPanel;
        for (int i = 0; i < row_groups; ++i) {
          const int r0 = tile.rows * i / row_groups, r1 = tile.rows * (i + 1) / row_groups;
          const int64_t channel = group * job.out_channels + panel * kPanel;
          if (last) prefetch_out(epilogue, tile, r0, r1, channel, width);
          Multiply multiply;
          if (inner_major)
            multiply = vectors == kVectors ? multiply_of<InnerMajor, kVectors>(r1 - r0)
                                           : multiply_of<InnerMajor, 1>(r1 - r0);
          else
            multiply = vectors == kVectors ? multiply_of<RowMajor, kVectors>(r1 - r0)
                                           : multiply_of<RowMajor, 1>(r1 - r0);
          multiply(block + r0 * (inner_major ? InnerMajor::row : RowMajor::row), b, depth, c + r0 * kPanel,
                   !first);
          if (last) finish(epilogue, tile, r0, r1, c + r0 * kPanel, channel, width);
        }
      }
      first = false;
    };
    if (terms == 0) return multiply_block(0, 0, true);
    for (int x = 0; x < terms;) {
      int end = x + 1;  // terms x .. end - 1 are adjacent in the packed weights
      while (end < terms && term[end].slot == term[end - 1].slot + 1) ++end;
      const int64_t depth = (end - x) * depth_of_slot, blocks = (depth + kDepth - 1) / kDepth;
      const int64_t step = round_up((depth + blocks - 1) / blocks, kLanes);
      for (int64_t k = 0; k < depth; k += step) {
        const int64_t stop = min64(k + step, depth);
        if (inner_major)
          gather_columns<E>(job, tile, group * job.channels, x, k, stop, block);
        else
          gather_rows<E>(job, tile, 0, tile.rows, group * job.channels, x, k, stop, block);
        multiply_block(term[x].slot * depth_of_slot + k, stop - k, end == terms && stop == depth);
      }
      x = end;
    }
  }

  // The lines that finish() will write arrive while the product runs.
  void prefetch_out(const Epilogue<E>& epilogue, const Tile& tile, int r0, int r1, int64_t channel,
                    int64_t width) const {
    for (int r = r0; r < r1; ++r) {
      const type* out = epilogue.out_pixel(tile.batch[r], tile.t[r], tile.h[r], tile.w[r]) + channel;
      for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(type))) __builtin_prefetch(out + i, 1);
    }
  }

  // c: the sums of the rows r0 .. r1 - 1.
  void finish(const Epilogue<E>& epilogue, const Tile& tile, int r0, int r1, const float* c, int64_t channel,
              int64_t width) const {
    for (int r = r0; r < r1; ++r, c += kPanel) {
      type* out = epilogue.out_pixel(tile.batch[r], tile.t[r], tile.h[r], tile.w[r]);
      const type* residual = epilogue.residual_pixel(tile.batch[r], tile.t[r], tile.h[r], tile.w[r]);
      for (int v = 0; v * kLanes < width; ++v)
        epilogue.finish(load(c + v * kLanes), channel + v * kLanes, out, residual,
                        int(min64(kLanes, width - v * kLanes)));
    }
  }

  void dot_task(const Tile& tile, int group, float* block) const {
    const int outputs = int(job.out_channels), rows = dot_rows(outputs);
    const Dot kernel = dot_of(outputs);
    const int terms = job.patterns[tile.region->pattern].terms;
    const int64_t C = job.channels, channel0 = group * C, taps = tile.set.taps(),
                  depth = slot_depth(tile.set);
    // Whole vectors of float32 channels are read where they are; anything else is gathered first.
    const bool in_place = sizeof(type) == 4 && C % kLanes == 0 &&
                          (!problem.cache || problem.cache.stride[1] == 1) && problem.x.stride[1] == 1;
    const Epilogue<E> epilogue(problem, plan, problem.bias ? bias : nullptr);
    const float* weight = panel_at(set_index(*tile.region), group, 0);
    float* sums = block + block_floats();
    const float** at = reinterpret_cast<const float**>(sums + kDotSums);
    for (int r0 = 0; r0 < tile.rows; r0 += rows) {
      const int r1 = int(min64(r0 + rows, tile.rows));
      for (int i = 0; i < rows * outputs; ++i) store(sums + i * kLanes, vfloat{});
      for (int x = 0; x < terms; ++x) {
        const DirectTerm* term = job.terms + job.term_begin[tile.t[r0]] + x;
        const float* b = weight + term->slot * depth * outputs;
        if (in_place) {
          for (int r = 0; r < rows; ++r) {
            // surplus rows repeat the first; their sums are not read
            const int p = r0 + r < r1 ? r0 + r : r0;
            const DirectTerm& source = job.terms[job.term_begin[tile.t[p]] + x];
            const float* base =
                reinterpret_cast<const float*>(source.base) + tile.batch[p] * source.stride[0] + channel0;
            int64_t segment = 0;
            for (int i = 0; i < tile.set.row_taps; ++i)
              for (int j = 0; j < tile.set.col_taps; ++j, ++segment) {
                const int32_t row = job.row.source[int64_t(tile.h[p]) * job.row.max_taps + i];
                const int32_t col = job.col.source[int64_t(tile.w[p]) * job.col.max_taps + j];
                at[segment * rows + r] =
                    row < 0 || col < 0 ? zero_line : base + row * source.stride[3] + col * source.stride[4];
              }
          }
          kernel(at, taps, C / kLanes, b, sums);
        } else {
          for (int64_t k = 0; k < depth; k += kDepth) {
            const int64_t stop = min64(k + kDepth, taps * C);
            gather_rows<E>(job, tile, r0, r1, channel0, x, k, stop, block);
            for (int r = 0; r < rows; ++r) at[r] = block + (r0 + r < r1 ? r : 0) * RowMajor::row;
            kernel(at, 1, (stop - k + kLanes - 1) / kLanes, b + k * outputs, sums);
          }
        }
      }
      for (int r = r0; r < r1; ++r) {
        float line[kPanel];
        for (int o = 0; o < outputs; ++o) line[o] = tree_sum(load(sums + ((r - r0) * outputs + o) * kLanes));
        finish(epilogue, tile, r, r + 1, line, group * outputs, outputs);
      }
    }
  }
  bool run() {
    choose_tasks();
    if (!allocate()) return false;
    for (int64_t i = 0; i < plan.out_channels && problem.bias; ++i)
      bias[i] = problem.bias.dtype == DType::f32 ? static_cast<const float*>(problem.bias.data)[i]
                                                 : E::get(static_cast<const type*>(problem.bias.data) + i);
    pack_weights();
    int64_t tasks = 0;
    for (int64_t i = 0; i < job.region_count; ++i) tasks += tiles_of(job.regions[i]) * groups * splits;
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      const DirectRegion* region = job.regions;
      for (; task >= tiles_of(*region) * groups * splits; ++region)
        task -= tiles_of(*region) * groups * splits;
      Tile tile;
      fill(&tile, *region, task / splits / groups);
      const int group = int(task / splits % groups);
      float* block = scratch + thread * scratch_floats;
      if (dot)
        dot_task(tile, group, block);
      else
        multiply_task(tile, group, task % splits, block);
    });
    free(weights);
    return true;
  }
};

}  // namespace

bool run_direct(const DirectJob& job) {
  switch (job.problem->x.dtype) {
    case DType::f16: return Direct<F16>(job).run();
    case DType::bf16: return Direct<BF16>(job).run();
    default: return Direct<F32>(job).run();
  }
}

}  // namespace vtok::cpu::VTOK_ISA
