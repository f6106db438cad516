// The sm90 convolution's plan: whether it can run a task, which tile, and the tensor maps. The kernel and
// the byte counts of its cost model: sm90_kernel.cuh.
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/causal_conv3d/sm80_kernel.cuh"
#include "cuda/causal_conv3d/plan.h"
#include "cuda/causal_conv3d/sm90_e4m3.h"
#include "cuda/causal_conv3d/sm90_params.h"

namespace vtok::cuda {
namespace {

// A tensor as TMA sees it; axes are channels, width, height, time, batch.
struct View {
  const void* data;
  int64_t size[5], stride[5];  // elements; bytes
};

struct Views {
  View x, cache, out, residual;
};

// One axis less where nothing is padded: consecutive rows are the same as one long row.
// the axes `outer` and `outer` + 1 of time, height, width
void merge_axes(ConvTask& task, Views& v, int outer) {
  Source& s = task.source;
  for (int i : {outer, outer + 1})
    if (s.kernel[i] != 1 || s.stride[i] != 1 || s.pad[i] != 0 || s.out[i] != s.length[i]) return;
  if (outer == 0 && s.used_cache) return;
  const int in = 3 - outer - 1, up = 3 - outer;  // the same axes of a view
  auto adjacent = [&](const View& view) {
    return !view.data || view.size[up] == 1 || view.size[in] == 1 ||
           view.stride[up] == view.size[in] * view.stride[in];
  };
  if (!adjacent(v.x) || !adjacent(v.cache) || !adjacent(v.out) || !adjacent(v.residual)) return;
  if (int64_t(s.out[outer]) * s.out[outer + 1] >= 1 << 30) return;
  for (View* view : {&v.x, &v.cache, &v.out, &v.residual}) {
    if (!view->data) continue;
    if (view->size[in] == 1) view->stride[in] = view->stride[up];
    view->size[in] *= view->size[up];
    view->size[up] = 1;
  }
  s.out[outer + 1] *= s.out[outer];
  s.length[outer + 1] *= s.length[outer];
  s.out[outer] = s.length[outer] = 1;
}

Views views_of(const ConvTask& task) {
  const Source& s = task.source;
  const Epilogue& e = task.epilogue;
  const int64_t batch = s.positions / (int64_t(s.out[0]) * s.out[1] * s.out[2]),
                rows = s.row_units * s.unit_bytes;
  const int64_t columns = s.col_units * s.unit_bytes, channels = task.weight.channels;
  const int element = element_size(task.operands);
  Views v = {};
  v.x = {s.x,
         {channels, s.length[2], s.length[1], s.length[0] - s.used_cache, batch},
         {element, columns, rows, s.frame_bytes, s.batch_bytes}};
  if (s.used_cache)
    v.cache = {s.cache,
               {channels, s.length[2], s.length[1], s.cached, batch},
               {element, columns, rows, s.cache_frame_bytes, s.cache_batch_bytes}};
  auto strides = [](View& view, const int64_t (&stride)[4]) {
    view.stride[0] = 2;
    for (int i = 0; i < 4; ++i) view.stride[4 - i] = stride[i] * 2;
  };
  v.out = {e.out, {task.weight.outputs, s.out[2], s.out[1], s.out[0], batch}, {}};
  strides(v.out, e.out_stride);
  if (e.residual) {
    v.residual = v.out;
    v.residual.data = e.residual;
    strides(v.residual, e.residual_stride);
  }
  return v;
}

// Why the kernel cannot run a task, or null.
const char* why_not(const ConvTask& task, const Views& v, const Device& device) {
  const Source& s = task.source;
  const Epilogue& e = task.epilogue;
  if (device.capability != 90) return "the GPU's compute capability is not 9.0";
  if (task.dtype != DType::f16 && task.dtype != DType::bf16) return "bfloat16 and float16 only";
  if (task.weight.groups != 1) return "groups must be 1";
  if (!task.chunks && task.operands == DType::e4m3) return "input channels must be a multiple of 16";
  if (!task.chunks)
    return "input channels must be a multiple of 8, and addresses and strides multiples of 16 bytes";
  if (e.channels != e.all_channels) return "depth_to_space has no kernel here";
  if (!e.vectors)
    return "output channels must be a multiple of 8, and addresses and strides multiples of 16 bytes";
  for (int i = 0; i < 3; ++i) {
    if (s.upsample[i] != 1) return "an upsampling that cannot be split into phases";
    if (s.gap[i] != 1) return "the input gradient of a strided convolution";
    if (e.residual && e.residual_upsample[i] != 1) return "a residual that is upsampled where x is not";
    const int last = (s.out[i] - 1) * s.stride[i] + (s.kernel[i] - 1) * s.dilation[i] - s.pad[i];
    if (i && s.spatial_mode != PadMode::zeros && (s.pad[i] > 0 || last >= s.length[i]))
      return "rows and columns padded by anything but zeros";
  }
  for (const View* view : {&v.x, &v.cache, &v.out, &v.residual})
    for (int i = 1; i < 5 && view->data; ++i)
      if (view->size[i] > 1 && (view->stride[i] <= 0 || view->stride[i] >= int64_t(1) << 40))
        return "an expanded tensor";
  return nullptr;
}

// ---- the choice -------------------------------------------------------------------------------------------

Sm90Variants variants_for(const ConvTask& task) {
  if (task.operands == DType::e4m3)
    return task.dtype == DType::f16 ? sm90_variants_e4m3_f16() : sm90_variants_e4m3_bf16();
  return task.dtype == DType::f16 ? sm90_variants_f16() : sm90_variants_bf16();
}

// What a multiprocessor would take if it had each resource to itself.
struct Cycles {
  double tensor, shared, l2;
};

struct Plan {
  const Sm90Variant* variant = nullptr;
  int tile[3], cluster, splits, patch_stages, weight_stages;
  int clusters;   // that are there at once
  double cycles;  // predicted
  Cycles unit;
};

// Everything of a tile's shape that the kernel and the model need.
void shape_patch(Sm90Params& p, const int (&tile)[3]) {
  const Source& s = p.source;
  int size[3];
  for (int i = 0; i < 3; ++i) {
    p.tile[i] = tile[i];
    p.tiles[i] = (s.out[i] + tile[i] - 1) / tile[i];
    p.taps[i] = i == 0 && tile[0] == 1 ? 1 : s.kernel[i];
    size[i] = (tile[i] - 1) * s.stride[i] + s.dilation[i] * (p.taps[i] - 1) + 1;
  }
  p.patch_frames = size[0];
  p.patch_width = size[2];
  p.frame_rows = (size[1] * size[2] + 7) / 8 * 8;
  p.frame_bytes_loaded = size[1] * size[2] * kSlabBytes;
  p.patch_bytes = p.patch_frames * p.frame_rows * kSlabBytes;
  p.row_step[0] = s.dilation[0] * p.frame_rows;
  p.row_step[1] = s.dilation[1] * p.patch_width;
  p.row_step[2] = s.dilation[2];
}

int patch_height(const Sm90Params& p) { return p.frame_bytes_loaded / kSlabBytes / p.patch_width; }

// As many stages as fit, where a stage more is worth most: a stage of weights lasts one tap, one of patches
// all its taps. False where not even the fewest fit.
bool choose_stages(const Sm90Variant& v, const Sm90Params& p, int shared_limit, Plan* plan, int wish) {
  const int taps = p.taps[0] * p.taps[1] * p.taps[2];
  if (wish && wish < kFewestWeightStages) return false;
  int patches = 2, weights = wish ? wish : 3;
  auto fits = [&](int a, int b) { return sm90_shared_bytes(v, p.patch_bytes, a, b) <= shared_limit; };
  if (!fits(patches, weights)) return false;
  while (true) {
    const bool more_patches = patches < kMostPatchStages && fits(patches + 1, weights);
    const bool more_weights = !wish && weights < kMostWeightStages && fits(patches, weights + 1);
    if (more_weights && (!more_patches || weights - 1 <= (patches - 1) * taps))
      ++weights;
    else if (more_patches && (patches - 1) * taps < weights)
      ++patches;
    else
      break;
  }
  plan->patch_stages = patches;
  plan->weight_stages = weights;
  return true;
}

// Cycles of an 8x8 matrix for ldmatrix, on average: a row of the patch lies in one of eight groups of banks, and
// rows of one group are read one after another. A tap moves all rows alike, so that any tap is all taps.
double bank_cycles(const Sm90Variant& v, const Sm90Params& p) {
  const Source& s = p.source;
  const int all = p.tile[0] * p.tile[1] * p.tile[2];
  int cycles = 0;
  for (int first = 0; first < v.m; first += 8) {
    int rows[8], most = 1;
    for (int i = 0; i < 8; ++i) {
      const int r = first + i, w = r % p.tile[2], h = r / p.tile[2] % p.tile[1],
                t = r / p.tile[2] / p.tile[1];
      rows[i] =
          r >= all ? 0 : t * s.stride[0] * p.frame_rows + h * s.stride[1] * p.patch_width + w * s.stride[2];
      int together = 1;  // the same row is read once for all
      for (int k = 0; k < i; ++k) together += rows[k] % 8 == rows[i] % 8 && rows[k] != rows[i];
      most = std::max(most, together);
    }
    cycles += most;
  }
  return cycles / (v.m / 8.0);
}

Cycles cycles_of_unit(const Sm90Variant& v, const Sm90Params& p, const ConvTask& task, double banks,
                      int cluster) {
  constexpr double kL2 = 24, kShared = 128;  // bytes a cycle and multiprocessor
  const double outer = p.tile[0] == 1 ? p.source.time_taps : 1;
  const double taps = outer * p.taps[0] * p.taps[1] * p.taps[2];
  const int bytes = task.weight.channels * element_size(task.operands);
  const double steps = taps * ((bytes + 31) / 32) * (v.m / 64), slabs = taps * p.slabs;
  const double weights = slabs * v.n * kSlabBytes,
               patches = outer * p.slabs * p.patch_frames * p.frame_bytes_loaded;
  return {steps * (v.n / 2), (steps * (2048 * banks + v.n * 32) + weights + patches) / kShared,
          (weights / cluster + patches) / kL2};
}

// Together. None is used all the time: what waits for one leaves the others idle, the more so the closer they
// are to the bound, and the more so where products are waited for before the next are issued (`depth`: 1 would
// be one after another, infinity all at once). Nor is it faster than the best matrix products under an H200's
// power limit, 790 TFLOP/s of 946; waits save power, so that this is a bound and no factor. The depths are
// assumptions: what public kernels of this kind reach, until a GPU has measured ours.
double together(const Cycles& c, bool pipelined) {
  constexpr double kTensor = 0.83;
  const double depth = pipelined ? 3 : 2;
  const double sum = std::pow(c.tensor, depth) + std::pow(c.shared, depth) + std::pow(c.l2, depth);
  return std::max(std::pow(sum, 1 / depth), c.tensor / kTensor);
}

// Cycles of all multiprocessors for the whole task: see the table of bytes in sm90_kernel.cuh.
double predicted_cycles(const Sm90Variant& v, const Sm90Params& p, const ConvTask& task, double banks,
                        int cluster, int splits, int chip) {
  constexpr double kMemory = 17;  // bytes a cycle and multiprocessor
  constexpr double kStart = 1500, kReduce = 6000;
  const Source& s = p.source;
  const double bound = together(cycles_of_unit(v, p, task, banks, cluster), sm90_pipelined(v.m, v.n));
  const double tile = bound / splits + kStart + double(v.m) * v.n / 16;
  const int64_t batch = s.positions / (int64_t(s.out[0]) * s.out[1] * s.out[2]);
  const int64_t tiles = batch * p.tiles[0] * p.tiles[1] * p.tiles[2];
  const int64_t units = divide_up(tiles, cluster) * divide_up(task.weight.outputs, v.n) * splits;
  const double read = double(batch) * s.length[0] * s.length[1] * s.length[2] * task.weight.channels *
                      element_size(task.operands);
  const double written = double(s.positions) * task.weight.outputs * (task.epilogue.residual ? 4 : 2);
  double cycles = std::max(double(divide_up(units, std::max(chip / cluster, 1))) * tile,
                           (read + written) / (kMemory * chip));
  if (splits > 1) cycles += kReduce + 8.0 * splits * s.positions * task.weight.outputs / (kMemory * chip);
  return cycles;
}

// The lengths that divide an axis into equal parts, one for each number of parts: the longest first. And those
// rounded up to eight, the rows that ldmatrix reads at once, where `eights`.
std::vector<int> parts_of(int length, int most, bool eights = false) {
  std::vector<int> found;
  for (int count = std::max(1, (length + most - 1) / most); count <= length; ++count) {
    const int part = (length + count - 1) / count;
    if (!found.empty() && part == found.back()) continue;
    if (const int rounded = (part + 7) / 8 * 8; eights && rounded != part && rounded <= most && part > 4)
      found.push_back(rounded);
    found.push_back(part);
    if (part <= 4) break;
  }
  return found;
}

Plan search(Sm90Params p, const ConvTask& task, Sm90Choice wish, const Device& device) {
  Plan best;
  const Source& s = p.source;
  const Sm90Variants variants = variants_for(task);
  const bool frames_together = s.before == 0 && s.after == 0 && s.out[0] > 1;
  for (int i = 0; i < variants.count; ++i) {
    const Sm90Variant& v = variants.begin[i];
    if ((wish.tile_m && wish.tile_m != v.m) || (wish.tile_n && wish.tile_n != v.n)) continue;
    std::vector<int> lengths = frames_together ? parts_of(s.out[0], v.m) : std::vector<int>();
    if (lengths.empty() || lengths.back() != 1) lengths.push_back(1);
    for (int frames : lengths) {
      for (int width : parts_of(s.out[2], std::min(v.m / frames, 256), true)) {
        const int rows = parts_of(s.out[1], std::min(v.m / frames / width, 256)).front();
        shape_patch(p, {frames, rows, width});
        Plan plan;
        plan.variant = &v;
        if (p.patch_width > 256 || patch_height(p) > 256 ||
            p.patch_frames * p.frame_bytes_loaded >= 1 << 20 ||
            !choose_stages(v, p, device.shared_limit, &plan, wish.stages))
          continue;
        const double banks = bank_cycles(v, p);
        for (int cluster : {1, 2}) {
          if (wish.cluster && wish.cluster != cluster) continue;
          const int steps = (frames == 1 ? s.time_taps : 1) * p.slabs;
          for (int splits : {1, 2, 3, 4, 6, 8, 12, 16}) {
            if (wish.splits) splits = frames == 1 ? std::min(wish.splits, steps) : wish.splits;
            if (splits > steps) break;
            plan.cycles = predicted_cycles(v, p, task, banks, cluster, splits, device.multiprocessors);
            plan.unit = cycles_of_unit(v, p, task, banks, cluster);
            plan.cluster = cluster;
            plan.splits = splits;
            std::copy(p.tile, p.tile + 3, plan.tile);
            if (!best.variant || plan.cycles < best.cycles) best = plan;
            if (wish.splits) break;
          }
        }
      }
    }
  }
  return best;
}

// The search takes a while, and a program asks for the same few shapes again and again.
Status choose(const Sm90Params& p, const ConvTask& task, Sm90Choice wish, const Device& device, Plan* plan) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Plan> known;
  const Source& s = p.source;
  std::vector<int64_t> key = {int64_t(task.dtype),
                              int64_t(task.operands),
                              s.positions,
                              task.weight.channels,
                              task.weight.outputs,
                              s.time_taps,
                              s.before,
                              s.after,
                              task.epilogue.residual != nullptr,
                              wish.tile_m,
                              wish.tile_n,
                              wish.splits,
                              wish.cluster,
                              wish.stages,
                              device.multiprocessors,
                              device.shared_limit};
  for (int i = 0; i < 3; ++i)
    key.insert(key.end(), {s.out[i], s.length[i], s.kernel[i], s.stride[i], s.dilation[i]});
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return *plan = found->second, Status::Ok();
  *plan = search(p, task, wish, device);
  if (!plan->variant) return Status::Unsupported("sm90: no tile whose patches of x fit in shared memory");
  Sm90Params shaped = p;
  shape_patch(shaped, plan->tile);
  const int shared =
      sm90_shared_bytes(*plan->variant, shaped.patch_bytes, plan->patch_stages, plan->weight_stages);
  VTOK_RETURN_IF_ERROR(
      resident_clusters(plan->variant->kernel, plan->cluster, kSm90Threads, shared, device, &plan->clusters));
  if (known.size() >= 4096) known.clear();
  known[key] = *plan;
  return Status::Ok();
}

// ---- the tensor maps --------------------------------------------------------------------------------------

// Scratch memory that is only counted lies nowhere; a map of it is asked for all the same.
const void* address_of(const void* data) { return data ? data : reinterpret_cast<const void*>(4096); }

// Boxes of `channels` x box[2] x box[1] x box[0] (time, height, width); strides of axes of one element mean
// nothing.
Status encode_view(TensorMap& map, const View& view, DType dtype, int channels, const int (&box)[3]) {
  TensorMapShape shape = {dtype,
                          5,
                          {},
                          {},
                          {uint32_t(channels), uint32_t(box[2]), uint32_t(box[1]), uint32_t(box[0]), 1},
                          {1, 1, 1, 1, 1},
                          channels * element_size(dtype)};
  for (int i = 0; i < 5; ++i) {
    const bool single = i > 0 && view.size[i] == 1;
    shape.size[i] = uint64_t(view.size[i]);
    shape.stride[i] = single ? shape.stride[i - 1] * shape.size[i - 1] : uint64_t(view.stride[i]);
    if (single && shape.stride[i] >= uint64_t(1) << 40) shape.stride[i] = 16;
  }
  return encode(map, address_of(view.data), shape);
}

struct WeightRows {  // channels innermost
  const void* data;
  int64_t tap_bytes, output_bytes;
};

// Whether the weights can be read as they are: channels innermost, taps one after another.
bool read_in_place(const RelaidWeight& w, WeightRows* rows) {
  const int64_t tap = w.taps[2] > 1   ? w.from.tap[2]
                      : w.taps[1] > 1 ? w.from.tap[1]
                      : w.taps[0] > 1 ? w.from.tap[0]
                                      : w.from.n;
  bool direct = !w.folded && w.phases == 1 && w.from.channel == 1 && tap > 0 && tap % 8 == 0 &&
                w.from.n % 8 == 0 && w.from.n > 0 && aligned16(w.from.data);
  int64_t expected = tap;
  for (int i = 2; i >= 0; --i) {
    direct = direct && (w.taps[i] == 1 || w.from.tap[i] == expected);
    expected *= w.taps[i];
  }
  *rows = {w.from.data, tap * 2, w.from.n * 2};
  return direct;
}

Status encode_weights(TensorMap& map, const WeightRows& rows, const RelaidWeight& w, DType dtype,
                      int box_outputs) {
  const int element = element_size(dtype);
  const uint64_t taps = uint64_t(w.kernel[0]) * w.kernel[1] * w.kernel[2];
  return encode(map, address_of(rows.data),
                {dtype,
                 3,
                 {uint64_t(w.channels), taps, uint64_t(w.outputs)},
                 {uint64_t(element), uint64_t(rows.tap_bytes), uint64_t(rows.output_bytes)},
                 {uint32_t(kSlabBytes / element), 1, uint32_t(box_outputs)},
                 {1, 1, 1},
                 128});
}

template <class T>
Status sum_splits(const Sm90Params& p, cudaStream_t stream) {
  ConvParams r = {};
  r.source = p.source;
  r.epilogue = p.epilogue;
  r.partial = p.partial;
  r.partial_stride = p.partial_stride;
  r.outputs = p.outputs;
  const int64_t blocks = divide_up(p.source.positions * (p.partial_stride / 8), 256);
  return VTOK_LAUNCH(reduce_splits_kernel<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, r, p.splits);
}

void report(const Plan& plan, int64_t units, int64_t* to) {
  const int64_t numbers[kSm90Report] = {plan.variant->m,
                                        plan.variant->n,
                                        plan.splits,
                                        plan.cluster,
                                        plan.weight_stages,
                                        plan.patch_stages,
                                        plan.tile[0],
                                        plan.tile[1],
                                        plan.tile[2],
                                        int64_t(plan.cycles),
                                        units,
                                        int64_t(plan.unit.tensor),
                                        int64_t(plan.unit.shared),
                                        int64_t(plan.unit.l2)};
  std::copy(std::begin(numbers), std::end(numbers), to);
}

// `narrow`: how x and the cache become e4m3, where that is what the kernel multiplies.
Status run_task(ConvTask& task, Sm90Choice choice, Workspace& workspace, void* stream_handle,
                const NarrowInputs* narrow = nullptr) {
  Device device;
  VTOK_RETURN_IF_ERROR(current_device(device));
  ConvTask merged = task;  // the sum of splits takes the original axes
  if (task.source.positions == 0) return Status::Unsupported("sm90: the batch is empty");
  Views v = views_of(task);
  if (const char* reason = why_not(task, v, device))
    return Status::Unsupported(std::string("sm90: ") + reason);
  for (int outer : {1, 0, 1}) merge_axes(merged, v, outer);

  const RelaidWeight& w = task.weight;
  Sm90Params p = {};
  p.source = merged.source;
  p.epilogue = task.epilogue;
  p.outputs = w.outputs;
  p.bias = w.bias;
  const int element = element_size(task.operands), channel_bytes = w.channels * element;
  p.slabs = (channel_bytes + kSlabBytes - 1) / kSlabBytes;
  p.slab_channels = kSlabBytes / element;
  p.last_steps = (channel_bytes - 1) % kSlabBytes / 32 + 1;
  Plan plan;
  VTOK_RETURN_IF_ERROR(choose(p, merged, choice, device, &plan));
  shape_patch(p, plan.tile);
  const Sm90Variant& variant = *plan.variant;
  p.cluster = plan.cluster;
  p.splits = plan.splits;
  p.patch_stages = plan.patch_stages;
  p.weight_stages = plan.weight_stages;
  const int64_t tiles = v.out.size[4] * p.tiles[0] * p.tiles[1] * p.tiles[2];
  p.tiles_n = int(divide_up(w.outputs, variant.n));
  const int64_t units = divide_up(tiles, p.cluster) * p.tiles_n * p.splits;
  if (units >= int64_t(1) << 31) return Status::Unsupported("sm90: more tiles than the kernel counts");
  if (choice.report) report(plan, units, choice.report);
  p.tiles_m = int(tiles);
  p.units = int(units);
  p.partial_stride = w.outputs;

  WeightRows rows;
  const bool direct = !narrow && read_in_place(w, &rows);
  const int64_t taps = int64_t(w.kernel[0]) * w.kernel[1] * w.kernel[2];
  void* relaid = direct ? nullptr : workspace.take(w.outputs * taps * channel_bytes);
  if (!direct) rows = {relaid, channel_bytes, taps * channel_bytes};
  float* weight_scale = narrow ? workspace.take<float>(w.outputs) : nullptr;
  p.weight_scale = weight_scale;
  p.x_scale = narrow ? narrow->x_scale : nullptr;
  if (p.splits > 1)
    p.partial = workspace.take<float>(int64_t(p.splits) * p.source.positions * p.partial_stride);

  // Also where only a question is asked: what the driver refuses, another kernel runs.
  Sm90Maps maps = {};
  const int patch[3] = {1, patch_height(p), p.patch_width};
  VTOK_RETURN_IF_ERROR(encode_view(maps.x, v.x, task.operands, p.slab_channels, patch));
  maps.cache = maps.out = maps.residual = maps.x;
  if (v.cache.data)
    VTOK_RETURN_IF_ERROR(encode_view(maps.cache, v.cache, task.operands, p.slab_channels, patch));
  VTOK_RETURN_IF_ERROR(encode_weights(maps.weight, rows, w, task.operands, variant.n / p.cluster));
  VTOK_RETURN_IF_ERROR(encode_view(maps.out, v.out, task.dtype, variant.piece, p.tile));
  if (v.residual.data)
    VTOK_RETURN_IF_ERROR(encode_view(maps.residual, v.residual, task.dtype, variant.piece, p.tile));
  if (workspace.only_counts()) return Status::Ok();
  if (narrow) {
    VTOK_RETURN_IF_ERROR(narrow_inputs(*narrow, stream_handle));
    VTOK_RETURN_IF_ERROR(narrow_weight(w, task.dtype, relaid, weight_scale, stream_handle));
  } else if (!direct) {
    RelaidWeight relay = w;
    relay.k_frame = w.kernel[1] * w.kernel[2] * w.channels;
    relay.bias = nullptr;
    VTOK_RETURN_IF_ERROR(relay_weight(relay, task.dtype, relaid, nullptr, stream_handle));
  }

  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int clusters = std::min(p.units, std::max(plan.clusters, 1));
  const int shared = sm90_shared_bytes(variant, p.patch_bytes, p.patch_stages, p.weight_stages);
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH_CLUSTER(dim3(unsigned(p.cluster)), variant.kernel,
                                           dim3(unsigned(clusters * p.cluster)), dim3(kSm90Threads), shared,
                                           stream, maps, p));
  if (p.splits == 1) return Status::Ok();
  p.source = task.source;
  return task.dtype == DType::f16 ? sum_splits<__half>(p, stream) : sum_splits<__nv_bfloat16>(p, stream);
}

}  // namespace

