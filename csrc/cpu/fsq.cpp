#include "cpu/fsq.h"

#include <algorithm>
#include <string>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

namespace vtok::cpu {
namespace {

// values below which waking another thread costs more than it saves
constexpr int64_t kSerial = 64 * 1024;
// of codes: whoever reads more than this next finds little of it in a cache
constexpr int64_t kStreamBytes = 16 << 20;

struct Axis {
  int64_t size, z, codes, indices;
};

Status check(const Tensor& z, const Tensor& codes, const Tensor& indices, const Tensor& thresholds,
             const std::vector<int64_t>& levels, int dim) {
  const int64_t channels = static_cast<int64_t>(levels.size());
  if (!is_float(z.dtype) || z.rank < 1) return Status::Invalid("z: expected float32, bfloat16 or float16");
  if (dim < 0 || dim >= z.rank || z.size[dim] != channels || channels == 0)
    return Status::Invalid("levels: expected one per channel of z, got " + std::to_string(channels));
  if (codes.dtype != z.dtype || codes.rank != z.rank || !std::equal(z.size, z.size + z.rank, codes.size))
    return Status::Invalid("codes: expected the type and sizes of z");
  int64_t codebook = 1, most = 0;
  for (int64_t level : levels) {
    if (level < 2) return Status::Invalid("levels: " + std::to_string(level) + " is below 2");
    if (level > (int64_t(1) << 31) / codebook) return Status::Invalid("levels: the codebook exceeds 2**31");
    codebook *= level;
    most = std::max(most, level);
  }
  if (thresholds.dtype != DType::f32 || thresholds.rank != 2 || thresholds.size[0] != channels ||
      thresholds.size[1] != most - 1 || (channels > 1 && thresholds.stride[0] != most - 1) ||
      (most > 2 && thresholds.stride[1] != 1))
    return Status::Invalid("thresholds: expected contiguous float32 (channels, most levels - 1)");
  bool same = indices.dtype == DType::i32 && indices.rank == z.rank - 1;
  for (int i = 0; same && i < indices.rank; ++i) same = indices.size[i] == z.size[i < dim ? i : i + 1];
  return same ? Status::Ok()
              : Status::Invalid("indices: expected int32 with the sizes of z without its channels");
}

}  // namespace

Status fsq_quantize(const Tensor& z, const Tensor& codes, const Tensor& indices, const Tensor& thresholds,
                    const std::vector<int64_t>& levels, int dim, int threads) {
  VTOK_RETURN_IF_ERROR(check(z, codes, indices, thresholds, levels, dim));
  if (z.numel() == 0) return Status::Ok();
  advise_huge_pages(codes);
  advise_huge_pages(indices);
  const int64_t channels = static_cast<int64_t>(levels.size());
  std::vector<int32_t> basis(channels);
  for (int64_t c = 0, b = 1; c < channels; b *= levels[c++]) basis[c] = static_cast<int32_t>(b);

  // The axes of the positions, innermost last; neighbors that all three tensors walk with one step become
  // one.
  std::vector<Axis> axes;
  for (int i = 0; i < z.rank; ++i) {
    if (i == dim || z.size[i] == 1) continue;
    const Axis axis{z.size[i], z.stride[i], codes.stride[i], indices.stride[i < dim ? i : i - 1]};
    if (!axes.empty() && axes.back().z == axis.size * axis.z && axes.back().codes == axis.size * axis.codes &&
        axes.back().indices == axis.size * axis.indices)
      axes.back() = {axes.back().size * axis.size, axis.z, axis.codes, axis.indices};
    else
      axes.push_back(axis);
  }
  const Axis inner = axes.empty() ? Axis{1, channels, channels, 1} : axes.back();
  int64_t outer = 1;
  for (size_t i = 0; i + 1 < axes.size(); ++i) outer *= axes[i].size;

  FsqLevels table{static_cast<const float*>(thresholds.data), thresholds.size[1], levels.data(), basis.data(),
                  nullptr};
  std::vector<float> interleaved;
  if (z.stride[dim] == 1 && inner.z == channels) {
    interleaved.resize(VTOK_DISPATCH(fsq_interleaved_size(channels, table.pitch)) + 16);
    auto* start =
        reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(interleaved.data()) + 63) & ~uintptr_t(63));
    if (interleaved.size() > 16) {
      VTOK_DISPATCH(fsq_interleave(table, channels, start));
      table.interleaved = start;
    }
  }

  const int64_t values = z.numel(), width = element_size(z.dtype);
  if (values < kSerial) threads = 1;
  const bool stream = values * width > kStreamBytes;
  const int64_t chunk = 4096, chunks = (inner.size + chunk - 1) / chunk;
  parallel_for(outer * chunks, threads, [&](int64_t task, int) {
    const int64_t first = task % chunks * chunk;
    int64_t at_z = first * inner.z, at_codes = first * inner.codes, at_indices = first * inner.indices,
            rest = task / chunks;
    for (size_t i = axes.size() - (axes.empty() ? 0 : 1); i-- > 0; rest /= axes[i].size) {
      const int64_t k = rest % axes[i].size;
      at_z += k * axes[i].z;
      at_codes += k * axes[i].codes;
      at_indices += k * axes[i].indices;
    }
    const FsqRun run{z.dtype,
                     static_cast<const char*>(z.data) + at_z * width,
                     static_cast<char*>(codes.data) + at_codes * width,
                     static_cast<int32_t*>(indices.data) + at_indices,
                     std::min(chunk, inner.size - first),
                     channels,
                     inner.z,
                     z.stride[dim],
                     inner.codes,
                     codes.stride[dim],
                     inner.indices,
                     stream};
    VTOK_DISPATCH(fsq_run(run, table));
  });
  return Status::Ok();
}

}  // namespace vtok::cpu
