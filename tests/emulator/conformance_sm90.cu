// As conformance.cu, for what only sm_90a has: the bytes that TMA puts into shared memory in each swizzle,
// zeros where a box is out of bounds; what it puts into both blocks of a cluster, and back into global
// memory; the registers of products of tiles that threads have written, k innermost or transposed, or hold in
// registers; and what stmatrix stores.
//
// nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -I csrc tests/emulator/conformance_sm90.cu -o
// conformance && ./conformance
#include "conformance_main.inc"
#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {

// of 2 bytes, innermost 80; boxes have 3 x 6 rows
constexpr int kElements = 80 * 7 * 5, kBoxRows = 3 * 6;
constexpr int kBox = kBoxRows * 128;  // bytes
// words: two boxes and 128 words from each block
constexpr int kCluster = 2 * 2 * kBox / 4 + 2 * 128;
constexpr int kWords =
    kBoxRows * (128 + 64 + 32 + 32) / 4 + (64 + 64 + 128 + 192 + 8) * 64 + 256 + kCluster + kElements / 2;

// A box at (40, -1, 2), as long as the swizzle: its first rows, the frames from the fourth on, and what lies
// beyond 80 are zeros.
__global__ void boxes(const __grid_constant__ TensorMap map, uint32_t* out, int row_bytes) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, bar = base + 8192;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(bar, kBoxRows * row_bytes);
    ptx::tma_load(base, &map, bar, {40, -1, 2});
  }
  ptx::mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < kBoxRows * row_bytes / 4; i += 128)
    ptx::st_global(out + i, ptx::ld_shared<uint32_t>(base + 4 * i));
}

__device__ float left(uint32_t r, uint32_t k) { return float(int(3 * r + 5 * k) % 7 - 3); }
__device__ float right(uint32_t c, uint32_t k) { return float(int(2 * c + 11 * k) % 9 - 4); }

// left right^T for 64 rows, N columns and 64 of k, plus the thread's number.
enum class From { descriptors, registers, transposed };

template <From kFrom, int N>
__global__ void products(uint32_t* out) {
  using T = __nv_bfloat16;
  constexpr bool kTransposed = kFrom == From::transposed;
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  for (uint32_t i = t; i < (64 + N) * 64; i += 128) {
    const uint32_t row = i / 64, k = i % 64;
    const T value = ptx::from_float<T>(row < 64 ? left(row, k) : right(row - 64, k));
    // 64 rows are 64 lines of 128 bytes, one per row or one per k.
    const uint32_t line = kTransposed ? base + row / 64 * 8192 : base;
    ptx::st_shared(
        kTransposed ? ptx::swizzled<128>(line, k, row % 64 * 2) : ptx::swizzled<128>(line, row, 2 * k),
        value);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  uint32_t a[4][4];  // as mma_m16n8k16 has them
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const uint32_t row = t / 32 * 16 + t % 32 / 4 + j % 2 * 8, k = 16 * i + t % 4 * 2 + j / 2 * 8;
      const T pair[2] = {ptx::from_float<T>(left(row, k)), ptx::from_float<T>(left(row, k + 1))};
      memcpy(&a[i][j], pair, 4);
    }
  float d[N / 2];
  for (float& x : d) x = float(t);
  uint64_t of_left = ptx::wgmma_descriptor<128>(base), of_right = ptx::wgmma_descriptor<128>(base + 8192);
  if (kTransposed) of_left = ptx::wgmma_descriptor_transposed<128>(base, 8192);
  if (kTransposed) of_right = ptx::wgmma_descriptor_transposed<128>(base + 8192, 8192);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t on = kTransposed ? i * (2048 >> 4) : i * (32 >> 4);
    if constexpr (kFrom == From::registers)
      ptx::wgmma_m64k16<T, N>(d, a[i], of_right + on);
    else
      ptx::wgmma_m64k16<T, N, kTransposed, kTransposed>(d, of_left + on, of_right + on);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) ptx::st_global(out + 128 * i + t, static_cast<uint32_t>(int(d[i])));
}

// As causal_conv3d_sm90_wgrad.cu multiplies: 64 of k are 8 rows of 8 lines, every second of 17 rows; columns
// 64 j to 64 j + 63 begin at row j, so that they overlap. And the sums of the left operand's rows, by 8
// columns of ones with k innermost.
__global__ void taps(uint32_t* out) {
  using T = __nv_bfloat16;
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, lines = base + 8192,
                 ones = lines + 17 * 1024;
  const uint32_t t = threadIdx.x;
  for (uint32_t i = t; i < 64 * 64; i += 128)
    ptx::st_shared(ptx::swizzled<128>(base, i / 64, i % 64 * 2), ptx::from_float<T>(left(i % 64, i / 64)));
  for (uint32_t i = t; i < 17 * 8 * 64; i += 128)
    ptx::st_shared(ptx::swizzled<128>(lines, i / 64, i % 64 * 2), ptx::from_float<T>(right(i % 64, i / 64)));
  for (uint32_t i = t; i < 512; i += 128) ptx::st_shared(ones + 2 * i, ptx::from_float<T>(1));
  ptx::fence_proxy_async();
  __syncthreads();
  float d[96], sums[4];
  for (float& x : d) x = float(t);
  for (float& x : sums) x = float(t);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t a = ptx::wgmma_descriptor_transposed<128>(base + 2048 * i, 0);
    ptx::wgmma_m64k16<T, 192, true, true>(
        d, a, ptx::wgmma_descriptor_transposed<128>(lines + 4096 * i, 1024, 2048));
    ptx::wgmma_m64k16<T, 8, true>(sums, a, ptx::wgmma_descriptor<128>(ones));
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 96; ++i) ptx::st_global(out + 128 * i + t, static_cast<uint32_t>(int(d[i])));
  for (int i = 0; i < 4; ++i) ptx::st_global(out + 128 * (96 + i) + t, static_cast<uint32_t>(int(sums[i])));
}

