// What the launchers of causal_conv3d share: the problem's numbers for the kernels, and the weights in the
// kernels' order.
#include "cuda/causal_conv3d/plan.h"

#include <algorithm>
#include <string>

namespace vtok::cuda {
namespace {

constexpr int kRelayThreads = 384, kRelayChannels = 64;  // of a block, at most

// A block moves `channels` channels (a power of two) of one kernel row with all their taps through shared memory,
// [channel][tap] as they usually lie in the weights, so that both its reads and its writes are of neighbors.
// Each thread keeps its tap (then its channel): no division is made per element.
template <class T>
__global__ void __launch_bounds__(kRelayThreads)
    relay_weight_kernel(const RelaidWeight w, T* to, float* bias_to, int channels) {
  const int row = blockIdx.x, group = row / w.outputs, kernel_n = row - group * w.outputs,
            first = blockIdx.y * channels;
  const int n = kernel_n % w.phase_channels * w.phases + kernel_n / w.phase_channels;
  const int count = min(channels, w.channels - first), plane = w.taps[1] * w.taps[2],
            taps = w.taps[0] * plane;
  const uint32_t staged = ptx::smem_base();
  const T* from =
      static_cast<const T*>(w.from.data) + group * w.from.group + n * w.from.n + first * w.from.channel;
  const int together = max(kRelayThreads / taps, 1);  // channels that the threads read at a time
  for (int tap = threadIdx.x % taps; tap < taps && int(threadIdx.x) < together * taps; tap += kRelayThreads) {
    const int t = tap / plane, h = tap % plane / w.taps[2], v = tap % w.taps[2];
    const T* tap_from = from + t * w.from.tap[0] + h * w.from.tap[1] + v * w.from.tap[2];
    for (int c = threadIdx.x / taps; c < count; c += together)
      ptx::st_shared<T>(staged + (c * taps + tap) * int(sizeof(T)),
                        ptx::ld_global(tap_from + c * w.from.channel));
  }
  if (w.bias && first == 0 && threadIdx.x == 0)
    ptx::st_global(bias_to + row,
                   ptx::to_float(ptx::ld_global(static_cast<const T*>(w.bias) + group * w.outputs + n)));
  __syncthreads();

  const int c = threadIdx.x & (channels - 1), kernel_plane = w.kernel[1] * w.kernel[2];
  auto at = [&](int t, int h, int v) {
    return ptx::ld_shared<T>(staged + (c * taps + (t * w.taps[1] + h) * w.taps[2] + v) * int(sizeof(T)));
  };
  for (int tap = threadIdx.x / channels; tap < w.kernel[0] * kernel_plane; tap += kRelayThreads / channels) {
    const int dt = tap / kernel_plane, dh = tap % kernel_plane / w.kernel[2], dw = tap % w.kernel[2];
    T* frame_to = to + (int64_t(row) * w.kernel[0] + dt) * w.k_frame;
    if (first == 0 && tap % kernel_plane == 0)  // the padding at the end of a time tap
      for (int k = kernel_plane * w.channels + c; k < w.k_frame; k += channels)
        ptx::st_global(frame_to + k, ptx::from_float<T>(0));
    if (c >= count) continue;
    T value;
    if (w.folded) {
      float sum = 0;
      for (int t = w.tap_begin[0][dt]; t < w.tap_begin[0][dt + 1]; ++t)
        for (int h = w.tap_begin[1][dh]; h < w.tap_begin[1][dh + 1]; ++h)
          for (int v = w.tap_begin[2][dw]; v < w.tap_begin[2][dw + 1]; ++v) sum += ptx::to_float(at(t, h, v));
      value = ptx::from_float<T>(sum);
    } else {
      value = at(dt, dh, dw);
    }
    ptx::st_global(frame_to + int64_t(tap % kernel_plane) * w.channels + first + c, value);
  }
}

}  // namespace

Status relay_weight(const RelaidWeight& w, DType dtype, void* to, float* bias_to, void* stream) {
  Device device;
  VTOK_RETURN_IF_ERROR(current_device(device));
  const int64_t row = int64_t(w.taps[0]) * w.taps[1] * w.taps[2] * element_size(dtype);
  int channels = kRelayChannels;
  while (channels > 1 && channels * row > device.shared_limit) channels /= 2;
  if (channels * row > device.shared_limit)
    return Status::Unsupported("weight: a channel's taps exceed the shared memory of this GPU");
  const dim3 grid(unsigned(w.groups * w.outputs), unsigned(divide_up(w.channels, channels)));
  const size_t shared = size_t(channels * row);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return VTOK_LAUNCH(relay_weight_kernel<T>, grid, dim3(kRelayThreads), shared,
                       static_cast<cudaStream_t>(stream), w, static_cast<T*>(to), bias_to, channels);
  };
  if (dtype == DType::f16) return run(__half());
  if (dtype == DType::bf16) return run(__nv_bfloat16());
  return run(float());
}

