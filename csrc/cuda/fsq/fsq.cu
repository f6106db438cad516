// fsq: the level of a value is how many of its channel's thresholds it has reached; codes and indices follow
// from the level.
//
// The tricks: the float32 thresholds are in the kernel's parameters, where a comparison reads them as an
// operand (channels of up to eight levels, kPitch thresholds each; others search a table in shared memory),
// so no tanh is evaluated and every GPU gives the reference's bits. Codes are (level - half) / half: the
// product with the rounded reciprocal and one Newton step, which is the rounded quotient (Markstein 1990).
//
// Three layouts. Planar, positions adjacent: a thread takes 16 bytes of each channel in turn and keeps those
// positions' indices in registers. Rows, channels adjacent: a block stages 256 positions in shared memory, 16
// bytes at a time, then a thread has a position. Any strides: a thread has a position, element by element;
// also where addresses are not multiples of 16 bytes.
//
// Floor per position of C channels: 2 C sizeof(T) + 4 bytes; about 2 (L - 1) + 8 instructions per value. By
// count, on an H200 (4.8 TB/s, 132 x 128 lanes), six channels of eight levels are limited by memory in
// float32, and about evenly by both in half precision.
// Shared memory: rows 256 C sizeof(T), the search table up to 3 KiB. Registers:
// tests/build/test_cuda_build.py prints them.
#include "cuda/fsq/fsq.cuh"

