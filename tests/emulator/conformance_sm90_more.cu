// As conformance_sm90.cu, the rest of what the Hopper kernels rely on: boxes of five axes, out of bounds on the outer
// ones and with steps between elements; boxes stored with the narrower swizzles; products of every shape that is
// used, in both types and in e4m3; rounding to e4m3; weights multicast in halves and given up by relaxed arrivals of both blocks; registers
// moved between warpgroups.
#include "conformance_main.inc"
#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {

constexpr int kElements = 16 * 9 * 6 * 4 * 3;
constexpr int kBoxWords = 12 * 8, kSteppedWords = 4 * 8, kStored = 80 * 7 * 5;
constexpr int kColumns = 96 + 112 + 128 + 144 + 160 + 192 + 160 + 256 + 256;  // of all products
constexpr int kNarrowColumns = 64 + 96 + 112 + 128 + 144 + 160, kNarrowed = 512;
constexpr int kHalves = 2 * 16 * 32;  // of a block
constexpr int kWords = 5 * kBoxWords + 3 * kSteppedWords + 2 * kStored / 2 + kColumns * 64 +
                       kNarrowColumns * 64 + kNarrowed / 4 + 2 * kHalves + 384;

struct Place {
  int at[5];
};

// One box of rows of 32 bytes.
__global__ void box_of_five(const __grid_constant__ TensorMap map, const Place place, uint32_t* out,
                            int words) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, bar = base + 1024;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(bar, words * 4);
    ptx::tma_load(base, &map, bar, place.at);
  }
  ptx::mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < words; i += 32)
    ptx::st_global(out + i, ptx::ld_shared<uint32_t>(base + 4 * i));
}

// Rows of W bytes, row r and element c as 100 r + c, to a box at (40, 5, 2).
template <int W>
__global__ void stored_box(const __grid_constant__ TensorMap to) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024;
  for (uint32_t i = threadIdx.x; i < 18 * W / 2; i += 32)
    ptx::st_shared(ptx::swizzled<W>(base, i / (W / 2), i % (W / 2) * 2),
                   uint16_t(i / (W / 2) * 100 + i % (W / 2)));
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x > 0) return;
  ptx::tma_store(&to, base, {40, 5, 2});
  ptx::tma_store_commit();
  ptx::tma_store_wait<0>();
}

__device__ float left(uint32_t r, uint32_t k) { return float(int(3 * r + 5 * k) % 7 - 3); }
__device__ float right(uint32_t c, uint32_t k) { return float(int(2 * c + 11 * k) % 9 - 4); }

// left right^T for 64 rows, N columns and 64 of k, plus the thread's number; two groups under way, as in the
// kernels' loops.
template <class T, int N, bool Registers>
__global__ void products(uint32_t* out) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  for (uint32_t i = t; i < (64 + N) * 64; i += 128) {
    const uint32_t row = i / 64, k = i % 64;
    const T value = ptx::from_float<T>(row < 64 ? left(row, k) : right(row - 64, k));
    ptx::st_shared(ptx::swizzled<128>(base, row, 2 * k), value);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  uint32_t a[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const uint32_t row = t / 32 * 16 + t % 32 / 4 + j % 2 * 8, k = 16 * i + t % 4 * 2 + j / 2 * 8;
      const T pair[2] = {ptx::from_float<T>(left(row, k)), ptx::from_float<T>(left(row, k + 1))};
      memcpy(&a[i][j], pair, 4);
    }
  float d[N / 2];
  for (float& x : d) x = float(t);
  const uint64_t of_left = ptx::wgmma_descriptor<128>(base),
                 of_right = ptx::wgmma_descriptor<128>(base + 8192);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 2 * group; i < 2 * group + 2; ++i)
      if constexpr (Registers)
        ptx::wgmma_m64k16<T, N>(d, a[i], of_right + 2 * i);
      else
        ptx::wgmma_m64k16<T, N>(d, of_left + 2 * i, of_right + 2 * i);
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) ptx::st_global(out + 128 * i + t, static_cast<uint32_t>(int(d[i])));
}

// left right^T for 64 rows, N columns and 128 of k, in e4m3, plus the thread's number.
template <int N>
__global__ void narrow_products(uint32_t* out) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  for (uint32_t i = t; i < N * 64; i += 128) {
    const uint32_t c = i / 64, k = i % 64 * 2;
    ptx::st_shared(ptx::swizzled<128>(base, c, k), ptx::to_e4m3x2(right(c, k), right(c, k + 1)));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  uint32_t a[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const uint32_t row = t / 32 * 16 + t % 32 / 4 + j % 2 * 8, k = 32 * i + t % 4 * 4 + j / 2 * 16;
      a[i][j] = ptx::to_e4m3x2(left(row, k), left(row, k + 1)) |
                uint32_t(ptx::to_e4m3x2(left(row, k + 2), left(row, k + 3))) << 16;
    }
  float d[N / 2];
  for (float& x : d) x = float(t);
  const uint64_t of_right = ptx::wgmma_descriptor<128>(base);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32_e4m3<N>(d, a[i], of_right + 2 * i);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) ptx::st_global(out + 128 * i + t, static_cast<uint32_t>(int(d[i])));
}

// Value i: of all sizes from 2^-12 to 1024, and ties among them.
__global__ void narrowed(uint32_t* out) {
  auto value = [](uint32_t i) { return float(int(i * 37 % 2048) - 1024) / float(1 << i % 13); };
  const uint32_t i = 4 * threadIdx.x;
  ptx::st_global(out + threadIdx.x, ptx::to_e4m3x2(value(i), value(i + 1)) |
                                        uint32_t(ptx::to_e4m3x2(value(i + 2), value(i + 3))) << 16);
}

