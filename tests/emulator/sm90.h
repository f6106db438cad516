// The functions of csrc/cuda/ptx_sm90.cuh: mbarrier and clusters (mbarrier.cpp), TMA tiles (tma.cpp), wgmma
// (wgmma.cpp).
//
// Agents of the vector clocks, after the 2 n of machine.h: n, what the TMA stores of each thread read from
// shared memory; n, what they write to global memory; one per warpgroup, what its wgmma read; 64 per block,
// what TMA wrote for each mbarrier. Behind them a second clock of 2 n: how much of what the threads and their
// copies wrote is known to be visible to TMA and wgmma, which fence_proxy_async advances.
//
// Not found: that a thread gives up by a relaxed arrival what it has written, not only read.
#pragma once
#include <map>

#include "memory.h"

namespace emu {

// ---- what the parts share ---------------------------------------------------------------------------------

using Clock = std::vector<uint32_t>;

struct Mbarrier {
  uint32_t count, pending;
  int64_t bytes = 0;      // expected and not yet come
  uint32_t phase = 0;     // phases that have ended
  Clock arriving, ended;  // clocks: of those that have arrived, and what the end of the last phase tells
  Clock arriving_near, ended_near;  // the same without threads of other blocks
  std::vector<Thread*> waiting;
  int agent;
  Event init;
  bool fenced = false;
  int loads = 0;  // under way
};

// Of one thread of a warpgroup: registers that a product is still being added to, or was; and those that hold
// its left operand.
struct Accumulator {
  float* d;
  // the sum; and, where it has landed, the registers at the last wait or fence
  std::vector<float> value, seen;
  uint32_t group;
  bool landed;
};
struct Fragment {
  const uint32_t* a;
  uint32_t seen[4];  // when the product began, or at the last wait or fence
  uint32_t group;
  bool landed;
};

struct Store {
  uint32_t group;
  std::function<void()> finish;
};

struct State {  // of one thread
  std::vector<Store> stores;
  uint32_t store_groups = 0;
  std::vector<Accumulator> accumulators;
  std::vector<Fragment> fragments;
  uint32_t cluster_arrivals = 0, cluster_waits = 0;
  bool fenced = false, tried = false;
};

struct Warpgroup {
  Meeting meeting;
  uint32_t groups = 0;
  int registers = 0;  // of each thread
};

inline std::vector<State> states;
inline std::vector<Warpgroup> warpgroups;
inline State& state() { return states[self->id]; }

inline int threads() { return int(cluster.threads.size()); }
inline int store_agent(const Thread& t) { return 2 * threads() + t.id; }
inline int written_agent(const Thread& t) { return 3 * threads() + t.id; }
inline int wgmma_agent(int group) { return 4 * threads() + group; }
size_t agents();
inline void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void need_sm90(const char* what, const Where& where);
Mbarrier& barrier_at(uint32_t place, const char* what, const Where& where);
void end_phase_if_complete(Mbarrier& bar, const Where& where);

// The 128 threads meet; the last calls execute(offers by thread of the warpgroup).
template <class Offer, class Execute>
void warpgroup(const char* what, Offer offer, const Where& where, Execute execute) {
  need_sm90(what, where);
  if (cluster.block_threads() % 128)
    fail(std::string(what) + ": the block has a warpgroup of fewer than 128 threads", where);
  Warpgroup& group = warpgroups[self->id / 128];
  if (!arrive(group.meeting, 128, what, where, &offer)) return;
  Offer* offers[128];
  for (int i = 0; i < 128; ++i)
    offers[group.meeting.present[i]->id % 128] = static_cast<Offer*>(group.meeting.offers[i]);
  execute(group, offers);
  dismiss(group.meeting);
}

// ---- for machine.cpp and memory.cpp -----------------------------------------------------------------------

size_t sm90_clocks();
void sm90_start_cluster();
void sm90_end_thread();
bool sm90_visible(const Event& write, const Thread& by);
// an access to a block's shared memory that the block must not end before
void sm90_reach(int rank, const Event& event);

// ---- TMA and wgmma ----------------------------------------------------------------------------------------

struct TensorMap {
  uint64_t magic;
  const char* base;
  int element, rank, swizzle;
  uint64_t size[5], stride[5];
  uint32_t box[5], step[5];
};

// What is wrong with a tensor map, or "".
std::string encode(TensorMap& map, const void* base, int element, int rank, const uint64_t* size,
                   const uint64_t* stride, const uint32_t* box, const uint32_t* step, int swizzle);
void prefetch(const TensorMap* map, const Where& where);
void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int* at, int rank, unsigned blocks,
              const Where& where);
