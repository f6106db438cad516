// The instructions that only sm_90a has, one function each: mbarrier, clusters, TMA tiles, stmatrix, wgmma.
// For sources named *_sm90.cu, which are built only for that architecture. In the emulator:
// tests/emulator/sm90.h.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"

namespace vtok::ptx {

// A float of 8 bits: 4 of exponent, 3 of fraction; 448 at most, no infinities.
struct E4m3 {
  uint8_t bits;
};

}  // namespace vtok::ptx

#ifndef VTOK_EMULATOR

namespace vtok::ptx {

// ---- mbarrier: 8 bytes of shared memory, at a multiple of 8 -----------------------------------------------

// A phase ends when `count` threads have arrived and as many bytes have come as were expected.
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// By the thread that initialized: TMA may signal the barriers from now on (other threads of the block: after
// __syncthreads).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives, and expects `bytes` more in this phase: those of whole boxes, whatever part of them is out of
// bounds.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// The same from any block of the cluster: `bar` as mapa gives it. What this thread did before is known to who
// waits there by mbarrier_wait_cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The same without a fence for all memory, which costs hundreds of cycles, by a thread that has only read
// what it gives up: what it has read has arrived, so that nothing that begins after this can change it.
__device__ __forceinline__ void mbarrier_arrive_cluster_relaxed(uint32_t bar) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Whether the phase of this parity has ended: the first has 0, and a fresh barrier lets parity 1 pass. May
// sleep for a while first.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

// For a barrier on which other blocks of the cluster arrive.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  } while (!done);
}

// What this thread wrote to shared memory is there for TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `threads` threads, whole warps, meet at barrier `id` (1 to 15; 0 is __syncthreads). A constant id reserves
// only that barrier.
template <int Id>
__device__ __forceinline__ void bar_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

// True in one lane of the warp, which all lanes call: always the same one, but not one to rely on.
__device__ __forceinline__ bool elect_sync() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected;
}

// A warpgroup takes or gives back registers, to have `Registers` per thread: a multiple of 8 from 24 to 256.
// Taking waits until as many are free. The kernel needs __launch_bounds__(threads, 1), and begins with 65536
// / threads, rounded down to a multiple of 8.
template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- clusters: blocks that run together and reach each other's shared memory (VTOK_LAUNCH_CLUSTER) --------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster meet, whole warps at once: what each did before it arrives is known to all that
// have waited. Before the first access to another block (it may not have begun), and before the end (its
// memory ends with it).
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, for the functions named *_cluster, of the same place in the shared memory of the block of that
// rank.
__device__ __forceinline__ uint32_t mapa(uint32_t smem, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(smem), "r"(rank));
  return mapped;
}

template <class T>
__device__ __forceinline__ T ld_shared_cluster(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  T value;
  uint32_t r[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
  memcpy(&value, r, sizeof(T));
  return value;
}

template <class T>
__device__ __forceinline__ void st_shared_cluster(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  uint32_t r[sizeof(T) / 4];
  memcpy(r, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(r[0]) : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
}

// ---- stmatrix: the reverse of ldmatrix --------------------------------------------------------------------

__device__ __forceinline__ void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x2(uint32_t smem, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(smem), "r"(r[0]), "r"(r[1])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- TMA: boxes of a tensor, called by one thread; coordinates innermost first ----------------------------

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// tma_load fills a box in shared memory, zeros where it is out of bounds, and gives its bytes to the barrier;
// tma_load_multicast does so at the same places of all blocks of the cluster in the mask. tma_store writes a
// box, except what is out of bounds, as part of this thread's group; threads that have written to it in
// shared memory need fence_proxy_async first.
#define VTOK_TMA(rank, load_at, multicast_at, store_at, ...)                                              \
  __device__ __forceinline__ void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar,             \
                                           const int (&at)[rank]) {                                       \
    asm volatile("cp.async.bulk.tensor." #rank                                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "                            \
                 "[%0], [%1, {" load_at "}], [%2];" ::"r"(smem),                                          \
                 "l"(map), "r"(bar), __VA_ARGS__                                                          \
                 : "memory");                                                                             \
  }                                                                                                       \
  __device__ __forceinline__ void tma_load_multicast(uint32_t smem, const TensorMap* map, uint32_t bar,   \
                                                     const int (&at)[rank], uint16_t blocks) {            \
    asm volatile("cp.async.bulk.tensor." #rank                                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "         \
                 "[%0], [%1, {" multicast_at "}], [%2], %3;" ::"r"(smem),                                 \
                 "l"(map), "r"(bar), "h"(blocks), __VA_ARGS__                                             \
                 : "memory");                                                                             \
  }                                                                                                       \
  __device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[rank]) { \
    asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.tile.bulk_group [%0, {" store_at     \
                 "}], [%1];" ::"l"(map),                                                                  \
                 "r"(smem), __VA_ARGS__                                                                   \
                 : "memory");                                                                             \
  }
VTOK_TMA(2, "%3, %4", "%4, %5", "%2, %3", "r"(at[0]), "r"(at[1]))
VTOK_TMA(3, "%3, %4, %5", "%4, %5, %6", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]))
VTOK_TMA(4, "%3, %4, %5, %6", "%4, %5, %6, %7", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]),
         "r"(at[3]))