Status causal_conv3d_sm90(const ConvProblem& problem, Sm90Choice choice, void* workspace,
                          int64_t* workspace_bytes, void* stream) {
  const RunTask run = [&](ConvTask& task, Workspace& from) { return run_task(task, choice, from, stream); };
  return run_forward(run, problem, workspace, workspace_bytes);
}

// x and the cache are written to scratch memory, channels-last without gaps, as e4m3.
Status causal_conv3d_sm90_e4m3(const ConvProblem& problem, const Tensor& x_scale, Sm90Choice choice,
                               void* workspace, int64_t* workspace_bytes, void* stream) {
  if (problem.x.dtype != DType::f16 && problem.x.dtype != DType::bf16)
    return Status::Unsupported("sm90: bfloat16 and float16 only");
  if (x_scale.rank != 1 || x_scale.size[0] != 1 || x_scale.dtype != DType::f32)
    return Status::Invalid("x_scale: expected one float32");
  ConvProblem narrow = problem;
  narrow.x = as_e4m3(problem.x);
  narrow.cache = as_e4m3(problem.cache);
  const RunTask run = [&](ConvTask& task, Workspace& from) {
    char *x = from.take(narrow.x.numel()), *cache = problem.cache ? from.take(narrow.cache.numel()) : nullptr;
    task.source.x = x;
    task.source.cache = cache;
    const NarrowInputs inputs = {problem.x, problem.cache, x, cache, static_cast<const float*>(x_scale.data)};
    return run_task(task, choice, from, stream, &inputs);
  };
  return run_forward(run, narrow, workspace, workspace_bytes);
}

Status causal_conv3d_sm90_dgrad(const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                                const Tensor& grad_cache, Sm90Choice choice, void* workspace,
                                int64_t* workspace_bytes, void* stream) {
  const RunTask run = [&](ConvTask& task, Workspace& from) { return run_task(task, choice, from, stream); };
  return run_dgrad(run, problem, grad, grad_x, grad_cache, workspace, workspace_bytes, stream);
}

}  // namespace vtok::cuda