namespace vtok::cuda {
namespace {

struct Levels {
  int channels, thresholds;
  int first[kFsqChannels], count[kFsqChannels], basis[kFsqChannels];
  float half[kFsqChannels], inverse[kFsqChannels];  // L / 2 rounded down, and its reciprocal
  float threshold[kFsqThresholds];
};

__device__ float code_of(int level, float half, float inverse) {
  const float centered = float(level) - half, quotient = centered * inverse;
  return fmaf(fmaf(-quotient, half, centered), inverse, quotient);
}

// `table`: the thresholds in shared memory, where kPitch is 0.
template <int kPitch>
__device__ int level_of(float z, const Levels& l, int c, uint32_t table) {
  int level = 0;
  if constexpr (kPitch > 0) {
#pragma unroll
    // NaN after the last: never reached
    for (int k = 0; k < kPitch; ++k) level += z >= l.threshold[c * kPitch + k];
  } else {
    table += 4 * l.first[c];
    for (int left = l.count[c]; left > 0;) {
      const int middle = left / 2;
      const bool reached = z >= ptx::ld_shared<float>(table + 4 * (level + middle));
      level += reached ? middle + 1 : 0;
      left = reached ? left - middle - 1 : middle;
    }
  }
  return level;
}

// Puts the table after `used` bytes of shared memory; returns its place.
template <int kPitch>
__device__ uint32_t stage_table(const Levels& l, uint32_t used) {
  const uint32_t table = ptx::smem_base() + used;
  if constexpr (kPitch == 0) {
    for (int i = threadIdx.x; i < l.thresholds; i += kFsqThreads)
      ptx::st_shared(table + 4 * i, l.threshold[i]);
    __syncthreads();
  }
  return table;
}

// The index of a position whose channel c is load(c); store(c, code) gets its codes. kC: the channels where
// known, else 0.
template <class T, int kC, int kPitch, class Load, class Store>
__device__ int quantize_position(const Levels& l, uint32_t table, Load load, Store store) {
  int index = 0;
  bool nan = false;
  const int channels = kC ? kC : l.channels;
#pragma unroll
  for (int c = 0; c < channels; ++c) {
    const float z = load(c);
    const int level = level_of<kPitch>(z, l, c, table);
    store(c, ptx::from_float<T>(z != z ? z : code_of(level, l.half[c], l.inverse[c])));
    nan |= z != z;
    index += level * l.basis[c];
  }
  return nan ? -1 : index;
}

// Four blocks a multiprocessor, 64 registers: left to itself, ptxas spills two of them for sm_100 and sm_120.
template <class T, int kC, int kPitch>
__global__ void __launch_bounds__(kFsqThreads, 4)
    quantize_planar(const T* z, T* codes, int32_t* indices, int64_t chunks,
                    const __grid_constant__ FsqPositions p, const __grid_constant__ Levels l) {
  constexpr int kV = 16 / sizeof(T);
  const uint32_t table = stage_table<kPitch>(l, 0);
  const int64_t outer = blockIdx.x / chunks,
                first = ((blockIdx.x - outer * chunks) * kFsqThreads + threadIdx.x) * kV;
  if (first >= p.inner()) return;
  const int count = p.inner() - first < kV ? int(p.inner() - first) : kV;
  int64_t at[3];
  p.locate(outer, first, at);
  int index[kV] = {};
  bool nan[kV] = {};
  const int channels = kC ? kC : l.channels;
#pragma unroll
  for (int c = 0; c < channels; ++c) {
    const T* from = z + at[0] + c * p.channel_step[0];
    T* to = codes + at[1] + c * p.channel_step[1];
    struct alignas(16) {
      T v[kV];
    } vector;
    if (count == kV)
      vector = ptx::ld_global(reinterpret_cast<const decltype(vector)*>(from));
    else
#pragma unroll
      for (int v = 0; v < kV; ++v) vector.v[v] = v < count ? ptx::ld_global(from + v) : T{};
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      const float value = ptx::to_float(vector.v[v]);
      const int level = level_of<kPitch>(value, l, c, table);
      nan[v] |= value != value;
      index[v] += level * l.basis[c];
      vector.v[v] = ptx::from_float<T>(value != value ? value : code_of(level, l.half[c], l.inverse[c]));
    }
    if (count == kV)
      ptx::st_global(reinterpret_cast<decltype(vector)*>(to), vector);
    else
#pragma unroll
      for (int v = 0; v < kV; ++v)
        if (v < count) ptx::st_global(to + v, vector.v[v]);
  }
#pragma unroll
  for (int v = 0; v < kV; ++v) index[v] = nan[v] ? -1 : index[v];
#pragma unroll
  for (int v = 0; v < kV; v += 4) {
    if (v + 4 <= count)
      ptx::st_global(reinterpret_cast<int4*>(indices + at[2] + v),
                     make_int4(index[v], index[v + 1], index[v + 2], index[v + 3]));
    else
#pragma unroll
      for (int i = v; i < v + 4; ++i)
        if (i < count) ptx::st_global(indices + at[2] + i, index[i]);
  }
}

template <class T, int kC, int kPitch>
__global__ void __launch_bounds__(kFsqThreads)
    quantize_rows(const T* z, T* codes, int32_t* indices, int64_t chunks,
                  const __grid_constant__ FsqPositions p, const __grid_constant__ Levels l) {
  const int channels = kC ? kC : l.channels;
  const uint32_t rows = ptx::smem_base(), table = stage_table<kPitch>(l, kFsqThreads * channels * sizeof(T));
  const int64_t outer = blockIdx.x / chunks, first = (blockIdx.x - outer * chunks) * kFsqThreads;
  const int count = p.inner() - first < kFsqThreads ? int(p.inner() - first) : kFsqThreads, t = threadIdx.x;
  int64_t at[3];
  p.locate(outer, first, at);
  load_rows(rows, z + at[0], count * channels);
  if (t < count) {
    auto place = [&](int c) { return rows + (t * channels + c) * uint32_t(sizeof(T)); };
    const int index = quantize_position<T, kC, kPitch>(
        l, table, [&](int c) { return ptx::to_float(ptx::ld_shared<T>(place(c))); },
        [&](int c, T code) { ptx::st_shared(place(c), code); });
    ptx::st_global(indices + at[2] + t, index);
  }
  store_rows(codes + at[1], rows, count * channels);
}

template <class T, int kPitch>
__global__ void __launch_bounds__(kFsqThreads)
    quantize_any(const T* z, T* codes, int32_t* indices, int64_t positions,
                 const __grid_constant__ FsqPositions p, const __grid_constant__ Levels l) {
  const uint32_t table = stage_table<kPitch>(l, 0);
  const int64_t position = int64_t(blockIdx.x) * kFsqThreads + threadIdx.x;
  if (position >= positions) return;
  const int64_t outer = position / p.inner();
  int64_t at[3];
  p.locate(outer, position - outer * p.inner(), at);
  const int index = quantize_position<T, 0, kPitch>(
      l, table, [&](int c) { return ptx::to_float(ptx::ld_global(z + at[0] + c * p.channel_step[0])); },
      [&](int c, T code) { ptx::st_global(codes + at[1] + c * p.channel_step[1], code); });
  ptx::st_global(indices + at[2], index);
}

// ---- decode -----------------------------------------------------------------------------------------------

// kRows: codes of neighboring positions are adjacent, and go through shared memory.
template <class T, class Index, bool kRows>
__global__ void __launch_bounds__(kFsqThreads)
    decode(const Index* indices, T* codes, int64_t positions, uint32_t last,
           const __grid_constant__ FsqPositions p, const __grid_constant__ Levels l) {
  const uint32_t rows = ptx::smem_base();
  const int64_t first = int64_t(blockIdx.x) * kFsqThreads, position = first + threadIdx.x;
  if (position < positions) {
    const int64_t outer = position / p.inner();
    int64_t at[3];
    p.locate(outer, position - outer * p.inner(), at);
    const int64_t index = ptx::ld_global(indices + at[0]);
    const bool inside = index >= 0 && index <= int64_t(last);
    uint32_t rest = uint32_t(index);
    for (int c = 0; c < l.channels; ++c) {
      const uint32_t levels = l.count[c] + 1, next = rest / levels;
      const T code =
          ptx::from_float<T>(inside ? code_of(int(rest - next * levels), l.half[c], l.inverse[c]) : NAN);
      if constexpr (kRows)
        ptx::st_shared(rows + (threadIdx.x * l.channels + c) * uint32_t(sizeof(T)), code);
      else
        ptx::st_global(codes + at[1] + c * p.channel_step[1], code);
      rest = next;
    }
  }
  if constexpr (kRows) {
    const int count = positions - first < kFsqThreads ? int(positions - first) : kFsqThreads;
    store_rows(codes + first * l.channels, rows, count * l.channels);
  }
}

// ---- launchers --------------------------------------------------------------------------------------------

Status fill(Levels& to, const std::vector<int64_t>& levels, int pitch, const Tensor* thresholds) {
  to = {};
  to.channels = int(levels.size());
  int64_t codebook = 1;
  for (int c = 0, next = 0; c < to.channels; ++c) {
    const int64_t level = levels[c];
    if (level < 2) return Status::Invalid("levels: " + std::to_string(level) + " is below 2");
    to.basis[c] = int(codebook);
    if (level > int64_t(1) << 31 || (codebook *= level) > int64_t(1) << 31)
      return Status::Invalid("levels: the codebook exceeds 2**31");
    to.first[c] = next;
    to.count[c] = int(level) - 1;
    to.half[c] = float(level / 2);
    to.inverse[c] = 1 / to.half[c];
    if (!thresholds) continue;
    next += pitch ? pitch : to.count[c];
    if (next > kFsqThresholds)
      return Status::Unsupported("levels: more than " + std::to_string(kFsqThresholds) +
                                 " thresholds of all channels");
    float* row = to.threshold + to.first[c];
    std::fill(row, to.threshold + next, NAN);
    const float* from = static_cast<const float*>(thresholds->data) + c * thresholds->size[1];
    std::copy(from, from + to.count[c], row);
    to.thresholds = next;
  }
  return Status::Ok();
}

template <class T, int kC, int kPitch>
Status launch_quantize(const Tensor& z, const Tensor& codes, const Tensor& indices, const FsqPositions& p,
                       const Levels& l, cudaStream_t stream) {
  const auto* from = static_cast<const T*>(z.data);
  auto* to = static_cast<T*>(codes.data);
  auto* into = static_cast<int32_t*>(indices.data);
  const uint32_t table = kPitch ? 0 : 4 * l.thresholds;
  const bool worthwhile = p.axes == 1 || p.inner() >= kFsqThreads;  // blocks for each place of the outer axes
  const bool planar = p.adjacent(0) && p.adjacent(1) && p.adjacent(2) && fsq_aligned(p, 0, z, true) &&
                      fsq_aligned(p, 1, codes, true) && fsq_aligned(p, 2, indices, false);
  const int64_t row = p.step[p.axes - 1][0];
  const bool rows = p.channel_step[0] == 1 && p.channel_step[1] == 1 && row == l.channels &&
                    p.step[p.axes - 1][1] == row && p.adjacent(2) && fsq_aligned(p, 0, z, false) &&
                    fsq_aligned(p, 1, codes, false);
  if (worthwhile && planar) {
    const int64_t chunks = fsq_chunks(p, kFsqThreads * 16 / sizeof(T));
    return VTOK_LAUNCH(quantize_planar<T, kC, kPitch>, dim3(unsigned(chunks * p.outer())), kFsqThreads, table,
                       stream, from, to, into, chunks, p, l);
  }
  if (worthwhile && rows) {
    const int64_t chunks = fsq_chunks(p, kFsqThreads);
    return VTOK_LAUNCH(quantize_rows<T, kC, kPitch>, dim3(unsigned(chunks * p.outer())), kFsqThreads,
                       kFsqThreads * l.channels * sizeof(T) + table, stream, from, to, into, chunks, p, l);
  }
  const int64_t positions = p.inner() * p.outer();
  return VTOK_LAUNCH(quantize_any<T, kPitch>, dim3(unsigned((positions + kFsqThreads - 1) / kFsqThreads)),
                     kFsqThreads, table, stream, from, to, into, positions, p, l);
}

}  // namespace

