// The straight-through gradient of fsq: grad_z = grad * (1 - tanh(z + shift)^2) * slope, a shift and a slope
// per channel.
//
// Where grad, z and grad_z lie alike and without gaps, memory is walked in order, 16 bytes a thread: the
// channel of the element at offset o is o / channel_step % channels, whatever the order of the axes. Else a
// thread has a position, element by element.
// Floor: 3 sizeof(T) bytes and about 40 instructions per element, most of them tanhf; no approximation of it
// is used.
#include "cuda/fsq/fsq.cuh"

namespace vtok::cuda {
namespace {

struct Slopes {
  int channels;
  float shift[kFsqChannels], slope[kFsqChannels];
};

__device__ float gradient(float grad, float z, float shift, float slope) {
  const float t = tanhf(z + shift);
  return grad * (1 - t * t) * slope;
}

template <class T>
__global__ void __launch_bounds__(kFsqThreads)
    backward_dense(const T* grad, const T* z, T* grad_z, int64_t count, int64_t channel_step,
                   const __grid_constant__ Slopes s) {
  constexpr int kV = 16 / sizeof(T);
  struct alignas(16) Vector {
    T v[kV];
  };
  // neighbors may have different channels, which parameters serve one by one
  const uint32_t table = ptx::smem_base();
  if (threadIdx.x < unsigned(s.channels))
    ptx::st_shared(table + 8 * threadIdx.x, make_float2(s.shift[threadIdx.x], s.slope[threadIdx.x]));
  __syncthreads();
  const int64_t first = (int64_t(blockIdx.x) * kFsqThreads + threadIdx.x) * kV;
  if (first >= count) return;
  const int64_t run = first / channel_step;
  int64_t in_run = first - run * channel_step;
  int channel = int(run % s.channels);
  auto next = [&](float g, float value) {
    const float2 of = ptx::ld_shared<float2>(table + 8 * channel);
    if (++in_run == channel_step) {
      in_run = 0;
      channel = channel + 1 == s.channels ? 0 : channel + 1;
    }
    return ptx::from_float<T>(gradient(g, value, of.x, of.y));
  };
  if (count - first >= kV) {
    Vector g = ptx::ld_global(reinterpret_cast<const Vector*>(grad + first));
    const Vector value = ptx::ld_global(reinterpret_cast<const Vector*>(z + first));
#pragma unroll
    for (int v = 0; v < kV; ++v) g.v[v] = next(ptx::to_float(g.v[v]), ptx::to_float(value.v[v]));
    ptx::st_global(reinterpret_cast<Vector*>(grad_z + first), g);
  } else {
    for (int64_t i = first; i < count; ++i)
      ptx::st_global(grad_z + i,
                     next(ptx::to_float(ptx::ld_global(grad + i)), ptx::to_float(ptx::ld_global(z + i))));
  }
}

template <class T>
__global__ void __launch_bounds__(kFsqThreads)
    backward_any(const T* grad, const T* z, T* grad_z, int64_t positions,
                 const __grid_constant__ FsqPositions p, const __grid_constant__ Slopes s) {
  const int64_t position = int64_t(blockIdx.x) * kFsqThreads + threadIdx.x;
  if (position >= positions) return;
  const int64_t outer = position / p.inner();
  int64_t at[3];
  p.locate(outer, position - outer * p.inner(), at);
  for (int c = 0; c < s.channels; ++c) {
    const float g = ptx::to_float(ptx::ld_global(grad + at[0] + c * p.channel_step[0]));
    const float value = ptx::to_float(ptx::ld_global(z + at[1] + c * p.channel_step[1]));
    ptx::st_global(grad_z + at[2] + c * p.channel_step[2],
                   ptx::from_float<T>(gradient(g, value, s.shift[c], s.slope[c])));
  }
}

// Whether the elements fill one range of memory, each place once.
bool dense(const Tensor& t) {
  const int64_t count = t.numel();
  for (int64_t step = 1; step < count;) {  // the axis that follows those that fill `step` elements
    int next = 0;
    while (next < t.rank && (t.size[next] == 1 || t.stride[next] != step)) ++next;
    if (next == t.rank) return false;
    step *= t.size[next];
  }
  return true;
}

bool alike(const Tensor& a, const Tensor& b) {
  for (int i = 0; i < a.rank; ++i)
    if (a.size[i] > 1 && a.stride[i] != b.stride[i]) return false;
  return true;
}

}  // namespace

Status fsq_backward(const Tensor& grad, const Tensor& z, const Tensor& grad_z,
                    const std::vector<float>& shifts, const std::vector<float>& slopes, int dim,
                    void* stream) {
  VTOK_RETURN_IF_ERROR(fsq_check_channels(z, shifts.size(), dim, "z"));
  if (slopes.size() != shifts.size()) return Status::Invalid("slopes: expected one per channel");
  if (!fsq_same_shape(z, grad)) return Status::Invalid("grad: expected the type and sizes of z");
  if (!fsq_same_shape(z, grad_z)) return Status::Invalid("grad_z: expected the type and sizes of z");
  const int64_t count = z.numel();
  if (count == 0) return Status::Ok();
  Slopes s = {};
  s.channels = int(shifts.size());
  std::copy(shifts.begin(), shifts.end(), s.shift);
  std::copy(slopes.begin(), slopes.end(), s.slope);
  auto* on = static_cast<cudaStream_t>(stream);
  auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  return fsq_dispatch(z.dtype, [&](auto element) {
    using T = decltype(element);
    const auto *g = static_cast<const T*>(grad.data), *value = static_cast<const T*>(z.data);
    auto* to = static_cast<T*>(grad_z.data);
    if (aligned(grad) && aligned(z) && aligned(grad_z) && dense(z) && alike(z, grad) && alike(z, grad_z)) {
      const int64_t per_block = kFsqThreads * 16 / sizeof(T), step = s.channels == 1 ? count : z.stride[dim];
      return VTOK_LAUNCH(backward_dense<T>, dim3(unsigned((count + per_block - 1) / per_block)), kFsqThreads,
                         8 * s.channels, on, g, value, to, count, step, s);
    }
    const FsqPositions p = fsq_positions(grad, z, grad_z, dim, -1);
    const int64_t positions = p.inner() * p.outer();
    return VTOK_LAUNCH(backward_any<T>, dim3(unsigned((positions + kFsqThreads - 1) / kFsqThreads)),
                       kFsqThreads, 0, on, g, value, to, positions, p, s);
  });
}

}  // namespace vtok::cuda
