// The threads of a block as fibers, which run one after the other and change only where they wait for each
// other. Blocks of a cluster run together: a block that is alone is a cluster of one.
//
// A seed decides who runs next: 0 the one that has waited longest, 1 the one that has waited least, 2 and up
// at random; so for the order of clusters. Time is counted by vector clocks: clock[i] of a thread is how much
// of what agent i did is known to have happened before now. Agents are the threads of the cluster, 0 to n-1,
// their asynchronous copies, n to 2n-1, and what sm90.h adds.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace emu {

using Where = std::source_location;  // of an instruction in the kernel's source

// A copy from global to shared memory that is under way; no source: zeros.
struct Copy {
  uint32_t group, to, bytes;  // `to`: a place, see memory.h
  const void* from;
};

struct Thread {
  uint3 index;
  int id, warp, lane;  // id and warp: counted through the cluster
  int rank;            // of its block in the cluster
  enum class State { ready, waiting, ended } state;
  const char* waits_for;
  Where where;
  std::vector<uint32_t> clock;
  std::vector<Copy> copies;
  uint32_t groups;  // of copies, closed so far
  void* stack_pointer;
};

// Threads that have arrived where several must meet, and what each brought.
struct Meeting {
  std::vector<Thread*> present;
  std::vector<void*> offers;
};

struct Warp {
  std::vector<std::pair<unsigned, Meeting>> meetings;  // by mask
};

struct Block {
  uint3 index;
  size_t running;  // threads that have not ended
  Meeting barriers[16];
};

struct Cluster {
  uint32_t number;
  dim3 block_size, size;  // threads of a block, blocks of the cluster
  std::vector<Block> blocks;
  std::vector<Thread> threads;  // of all blocks
  std::vector<Warp> warps;
  size_t block_threads() const { return threads.size() / blocks.size(); }
};

struct Config {  // what a test may choose
  int seed = 0;
  int shared_limit = 227 << 10;  // bytes of shared memory that a block may have
  int multiprocessors = 4, capability = 80;
};

inline Config config;
inline dim3 grid;
inline Cluster cluster;
inline Thread* self = nullptr;
inline std::mt19937 random_bits;
inline const char* launched = "";  // the last launch, as its source has it
// cycles that ldmatrix would have lost to them, and matrices that it read, in that launch
inline uint64_t bank_conflicts = 0, matrices_read = 0;

// What goes on beside the threads, such as copies by TMA: done at random, or when no thread can go on.
inline std::vector<std::function<void()>> in_flight;

inline bool chance() { return config.seed >= 2 ? random_bits() & 1 : config.seed == 0; }

// Ends the launch with an error that names the thread and the place.
[[noreturn]] void fail(const std::string& message, const Where& where);
// the same of an operation that no thread is about: returns
void report(const std::string& message, const Where& where);
std::string place(const Where& where);

// Runs a kernel: "" or the error. cluster: in blocks.
std::string run(dim3 grid, dim3 cluster, dim3 block, size_t shared_bytes,
                const std::function<void()>& kernel);

// The running thread waits until another wakes it.
void park(const char* what, const Where& where);
void wake(Thread* thread);

// ---- meetings ---------------------------------------------------------------------------------------------

// True for the last of `expected` threads: it does what is to be done and dismisses the others, which return
// false after that.
bool arrive(Meeting& meeting, size_t expected, const char* what, const Where& where, void* offer = nullptr);
void dismiss(Meeting& meeting);
void order_memory(const Meeting& meeting);  // all that those present did is known to all of them from now on
Meeting& warp_meeting(unsigned mask, const char* what, const Where& where);
void barrier(int id, size_t threads, const char* what, const Where& where);

// The lanes of `mask` meet, and one of them calls execute(offers by lane).
template <class Offer, class Execute>
void collective(const char* what, unsigned mask, Offer offer, const Where& where, Execute execute,
                bool orders_memory = false) {
  Meeting& meeting = warp_meeting(mask, what, where);
  if (!arrive(meeting, __popc(mask), what, where, &offer)) return;
  Offer* lanes[32] = {};
  for (size_t i = 0; i < meeting.present.size(); ++i)
    lanes[meeting.present[i]->lane] = static_cast<Offer*>(meeting.offers[i]);
  execute(lanes);
  if (orders_memory) order_memory(meeting);
  dismiss(meeting);
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, const Where& where) {
  struct Offer {
    T value, *result;
    int source;
  };
  T result;
  collective(what, mask, Offer{value, &result, source}, where, [&](Offer** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->source]) fail(std::string(what) + ": reads a lane that is not in the mask", where);
      *lanes[i]->result = lanes[lanes[i]->source]->value;
    }
  });
  return result;
}

}  // namespace emu

#define threadIdx (::emu::self->index)
#define blockIdx (::emu::cluster.blocks[::emu::self->rank].index)
#define blockDim (::emu::cluster.block_size)
#define gridDim (::emu::grid)

constexpr int warpSize = 32;

inline void __syncthreads(emu::Where where = emu::Where::current()) {
  emu::barrier(0, emu::cluster.block_threads(), "__syncthreads", where);
}

inline void __syncwarp(unsigned mask = ~0u, emu::Where where = emu::Where::current()) {
  emu::collective("__syncwarp", mask, 0, where, [](int**) {}, true);
}

inline void __threadfence() {}

// A lane outside of its segment of `width` lanes gets its own value, as on a GPU.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int xor_with, int width = 32,
                  emu::Where where = emu::Where::current()) {
  const int lane = emu::self->lane, source = lane ^ xor_with;
  return emu::shuffle("__shfl_xor_sync", mask, value, source / width > lane / width ? lane : source, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Where where = emu::Where::current()) {
  return emu::shuffle("__shfl_sync", mask, value, emu::self->lane / width * width + (source & (width - 1)),
                      where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, emu::Where where = emu::Where::current()) {
  const int lane = emu::self->lane;
  return emu::shuffle("__shfl_down_sync", mask, value, lane % width + by < width ? lane + by : lane, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, emu::Where where = emu::Where::current()) {
  const int lane = emu::self->lane;
  return emu::shuffle("__shfl_up_sync", mask, value, lane % width >= by ? lane - by : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  struct Offer {
    int predicate;
    unsigned* result;
  };
  unsigned result = 0;
  emu::collective("__ballot_sync", mask, Offer{predicate, &result}, where, [](Offer** lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= unsigned(lanes[i] && lanes[i]->predicate) << i;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) *lanes[i]->result = all;
  });
  return result;
}

inline int __any_sync(unsigned mask, int predicate, emu::Where where = emu::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