void tma_store(const TensorMap* map, uint32_t smem, const int* at, int rank, const Where& where);
void tma_store_wait(uint32_t left, bool written);

// The value of an element, from its bits; and its bytes.
struct Element {
  float (*value)(uint16_t);
  int bytes;
};

struct Operand {  // by a descriptor; or, the left one, in registers
  uint64_t descriptor;
  bool transposed;
  const uint32_t* registers = nullptr;
};

void wgmma_fence(const Where& where);
void wgmma_commit(const Where& where);
void wgmma_wait(uint32_t left, const Where& where);
void wgmma(float* d, int n, Operand a, Operand b, bool accumulate, Element element, const Where& where);
void set_registers(int count, bool more, const Where& where);

}  // namespace emu

namespace vtok::ptx {

using emu::TensorMap;
using emu::Where;

void mbarrier_init(uint32_t bar, uint32_t count, Where where = Where::current());
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t bar, Where where = Where::current());
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes, Where where = Where::current());
void mbarrier_arrive_cluster(uint32_t bar, Where where = Where::current());
inline void mbarrier_arrive_cluster_relaxed(uint32_t bar, Where where = Where::current()) {
  mbarrier_arrive_cluster(bar, where);
}
bool mbarrier_try_wait(uint32_t bar, uint32_t parity, Where where = Where::current());
void mbarrier_wait(uint32_t bar, uint32_t parity, Where where = Where::current());
void mbarrier_wait_cluster(uint32_t bar, uint32_t parity, Where where = Where::current());
void fence_proxy_async();

inline uint32_t cluster_rank() { return uint32_t(emu::self->rank); }
inline uint32_t mapa(uint32_t smem, uint32_t rank) { return emu::map_shared(smem, int(rank)); }
void cluster_arrive(Where where = Where::current());
void cluster_wait(Where where = Where::current());
template <class T>
T ld_shared_cluster(uint32_t address, Where where = Where::current()) {
  T value;
  emu::read_shared(&value, address, sizeof(T), sizeof(T), "ld_shared_cluster", where, *emu::self, true);
  return value;
}
template <class T>
void st_shared_cluster(uint32_t address, T value, Where where = Where::current()) {
  emu::write_shared(address, &value, sizeof(T), sizeof(T), "st_shared_cluster", where, *emu::self, true);
}

bool elect_sync(Where where = Where::current());
template <int Id>
void bar_sync(int threads, Where where = Where::current()) {
  static_assert(Id > 0 && Id < 16);
  emu::barrier(Id, threads, "bar_sync", where);
}
template <int Registers>
void setmaxnreg_inc(Where where = Where::current()) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  emu::set_registers(Registers, true, where);
}
template <int Registers>
void setmaxnreg_dec(Where where = Where::current()) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  emu::set_registers(Registers, false, where);
}

