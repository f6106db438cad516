// As conformance.cu, for TMA and wgmma: the bytes that TMA puts into shared memory in each swizzle, zeros where a box is out of
// bounds, and the registers of a product of tiles that threads have written.
//
// nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -I csrc tests/emulator/conformance_sm90.cu -o conformance && ./conformance
#include "cuda/ptx_sm90.cuh"

namespace vtok::cuda {

constexpr int kElements = 80 * 7 * 5, kBoxRows = 3 * 6;                       // of 2 bytes, innermost 80; boxes have 3 x 6 rows
constexpr int kWords = kBoxRows * (128 + 64 + 32 + 32) / 4 + 64 * 64;         // boxes in four swizzles, then a tile of products

// A box at (40, -1, 2), as long as the swizzle: its first rows, the frames from the fourth on, and what lies beyond 80 are zeros.
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
  for (int i = threadIdx.x; i < kBoxRows * row_bytes / 4; i += 128) ptx::st_global(out + i, ptx::ld_shared<uint32_t>(base + 4 * i));
}

// a(r, k) = (3 r + 5 k) % 7 - 3 and b(c, k) = (2 c + 11 k) % 9 - 4, for 64 rows and 64 of k.
__global__ void products(uint32_t* out) {
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  for (uint32_t i = t; i < 64 * 64; i += 128) {
    const uint32_t r = i / 64, k = i % 64;
    ptx::st_shared(ptx::swizzled<128>(base, r, 2 * k), ptx::from_float<__nv_bfloat16>(float(int(3 * r + 5 * k) % 7 - 3)));
    ptx::st_shared(ptx::swizzled<128>(base + 8192, r, 2 * k), ptx::from_float<__nv_bfloat16>(float(int(2 * r + 11 * k) % 9 - 4)));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  for (float& x : d) x = float(t);
  ptx::wgmma_fence();
  for (int i = 0; i < 4; ++i)
    ptx::wgmma_m64k16<__nv_bfloat16, 64>(d, ptx::wgmma_descriptor<128>(base) + 2 * i,
                                         ptx::wgmma_descriptor<128>(base + 8192) + 2 * i);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) ptx::st_global(out + 128 * i + t, static_cast<uint32_t>(int(d[i])));
}

Status conformance_sm90(const Tensor& from, const Tensor& words) {
  auto* out = static_cast<uint32_t*>(words.data);
  if (words.numel() != kWords || from.numel() != kElements) return Status::Invalid("expected " + std::to_string(kWords) + " words");
  for (int swizzle : {128, 64, 32, 0}) {
    const uint32_t row = swizzle ? swizzle : 32;
    TensorMap map;
    VTOK_RETURN_IF_ERROR(encode(map, from.data, {DType::f16, 3, {80, 7, 5}, {2, 160, 1120}, {row / 2, 3, 6}, {1, 1, 1}, swizzle}));
    VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(boxes, 1, 128, 10240, nullptr, map, out, int(row)));
    out += kBoxRows * row / 4;
  }
  return VTOK_LAUNCH(products, 1, 128, 2 * 8192 + 1024, nullptr, out);
}

}  // namespace vtok::cuda

#ifndef VTOK_EMULATOR
#include <cstdio>
#include <vector>

int main() {
  using namespace vtok;
  std::vector<uint16_t> elements(cuda::kElements);
  std::vector<uint32_t> words(cuda::kWords);
  for (int i = 0; i < cuda::kElements; ++i) elements[i] = uint16_t(i + 1);
  Tensor from, out;
  from.rank = out.rank = 1, from.size[0] = cuda::kElements, out.size[0] = cuda::kWords;
  auto tried = [](cudaError_t error) { if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error)), std::exit(1); };
  tried(cudaMalloc(&from.data, 2 * elements.size()));
  tried(cudaMalloc(&out.data, 4 * words.size()));
  tried(cudaMemcpy(from.data, elements.data(), 2 * elements.size(), cudaMemcpyHostToDevice));
  const Status status = cuda::conformance_sm90(from, out);
  if (!status.ok()) return std::printf("%s\n", status.message.c_str()), 1;
  tried(cudaMemcpy(words.data(), out.data, 4 * words.size(), cudaMemcpyDeviceToHost));
  for (uint32_t word : words) std::printf("%08x\n", word);
}
#endif