Status make_source(const ConvProblem& p, Source* source) {
  if (p.x.rank != 5 || p.weight.rank != 5) return Status::Invalid("x and weight must have 5 dimensions");
  if (!is_float(p.x.dtype) && p.x.dtype != DType::e4m3)
    return Status::Unsupported("x: float32, bfloat16 or float16 only");
  if (p.groups < 1 || p.weight.size[0] % p.groups || p.weight.size[1] * p.groups != p.x.size[1])
    return Status::Invalid("weight: expected (O, " + std::to_string(p.x.size[1]) + " / groups, kt, kh, kw)");
  Source& s = *source;
  s.once = p.upsample_first_frame_once && p.upsample[0] > 1 && !p.cache;
  const int64_t cached = p.cache ? p.cache.size[2] * p.upsample[0] : 0, used = std::min(cached, p.pad[0]);
  s.cached = int(cached);
  s.used_cache = int(used);
  s.time_mode = p.time_mode;
  s.spatial_mode = p.spatial_mode;
  s.positions = p.x.size[0];
  for (int axis = 0; axis < 3; ++axis) {
    int64_t length = p.x.size[2 + axis] * p.upsample[axis];
    if (axis == 0) length += used - (s.once ? p.upsample[0] - 1 : 0);
    const int64_t front = p.pad[2 * axis] - (axis == 0 ? used : 0), k = p.weight.size[2 + axis];
    const int64_t span = length + front + p.pad[2 * axis + 1] - p.dilation[axis] * (k - 1) - 1;
    if (span < 0 || span >= (int64_t(1) << 30) || k > (1 << 15))
      return Status::Invalid("x: axis " + std::to_string(axis) + " of " + std::to_string(length) +
                             " elements does not suit the kernel");
    s.kernel[axis] = int(k);
    s.stride[axis] = p.stride[axis];
    s.dilation[axis] = p.dilation[axis];
    s.pad[axis] = int(front);
    s.gap[axis] = 1;
    s.length[axis] = int(length);
    s.upsample[axis] = p.upsample[axis];
    s.out[axis] = int(span / p.stride[axis] + 1);
    s.positions *= s.out[axis];
  }
  s.before = s.after = 0;
  s.time_taps = s.kernel[0];
  if (s.kernel[0] > 32)
    return Status::Unsupported("weight: at most 32 temporal taps, got " + std::to_string(s.kernel[0]));
  return Status::Ok();
}

bool bind_source(const Tensor& x, const Tensor& cache, int groups, Source* source) {
  Source& s = *source;
  const int bytes = element_size(x.dtype);
  const int64_t group = x.size[1] / groups * x.stride[1];
  bool chunks =
      x.stride[1] == 1 && x.size[1] / groups * bytes % 16 == 0 && aligned16(x.data) && aligned16(cache.data);
  for (int i : {0, 2, 3, 4}) chunks = chunks && (x.size[i] == 1 || x.stride[i] * bytes % 16 == 0);
  if (cache)
    for (int i : {0, 2}) chunks = chunks && (cache.size[i] == 1 || cache.stride[i] * bytes % 16 == 0);
  s.x = static_cast<const char*>(x.data);
  s.cache = static_cast<const char*>(cache.data);
  s.batch_bytes = x.stride[0] * bytes;
  s.frame_bytes = x.stride[2] * bytes;
  s.group_bytes = group * bytes;
  s.cache_batch_bytes = cache ? cache.stride[0] * bytes : 0;
  s.cache_frame_bytes = cache ? cache.stride[2] * bytes : 0;
  s.unit_bytes = chunks ? 16 : bytes;
  s.channel_bytes = int(x.stride[1] * bytes);
  s.row_units = x.size[3] == 1 ? 0 : x.stride[3] * bytes / s.unit_bytes;
  s.col_units = x.size[4] == 1 ? 0 : x.stride[4] * bytes / s.unit_bytes;
  return chunks;
}

}  // namespace vtok::cuda