// Each lane stores its part: lane l of register i elements 2 (l % 4) and the next of row l / 4 of matrix i.
template <int N>
void stmatrix(const char* what, uint32_t smem, const uint32_t (&r)[N], bool transposed, const Where& where) {
  struct Offer {
    uint32_t address;
    const uint32_t* r;
  };
  emu::need_sm90(what, where);
  emu::collective(what, ~0u, Offer{smem, r}, where, [&](Offer** lanes) {
    for (int i = 0; i < N; ++i)
      for (int lane = 0; lane < 32; ++lane) {
        emu::Thread& by = emu::cluster.threads[32 * emu::self->warp + lane];
        emu::check_shared(lanes[8 * i + lane / 4]->address, 16, 16, what, where);
        for (int e = 0; e < 2; ++e) {
          const int row = transposed ? 2 * (lane % 4) + e : lane / 4,
                    column = transposed ? lane / 4 : 2 * (lane % 4) + e;
          const auto* halves = reinterpret_cast<const uint16_t*>(&lanes[lane]->r[i]);
          emu::write_shared(lanes[8 * i + row]->address + 2 * column, halves + e, 2, 2, what, where, by);
        }
      }
  });
}
inline void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4], Where where = Where::current()) {
  stmatrix("stmatrix_x4", smem, r, false, where);
}
inline void stmatrix_x2(uint32_t smem, const uint32_t (&r)[2], Where where = Where::current()) {
  stmatrix("stmatrix_x2", smem, r, false, where);
}
inline void stmatrix_x4_trans(uint32_t smem, const uint32_t (&r)[4], Where where = Where::current()) {
  stmatrix("stmatrix_x4_trans", smem, r, true, where);
}

inline void prefetch_tensor_map(const TensorMap* map, Where where = Where::current()) {
  emu::prefetch(map, where);
}
template <int Rank>
void tma_load(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[Rank],
              Where where = Where::current()) {
  emu::tma_load(smem, map, bar, at, Rank, 1u << emu::self->rank, where);
}
template <int Rank>
void tma_load_multicast(uint32_t smem, const TensorMap* map, uint32_t bar, const int (&at)[Rank],
                        uint16_t blocks, Where where = Where::current()) {
  emu::tma_load(smem, map, bar, at, Rank, blocks, where);
}
template <int Rank>
void tma_store(const TensorMap* map, uint32_t smem, const int (&at)[Rank], Where where = Where::current()) {
  emu::tma_store(map, smem, at, Rank, where);
}
void tma_store_commit();
template <int N>
void tma_store_wait_read() {
  emu::tma_store_wait(N, false);
}
template <int N>
void tma_store_wait() {
  emu::tma_store_wait(N, true);
}

inline void wgmma_fence(Where where = Where::current()) { emu::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::current()) { emu::wgmma_commit(where); }
template <int N>
void wgmma_wait(Where where = Where::current()) {
  emu::wgmma_wait(N, where);
}

template <class T>
float wgmma_element(uint16_t bits) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float({bits});
  else
    return __bfloat162float({bits});
}

template <class T, int N, bool TransposeA = false, bool TransposeB = false>
void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true,
                  Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emu::wgmma(d, N, {a, TransposeA}, {b, TransposeB}, accumulate, {wgmma_element<T>, 2}, where);
}
template <class T, int N, bool TransposeB = false>
void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                  Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emu::wgmma(d, N, {0, false, a}, {b, TransposeB}, accumulate, {wgmma_element<T>, 2}, where);
}

// In float32, where the hardware keeps fewer bits of such sums.
inline float e4m3_value(uint16_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent == 15 && fraction == 7 ? NAN
                     : exponent                      ? std::ldexp(float(8 + fraction), exponent - 10)
                                                     : std::ldexp(float(fraction), -9);
  return bits & 0x80 ? -size : size;
}
template <int N>
void wgmma_m64k32_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true,
                       Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emu::wgmma(d, N, {0, false, a}, {b, false}, accumulate, {e4m3_value, 1}, where);
}

inline uint8_t to_e4m3(float v) {
  const uint8_t sign = std::bit_cast<uint32_t>(v) >> 24 & 0x80;
  if (v != v) return sign | 0x7f;
  const float size = std::min(std::fabs(v), 448.0f);
  // Steps of 2^-9 below the normal numbers, and eight in each power of two above.
  int exponent = 0;
  std::frexp(std::max(size, 0x1p-6f), &exponent);
  const int steps = int(std::nearbyint(std::ldexp(size, 4 - exponent)));  // 16 is the next power of two
  return uint8_t(sign | ((exponent + 5) * 8 + steps));
}
inline uint16_t to_e4m3x2(float low, float high) { return uint16_t(to_e4m3(low) | to_e4m3(high) << 8); }

}  // namespace vtok::ptx