Status fsq_quantize(const Tensor& z, const Tensor& codes, const Tensor& indices, const Tensor& thresholds,
                    const std::vector<int64_t>& levels, int dim, void* stream) {
  VTOK_RETURN_IF_ERROR(fsq_check_channels(z, levels.size(), dim, "z"));
  if (!fsq_same_shape(z, codes)) return Status::Invalid("codes: expected the type and sizes of z");
  bool same = indices.dtype == DType::i32 && indices.rank == z.rank - 1;
  for (int i = 0; same && i < indices.rank; ++i) same = indices.size[i] == z.size[i < dim ? i : i + 1];
  if (!same) return Status::Invalid("indices: expected int32 with the sizes of z without its channels");
  const int64_t most = *std::max_element(levels.begin(), levels.end());
  if (thresholds.dtype != DType::f32 || thresholds.rank != 2 || thresholds.size[0] != z.size[dim] ||
      thresholds.size[1] != most - 1)
    return Status::Invalid("thresholds: expected float32 (channels, most levels - 1)");
  const int pitch = most <= 8 ? 7 : 0;
  Levels l;
  VTOK_RETURN_IF_ERROR(fill(l, levels, pitch, &thresholds));
  if (z.numel() == 0) return Status::Ok();
  const FsqPositions p = fsq_positions(z, codes, indices, dim, 2);
  auto* on = static_cast<cudaStream_t>(stream);
  return fsq_dispatch(z.dtype, [&](auto element) {
    using T = decltype(element);
    if (!pitch) return launch_quantize<T, 0, 0>(z, codes, indices, p, l, on);
    switch (l.channels) {  // those of most codebooks, unrolled
      case 4: return launch_quantize<T, 4, 7>(z, codes, indices, p, l, on);
      case 5: return launch_quantize<T, 5, 7>(z, codes, indices, p, l, on);
      case 6: return launch_quantize<T, 6, 7>(z, codes, indices, p, l, on);
      default: return launch_quantize<T, 0, 7>(z, codes, indices, p, l, on);
    }
  });
}