// Sixteen rows for both blocks, eight brought by each; and sixteen more in their place once both have read them.
__global__ void halves(const __grid_constant__ TensorMap from, uint32_t* out) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, full = base + 2048, empty = full + 8;
  const uint32_t rank = ptx::cluster_rank(), t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 2 * 4);  // the warps of both blocks
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (uint32_t round = 0; round < 2; ++round) {
    if (t == 0) {
      ptx::mbarrier_wait_cluster(empty, round ^ 1);
      ptx::mbarrier_arrive_expect(full, 2048);
      ptx::tma_load_multicast(base + rank * 1024, &from, full, {0, int(16 * round + 8 * rank), 0}, 3);
    }
    ptx::mbarrier_wait(full, round);
    for (uint32_t i = t; i < 512; i += 128)
      ptx::st_global(out + rank * kHalves + round * 512 + i, ptx::ld_shared<uint32_t>(base + 4 * i));
    __syncwarp();
    if (t % 32 < 2) ptx::mbarrier_arrive_cluster_relaxed(ptx::mapa(empty, t % 32));
  }
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

__global__ void __launch_bounds__(384, 1) moved_registers(uint32_t* out) {
  if (threadIdx.x < 128)
    ptx::setmaxnreg_dec<40>();
  else
    ptx::setmaxnreg_inc<232>();
  ptx::st_global(out + threadIdx.x, 7 * threadIdx.x);
}

template <class T, int N, bool Registers>
Status multiply(uint32_t*& out) {
  uint32_t* to = out;
  out += N * 64;
  return VTOK_LAUNCH((products<T, N, Registers>), 1, 128, (64 + N) * 128 + 1024, nullptr, to);
}

template <int N>
Status multiply_narrow(uint32_t*& out) {
  uint32_t* to = out;
  out += N * 64;
  return VTOK_LAUNCH(narrow_products<N>, 1, 128, N * 128 + 1024, nullptr, to);
}

Status boxes_of_five(const Tensor& from, uint32_t*& out) {
  const Place places[] = {
      {0, -1, 1, -1, 0}, {0, 2, -1, 4, 1}, {0, 7, 4, 3, 2}, {0, 0, 0, 1, -1}, {0, 0, 0, 1, 3}};
  TensorMapShape shape = {DType::f16,      5, {16, 9, 6, 4, 3}, {2, 32, 288, 1728, 6912}, {16, 4, 3, 1, 1},
                          {1, 1, 1, 1, 1}, 0};
  TensorMap map;
  VTOK_RETURN_IF_ERROR(encode(map, from.data, shape));
  for (const Place& place : places) {
    VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(box_of_five, 1, 32, 3072, nullptr, map, place, out, kBoxWords));
    out += kBoxWords;
  }
  for (uint32_t step : {2, 4, 8}) {
    for (int axis : {1, 2}) {
      shape.box[axis] = 2 * step;
      shape.step[axis] = step;
    }
    VTOK_RETURN_IF_ERROR(encode(map, from.data, shape));
    VTOK_RETURN_IF_ERROR(
        VTOK_LAUNCH(box_of_five, 1, 32, 3072, nullptr, map, (Place{{0, -1, -1, 2, 1}}), out, kSteppedWords));
    out += kSteppedWords;
  }
  return Status::Ok();
}

Status conformance_sm90_more(const Tensor& from, const Tensor& words) {
  using B = __nv_bfloat16;
  using H = __half;
  auto* out = static_cast<uint32_t*>(words.data);
  if (words.numel() != kWords || from.numel() != kElements)
    return Status::Invalid("expected " + std::to_string(kWords) + " words");
  VTOK_RETURN_IF_ERROR(use_device(0));
  VTOK_RETURN_IF_ERROR(boxes_of_five(from, out));
  TensorMapShape shape = {DType::f16, 3, {80, 7, 5}, {2, 160, 1120}, {32, 3, 6}, {1, 1, 1}, 64};
  TensorMap map;
  VTOK_RETURN_IF_ERROR(encode(map, out, shape));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(stored_box<64>, 1, 32, 4096, nullptr, map));
  shape.box[0] = 16;
  shape.swizzle = 32;
  VTOK_RETURN_IF_ERROR(encode(map, out += kStored / 2, shape));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(stored_box<32>, 1, 32, 4096, nullptr, map));
  out += kStored / 2;
  for (auto multiplied : {multiply<B, 96, true>, multiply<B, 112, true>, multiply<B, 128, true>,
                          multiply<B, 144, true>, multiply<B, 160, true>, multiply<B, 192, true>,
                          multiply<H, 160, true>, multiply<H, 256, false>, multiply<B, 256, false>})
    VTOK_RETURN_IF_ERROR(multiplied(out));
  for (auto multiplied : {multiply_narrow<64>, multiply_narrow<96>, multiply_narrow<112>,
                          multiply_narrow<128>, multiply_narrow<144>, multiply_narrow<160>})
    VTOK_RETURN_IF_ERROR(multiplied(out));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(narrowed, 1, kNarrowed / 4, 0, nullptr, out));
  out += kNarrowed / 4;
  VTOK_RETURN_IF_ERROR(
      encode(map, from.data, {DType::f16, 3, {80, 35, 1}, {2, 160, 5600}, {64, 8, 1}, {1, 1, 1}, 128}));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH_CLUSTER(dim3(2), halves, 2, 128, 4096, nullptr, map, out));
  return VTOK_LAUNCH(moved_registers, 1, 384, 0, nullptr, out + 2 * kHalves);
}

}  // namespace vtok::cuda

#ifndef VTOK_EMULATOR
int main() {
  using namespace vtok;
  return conformance_main(cuda::conformance_sm90_more, cuda::kElements, cuda::kWords);
}
#endif