VTOK_TMA(5, "%3, %4, %5, %6, %7", "%4, %5, %6, %7, %8", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]),
         "r"(at[2]), "r"(at[3]), "r"(at[4]))
#undef VTOK_TMA

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but N of this thread's youngest groups have read shared memory, which may then be
// overwritten or given up.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// The same until they have written too, which this thread then sees. The end of a kernel waits by itself.
template <int N>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// ---- wgmma: products of a warpgroup (128 threads, of which all call) --------------------------------------

// Before the first product, and after any other access to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most N groups are under way; registers of those before may be used, and the shared memory they
// read overwritten.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define VTOK_R16(a, b, c, e, f, g, h, i, j, k, l, m, n, o, p, q)                                         \
  "%" #a ",%" #b ",%" #c ",%" #e ",%" #f ",%" #g ",%" #h ",%" #i ",%" #j ",%" #k ",%" #l ",%" #m ",%" #n \
  ",%" #o ",%" #p ",%" #q
#define VTOK_R0 VTOK_R16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define VTOK_R1 VTOK_R0 "," VTOK_R16(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)
#define VTOK_R2 VTOK_R1 "," VTOK_R16(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47)
#define VTOK_R3 VTOK_R2 "," VTOK_R16(48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63)
#define VTOK_R4 VTOK_R3 "," VTOK_R16(64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79)
#define VTOK_R5 VTOK_R4 "," VTOK_R16(80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95)
#define VTOK_R7                                                                                          \
  VTOK_R5                                                                                                \
  "," VTOK_R16(96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111) "," VTOK_R16( \
      112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127)
#define VTOK_R8(a, b, c, e, f, g, h, i) "%" #a ",%" #b ",%" #c ",%" #e ",%" #f ",%" #g ",%" #h ",%" #i
#define VTOK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VTOK_D16(i) VTOK_D4(i), VTOK_D4(i + 4), VTOK_D4(i + 8), VTOK_D4(i + 12)
#define VTOK_D64(i) VTOK_D16(i), VTOK_D16(i + 16), VTOK_D16(i + 32), VTOK_D16(i + 48)
// One instruction: the texts of its operands, the left one's constraints, and in `...` those of the sums.
#define VTOK_WGMMA(n, types, registers, a_text, b_text, flag_text, tail, a_operand, ...)            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag_text                                        \
               ", 0;\n"                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" #n types " {" registers "}, " a_text ", " b_text \
               ", p, 1, 1" tail ";\n}"                                                              \
               : __VA_ARGS__                                                                        \
               : "r"(int(accumulate)), "l"(b), VTOK_UNPACK a_operand)
#define VTOK_UNPACK(...) __VA_ARGS__
#define VTOK_A_DESCRIPTOR ("l"(a), "n"(int(TransposeA)), "n"(int(TransposeB)))
#define VTOK_A_REGISTERS ("n"(int(TransposeB)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
#define VTOK_WGMMA_TYPES(n, ...)                     \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)    \
    VTOK_WGMMA(n, "k16.f32.bf16.bf16", __VA_ARGS__); \
  else                                               \
    VTOK_WGMMA(n, "k16.f32.f16.f16", __VA_ARGS__)
// i0 to i4 (i6): N / 2 and the numbers after it.
#define VTOK_WGMMA_SS(n, registers, i0, i1, i2, i3, i4, ...)                                        \
  VTOK_WGMMA_TYPES(n, registers, "%" #i2, "%" #i1, "%" #i0, ", %" #i3 ", %" #i4, VTOK_A_DESCRIPTOR, \
                   __VA_ARGS__)
