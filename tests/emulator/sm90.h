// The functions of csrc/cuda/ptx_sm90.cuh: mbarrier, TMA tiles and wgmma.
//
// Agents of the vector clocks, after the 2 n of machine.h: n, the stores by TMA of each thread; one per warpgroup, what its wgmma
// read; 64, what TMA wrote for each mbarrier. Behind them a second clock of 2 n: how much of what the threads and their copies
// wrote is known to be visible to TMA and wgmma, which fence_proxy_async advances.
#pragma once
#include "memory.h"

namespace emu {

struct TensorMap {
  uint64_t magic;
  const char* base;
  int element, rank, swizzle;
  uint64_t size[5], stride[5];
  uint32_t box[5], step[5];
};

size_t sm90_clocks();
void sm90_start_block();
void sm90_end_thread();
bool sm90_visible(const Event& write, const Thread& by);

// What is wrong with a tensor map, or "".
std::string encode(TensorMap& map, const void* base, int element, int rank, const uint64_t* size, const uint64_t* stride,
                   const uint32_t* box, const uint32_t* step, int swizzle);
void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int* at, int rank, const Where& where);
void tma_store(const TensorMap* map, uint32_t smem, const int* at, int rank, const Where& where);
void tma_store_wait(uint32_t left);

// Of one thread of a warpgroup: registers that a product is still being added to, or was.
struct Accumulator {
  float* d;
  std::vector<float> value, seen;  // the sum; and, where it has landed, the registers at the last wait or fence
  uint32_t group;
  bool landed;
};

void wgmma_fence(const Where& where);
void wgmma_commit(const Where& where);
void wgmma_wait(uint32_t left, const Where& where);
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, float (*element)(uint16_t), const Where& where);

}  // namespace emu

namespace vtok::ptx {

using emu::TensorMap;
using emu::Where;

void mbarrier_init(uint32_t bar, uint32_t count, Where where = Where::current());
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t bar, Where where = Where::current());
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes, Where where = Where::current());
void mbarrier_wait(uint32_t bar, uint32_t parity, Where where = Where::current());
void fence_proxy_async();

template <int Id>
void bar_sync(int threads, Where where = Where::current()) {
  static_assert(Id > 0 && Id < 16);
  emu::barrier(Id, threads, "bar_sync", where);
}
template <int Registers>
void setmaxnreg_inc() {}
template <int Registers>
void setmaxnreg_dec() {}

inline void prefetch_tensor_map(const TensorMap*) {}
template <int Rank>
void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[Rank], Where where = Where::current()) {
  emu::tma_load(smem, map, bar, at, Rank, where);
}
template <int Rank>
void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[Rank], Where where = Where::current()) {
  emu::tma_store(map, smem, at, Rank, where);
}
void tma_store_commit();
template <int N>
void tma_store_wait_read() { emu::tma_store_wait(N); }

inline void wgmma_fence(Where where = Where::current()) { emu::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::current()) { emu::wgmma_commit(where); }
template <int N>
void wgmma_wait(Where where = Where::current()) { emu::wgmma_wait(N, where); }

template <class T, int N>
void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true, Where where = Where::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emu::wgmma(d, N, a, b, accumulate, [](uint16_t bits) {
    if constexpr (std::is_same_v<T, __half>) return __half2float({bits});
    else return __bfloat162float({bits});
  }, where);
}

}  // namespace vtok::ptx
