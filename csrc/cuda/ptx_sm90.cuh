// The instructions that only sm_90a has, one function each: mbarrier, TMA tiles, wgmma. For sources named *_sm90.cu, which are
// built for that architecture alone. In the emulator: tests/emulator/sm90.h.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"

#ifndef VTOK_EMULATOR

namespace vtok::ptx {

// ---- mbarrier: 8 bytes of shared memory, at a multiple of 8 --------------------------------------------------------------

// A phase ends when `count` threads have arrived and as many bytes have come as were expected.
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// By the thread that initialised: TMA may signal the barriers from now on (other threads of the block: after __syncthreads).
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives, and expects `bytes` more in this phase: those of whole boxes, whatever part of them is out of bounds.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: the first has 0. A fresh barrier lets parity 1 pass.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(bar), "r"(parity) : "memory");
}

// What this thread wrote to shared memory is there for TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `threads` threads, whole warps, meet at barrier `id` (1 to 15; 0 is __syncthreads). A constant id reserves only that barrier.
template <int Id>
__device__ __forceinline__ void bar_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }

// ---- TMA: boxes of a tensor, called by one thread; coordinates innermost first -------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Fills a box in shared memory, zeros where it is out of bounds, and gives its bytes to the barrier.
__device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[4]) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[5]) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[2]) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(at[0]), "r"(at[1]) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[3]) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(smem), "l"(map), "r"(bar), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
}

// Writes a box, but for what is out of bounds, as part of this thread's group.
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[2]) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(smem), "r"(at[0]), "r"(at[1]) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[3]) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(map), "r"(smem), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[4]) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(smem), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[5]) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(map), "r"(smem), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but N of this thread's youngest groups have read shared memory, which may then be overwritten or given up.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

// ---- wgmma: products of a warpgroup (128 threads, of which all call) -----------------------------------------------------

// Before the first product, and after any other access to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N groups are under way; registers of those before may be used, and the shared memory they read overwritten.
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define VTOK_R16(a, b, c, e, f, g, h, i, j, k, l, m, n, o, p, q) "%" #a ",%" #b ",%" #c ",%" #e ",%" #f ",%" #g ",%" #h ",%" #i \
  ",%" #j ",%" #k ",%" #l ",%" #m ",%" #n ",%" #o ",%" #p ",%" #q
#define VTOK_R0 VTOK_R16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define VTOK_R1 VTOK_R0 "," VTOK_R16(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)
#define VTOK_R2 VTOK_R1 "," VTOK_R16(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47)
#define VTOK_R3 VTOK_R2 "," VTOK_R16(48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63)
#define VTOK_R4 VTOK_R3 "," VTOK_R16(64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79)
#define VTOK_R5 VTOK_R4 "," VTOK_R16(80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95)
#define VTOK_R7 VTOK_R5 "," VTOK_R16(96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111) "," \
  VTOK_R16(112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127)
#define VTOK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VTOK_D16(i) VTOK_D4(i), VTOK_D4(i + 4), VTOK_D4(i + 8), VTOK_D4(i + 12)
#define VTOK_D64(i) VTOK_D16(i), VTOK_D16(i + 16), VTOK_D16(i + 32), VTOK_D16(i + 48)
#define VTOK_WGMMA(n, type, registers, a_operand, b_operand, accumulate_operand, ...)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_operand ", 0;\n"                                                   \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a_operand ", " b_operand      \
               ", p, 1, 1, 0, 0;\n}" : __VA_ARGS__ : "l"(a), "l"(b), "r"(int(accumulate)))
#define VTOK_WGMMA_TYPES(n, ...)                                                     \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) VTOK_WGMMA(n, "bf16", __VA_ARGS__); \
  else VTOK_WGMMA(n, "f16", __VA_ARGS__)

// d (64 x N) = a (64 x 16) b (16 x N), plus d where it accumulates; a and b by descriptors, both with k innermost. Thread t has in
// d[i] the element (16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), 8 (i / 4) + 2 (t % 4) + i % 2).
template <class T, int N>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "add it where it is needed");
  if constexpr (N == 64) {
    VTOK_WGMMA_TYPES(64, VTOK_R1, "%32", "%33", "%34", VTOK_D16(0), VTOK_D16(16));
  } else if constexpr (N == 96) {
    VTOK_WGMMA_TYPES(96, VTOK_R2, "%48", "%49", "%50", VTOK_D16(0), VTOK_D16(16), VTOK_D16(32));
  } else if constexpr (N == 128) {
    VTOK_WGMMA_TYPES(128, VTOK_R3, "%64", "%65", "%66", VTOK_D64(0));
  } else if constexpr (N == 192) {
    VTOK_WGMMA_TYPES(192, VTOK_R5, "%96", "%97", "%98", VTOK_D64(0), VTOK_D16(64), VTOK_D16(80));
  } else {
    VTOK_WGMMA_TYPES(256, VTOK_R7, "%128", "%129", "%130", VTOK_D64(0), VTOK_D64(64));
  }
}

}  // namespace vtok::ptx
#endif

namespace vtok::ptx {

// A tile of rows of W = 128, 64 or 32 bytes of k, swizzled as TMA writes it, for wgmma: 8 rows are 8 W bytes, at a multiple of
// that. The next 16 of k are 32 bytes on; rows start at multiples of 8.
template <int W>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem) {
  static_assert(W == 128 || W == 64 || W == 32);
  constexpr uint64_t kSwizzle = W == 128 ? 1 : W == 64 ? 2 : 3;
  return uint64_t(smem >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(8 * W >> 4) << 32 | kSwizzle << 62;
}

// Where byte `column` of row `row` of such a tile is, for threads that read or write it themselves.
template <int W>
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, uint32_t row, uint32_t column) {
  const uint32_t address = tile + row * W + column;
  return address ^ (address >> 3 & (W - 16));
}

}  // namespace vtok::ptx