#define VTOK_WGMMA_RS(n, registers, i0, i1, i2, i3, i4, i5, i6, ...)                                   \
  VTOK_WGMMA_TYPES(n, registers, "{%" #i3 ",%" #i4 ",%" #i5 ",%" #i6 "}", "%" #i1, "%" #i0, ", %" #i2, \
                   VTOK_A_REGISTERS, __VA_ARGS__)

// d (64 x N) = a (64 x 16) b (16 x N), plus d where it accumulates; a and b by descriptors: k innermost, or
// rows (columns of b) innermost where transposed. Thread t has in d[i] the element (16 (t / 32) + t % 32 / 4
// + 8 (i / 2 % 2), 8 (i / 4) + 2 (t % 4) + i % 2).
template <class T, int N, bool TransposeA = false, bool TransposeB = false>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b,
                                             bool accumulate = true) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N == 8 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256,
                "add it where it is needed");
  if constexpr (N == 8) {
    VTOK_WGMMA_SS(8, "%0,%1,%2,%3", 4, 5, 6, 7, 8, VTOK_D4(0));
  } else if constexpr (N == 64) {
    VTOK_WGMMA_SS(64, VTOK_R1, 32, 33, 34, 35, 36, VTOK_D16(0), VTOK_D16(16));
  } else if constexpr (N == 96) {
    VTOK_WGMMA_SS(96, VTOK_R2, 48, 49, 50, 51, 52, VTOK_D16(0), VTOK_D16(16), VTOK_D16(32));
  } else if constexpr (N == 128) {
    VTOK_WGMMA_SS(128, VTOK_R3, 64, 65, 66, 67, 68, VTOK_D64(0));
  } else if constexpr (N == 192) {
    VTOK_WGMMA_SS(192, VTOK_R5, 96, 97, 98, 99, 100, VTOK_D64(0), VTOK_D16(64), VTOK_D16(80));
  } else {
    VTOK_WGMMA_SS(256, VTOK_R7, 128, 129, 130, 131, 132, VTOK_D64(0), VTOK_D64(64));
  }
}

// The same with a in registers, laid out as those of mma_m16n8k16 (ldmatrix_x4) for each warp's 16 rows: they
// must not be touched until the product has been waited for, and a fence stands between writing them and the
// product.
template <class T, int N, bool TransposeB = false>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                             bool accumulate = true) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N == 64 || N == 96 || N == 112 || N == 128 || N == 144 || N == 160 || N == 192 || N == 256,
                "add it where it is needed");
  if constexpr (N == 64) {
    VTOK_WGMMA_RS(64, VTOK_R1, 32, 33, 34, 35, 36, 37, 38, VTOK_D16(0), VTOK_D16(16));
  } else if constexpr (N == 96) {
    VTOK_WGMMA_RS(96, VTOK_R2, 48, 49, 50, 51, 52, 53, 54, VTOK_D16(0), VTOK_D16(16), VTOK_D16(32));
  } else if constexpr (N == 112) {
    VTOK_WGMMA_RS(112, VTOK_R2 "," VTOK_R8(48, 49, 50, 51, 52, 53, 54, 55), 56, 57, 58, 59, 60, 61, 62,
                  VTOK_D16(0), VTOK_D16(16), VTOK_D16(32), VTOK_D4(48), VTOK_D4(52));
  } else if constexpr (N == 128) {
    VTOK_WGMMA_RS(128, VTOK_R3, 64, 65, 66, 67, 68, 69, 70, VTOK_D64(0));
  } else if constexpr (N == 144) {
    VTOK_WGMMA_RS(144, VTOK_R3 "," VTOK_R8(64, 65, 66, 67, 68, 69, 70, 71), 72, 73, 74, 75, 76, 77, 78,
                  VTOK_D64(0), VTOK_D4(64), VTOK_D4(68));
  } else if constexpr (N == 160) {
    VTOK_WGMMA_RS(160, VTOK_R4, 80, 81, 82, 83, 84, 85, 86, VTOK_D64(0), VTOK_D16(64));
  } else if constexpr (N == 192) {
    VTOK_WGMMA_RS(192, VTOK_R5, 96, 97, 98, 99, 100, 101, 102, VTOK_D64(0), VTOK_D16(64), VTOK_D16(80));
  } else {
    VTOK_WGMMA_RS(256, VTOK_R7, 128, 129, 130, 131, 132, 133, 134, VTOK_D64(0), VTOK_D64(64));
  }
}