Status fsq_decode(const Tensor& indices, const Tensor& codes, const std::vector<int64_t>& levels, int dim,
                  void* stream) {
  VTOK_RETURN_IF_ERROR(fsq_check_channels(codes, levels.size(), dim, "codes"));
  bool same = (indices.dtype == DType::i32 || indices.dtype == DType::i64) && indices.rank == codes.rank - 1;
  for (int i = 0; same && i < indices.rank; ++i) same = indices.size[i] == codes.size[i < dim ? i : i + 1];
  if (!same)
    return Status::Invalid("indices: expected int32 or int64 with the sizes of codes without their channels");
  Levels l;
  VTOK_RETURN_IF_ERROR(fill(l, levels, 0, nullptr));
  if (codes.numel() == 0) return Status::Ok();
  uint32_t last = 0;
  for (int c = 0; c < l.channels; ++c) last += uint32_t(l.count[c]) * uint32_t(l.basis[c]);
  const FsqPositions p = fsq_positions(indices, codes, codes, dim, 0);
  const int64_t positions = p.inner() * p.outer();
  const bool rows =
      p.axes == 1 && p.channel_step[1] == 1 && p.step[0][1] == l.channels && fsq_aligned(p, 1, codes, false);
  const dim3 blocks(unsigned((positions + kFsqThreads - 1) / kFsqThreads));
  return fsq_dispatch(codes.dtype, [&](auto element) {
    using T = decltype(element);
    auto* to = static_cast<T*>(codes.data);
    auto launch = [&](auto index) {
      using Index = decltype(index);
      const auto* from = static_cast<const Index*>(indices.data);
      auto* on = static_cast<cudaStream_t>(stream);
      if (rows)
        return VTOK_LAUNCH(decode<T, Index, true>, blocks, kFsqThreads, kFsqThreads * l.channels * sizeof(T),
                           on, from, to, positions, last, p, l);
      return VTOK_LAUNCH(decode<T, Index, false>, blocks, kFsqThreads, 0, on, from, to, positions, last, p,
                         l);
    };
    return indices.dtype == DType::i32 ? launch(int32_t{}) : launch(int64_t{});
  });
}

}  // namespace vtok::cuda