// Lane l gives the address of row l, which lies at place 5 l % 32; its registers hold its number, which
// register, and which half.
__global__ void stored_matrices(uint32_t* out) {
  const uint32_t base = ptx::smem_base(), lane = threadIdx.x, row = base + 16 * (5 * lane % 32);
  uint32_t r[4];
  for (uint32_t i = 0; i < 4; ++i) r[i] = (lane << 8 | i << 4) * 0x10001 + 0x10000;
  ptx::stmatrix_x4(row, r);
  ptx::stmatrix_x4_trans(row + 512, r);
  __syncthreads();
  for (uint32_t c = 0; c < 4; ++c) {
    ptx::st_global(out + 4 * lane + c, ptx::ld_shared<uint32_t>(row + 4 * c));
    ptx::st_global(out + 128 + 4 * lane + c, ptx::ld_shared<uint32_t>(row + 512 + 4 * c));
  }
}

// Each of two blocks loads a box into both; the first stores it where it is partly out of bounds; each reads
// words of the other.
__global__ void clusters(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                         uint32_t* out) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, bar = base + 8192,
                 word = bar + 64 + 4 * threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  out += rank * kCluster / 2;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(bar, 2 * kBox);
    ptx::tma_load_multicast(base + rank * 3072, &from, bar, {0, int(rank), 0}, 3);
  }
  ptx::mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < 2 * kBox / 4; i += 128)
    ptx::st_global(out + i, ptx::ld_shared<uint32_t>(base + i / (kBox / 4) * 3072 + i % (kBox / 4) * 4));
  if (rank == 0 && threadIdx.x == 0) {
    ptx::tma_store(&to, base, {40, 5, 2});
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
  ptx::st_shared(word, rank * 1000 + threadIdx.x);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::st_global(out + 2 * kBox / 4 + threadIdx.x,
                 ptx::ld_shared_cluster<uint32_t>(ptx::mapa(word, rank ^ 1)));
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

Status conformance_sm90(const Tensor& from, const Tensor& words) {
  VTOK_RETURN_IF_ERROR(use_device(0));
  auto* out = static_cast<uint32_t*>(words.data);
  if (words.numel() != kWords || from.numel() != kElements)
    return Status::Invalid("expected " + std::to_string(kWords) + " words");
  for (int swizzle : {128, 64, 32, 0}) {
    const uint32_t row = swizzle ? swizzle : 32;
    TensorMap map;
    VTOK_RETURN_IF_ERROR(encode(
        map, from.data, {DType::f16, 3, {80, 7, 5}, {2, 160, 1120}, {row / 2, 3, 6}, {1, 1, 1}, swizzle}));
    VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(boxes, 1, 128, 10240, nullptr, map, out, int(row)));
    out += kBoxRows * row / 4;
  }
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH((products<From::descriptors, 64>), 1, 128, 2 * 8192 + 1024, nullptr, out));
  VTOK_RETURN_IF_ERROR(
      VTOK_LAUNCH((products<From::registers, 64>), 1, 128, 2 * 8192 + 1024, nullptr, out += 64 * 64));
  VTOK_RETURN_IF_ERROR(
      VTOK_LAUNCH((products<From::transposed, 128>), 1, 128, 3 * 8192 + 1024, nullptr, out += 64 * 64));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(taps, 1, 128, 27 * 1024, nullptr, out += 128 * 64));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(stored_matrices, 1, 32, 1024, nullptr, out += 200 * 64));
  TensorMap map, to;
  const TensorMapShape shape = {DType::f16, 3, {80, 7, 5}, {2, 160, 1120}, {64, 3, 6}, {1, 1, 1}, 128};
  VTOK_RETURN_IF_ERROR(encode(map, from.data, shape));
  VTOK_RETURN_IF_ERROR(encode(to, (out += 256) + kCluster, shape));
  return VTOK_LAUNCH_CLUSTER(dim3(2), clusters, 2, 128, 10240, nullptr, map, to, out);
}

}  // namespace vtok::cuda

#ifndef VTOK_EMULATOR
int main() {
  using namespace vtok;
  return conformance_main(cuda::conformance_sm90, cuda::kElements, cuda::kWords);
}
#endif