// i0 to i5: N / 2 and the numbers after it.
#define VTOK_WGMMA_E4M3(n, registers, i0, i1, i2, i3, i4, i5, ...)                                         \
  VTOK_WGMMA(n, "k32.f32.e4m3.e4m3", registers, "{%" #i2 ",%" #i3 ",%" #i4 ",%" #i5 "}", "%" #i1, "%" #i0, \
             "", ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])), __VA_ARGS__)

// The same of elements of one byte, 32 of k: byte for byte where those of two bytes are, so that ldmatrix_x4
// brings them too. Only with k innermost. The sums keep fewer bits than float32 has: about 14, as others have
// measured (docs/kernels.md).
template <int N>
__device__ __forceinline__ void wgmma_m64k32_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                                  bool accumulate = true) {
  static_assert(N == 64 || N == 96 || N == 112 || N == 128 || N == 144 || N == 160,
                "add it where it is needed");
  if constexpr (N == 64) {
    VTOK_WGMMA_E4M3(64, VTOK_R1, 32, 33, 34, 35, 36, 37, VTOK_D16(0), VTOK_D16(16));
  } else if constexpr (N == 96) {
    VTOK_WGMMA_E4M3(96, VTOK_R2, 48, 49, 50, 51, 52, 53, VTOK_D16(0), VTOK_D16(16), VTOK_D16(32));
  } else if constexpr (N == 112) {
    VTOK_WGMMA_E4M3(112, VTOK_R2 "," VTOK_R8(48, 49, 50, 51, 52, 53, 54, 55), 56, 57, 58, 59, 60, 61,
                    VTOK_D16(0), VTOK_D16(16), VTOK_D16(32), VTOK_D4(48), VTOK_D4(52));
  } else if constexpr (N == 128) {
    VTOK_WGMMA_E4M3(128, VTOK_R3, 64, 65, 66, 67, 68, 69, VTOK_D64(0));
  } else if constexpr (N == 144) {
    VTOK_WGMMA_E4M3(144, VTOK_R3 "," VTOK_R8(64, 65, 66, 67, 68, 69, 70, 71), 72, 73, 74, 75, 76, 77,
                    VTOK_D64(0), VTOK_D4(64), VTOK_D4(68));
  } else {
    VTOK_WGMMA_E4M3(160, VTOK_R4, 80, 81, 82, 83, 84, 85, VTOK_D64(0), VTOK_D16(64));
  }
}

// Two values, the first in the lower byte: to nearest even, at most 448 in size, also infinity; NaN stays NaN.
__device__ __forceinline__ uint16_t to_e4m3x2(float low, float high) {
  uint16_t bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
}

}  // namespace vtok::ptx
#endif

namespace vtok::ptx {

// A tile of rows of W = 128, 64 or 32 bytes of k, swizzled as TMA writes it, for wgmma: 8 rows are 8 W bytes,
// at a multiple of that. The next 16 of k are 32 bytes on; rows start at multiples of 8.
template <int W>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem) {
  static_assert(W == 128 || W == 64 || W == 32);
  constexpr uint64_t kSwizzle = W == 128 ? 1 : W == 64 ? 2 : 3;
  return uint64_t(smem >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(8 * W >> 4) << 32 | kSwizzle << 62;
}

// A tile for the transposed operands of wgmma: lines of W bytes of M or N, one per k, swizzled as TMA writes
// it. The next W bytes of M or N are `lead` bytes on; 8 lines follow each other, the next 8 of k are `stride`
// bytes on: multiples of 8 W.
template <int W>
__device__ __forceinline__ uint64_t wgmma_descriptor_transposed(uint32_t smem, uint32_t lead,
                                                                uint32_t stride = 8 * W) {
  constexpr uint64_t kSwizzle = W == 128 ? 1 : W == 64 ? 2 : 3;
  return uint64_t(smem >> 4 & 0x3fff) | uint64_t(lead >> 4 & 0x3fff) << 16 |
         uint64_t(stride >> 4 & 0x3fff) << 32 | kSwizzle << 62;
}

// Where byte `column` of row `row` of such a tile is, for threads that read or write it themselves.
template <int W>
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, uint32_t row, uint32_t column) {
  const uint32_t address = tile + row * W + column;
  return address ^ (address >> 3 & (W - 16));
}

}  // namespace vtok::ptx
