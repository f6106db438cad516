#include "machine.h"

#include <sys/mman.h>

#include <map>
#include <numeric>

#include "memory.h"
#include "sm90.h"

#ifdef __SANITIZE_ADDRESS__  // it must know which stack is in use
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a function must preserve and the stack pointer, and goes on where `to` was saved.
extern "C" void emu_switch(void** from, void* to);
#if !defined(__x86_64__)
#error "the emulator's context switch is written for x86-64"
#endif
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emu {
namespace {

// bytes of a fiber's stack, and of what must not be touched below it
constexpr size_t kStack = 128 << 10, kGuard = 4096;

void* scheduler_stack_pointer;
const std::function<void()>* kernel;
std::string error;
std::deque<Thread*> ready;

// From the scheduler to a thread, and back; `for_good`: the thread will not be run again.
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

void switch_to(Thread& t, char* stack) {
#ifdef __SANITIZE_ADDRESS__
  void* kept;
  __sanitizer_start_switch_fiber(&kept, stack - kStack, kStack);
  emu_switch(&scheduler_stack_pointer, t.stack_pointer);
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#else
  (void)stack;
  emu_switch(&scheduler_stack_pointer, t.stack_pointer);
#endif
}

void switch_to_scheduler(bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  void* kept;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &kept, scheduler_stack, scheduler_stack_bytes);
  emu_switch(&self->stack_pointer, scheduler_stack_pointer);
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#else
  (void)for_good;
  emu_switch(&self->stack_pointer, scheduler_stack_pointer);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*kernel)();
  finish_copies(*self, self->groups + 1);
  self->state = Thread::State::ended;
  --cluster.blocks[self->rank].running;
  sm90_end_thread();
  switch_to_scheduler(true);
  __builtin_unreachable();
}

char* stack_top(int id) {
  static std::vector<char*> tops;  // kept for the next block
  while (int(tops.size()) <= id) {
    void* low = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (low == MAP_FAILED || mprotect(low, kGuard, PROT_NONE)) std::abort();
    tops.push_back(static_cast<char*>(low) + kStack + kGuard);
  }
  return tops[id];
}

void start(Thread& t, int id) {
  const dim3 size = cluster.block_size;
  const unsigned in_block = unsigned(id % cluster.block_threads());
  t = {};
  t.id = id;
  t.warp = id / 32;
  t.lane = id % 32;
  t.rank = int(id / cluster.block_threads());
  t.index = {in_block % size.x, in_block / size.x % size.y, in_block / (size.x * size.y)};
  t.clock.assign(2 * cluster.threads.size() + sm90_clocks(), 0);
  t.clock[id] = 1;
  auto** top = reinterpret_cast<void**>(stack_top(id));
#ifdef __SANITIZE_ADDRESS__
  // what an error has left there
  __asan_unpoison_memory_region(reinterpret_cast<char*>(top) - kStack, kStack);
#endif
  *--top = nullptr;  // so that the stack is aligned in fiber_main as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  t.stack_pointer = top - 6;
  ready.push_back(&t);
}

Thread* next() {
  if (config.seed == 0 || config.seed == 1) {
    Thread* t = config.seed == 0 ? ready.front() : ready.back();
    config.seed == 0 ? ready.pop_front() : ready.pop_back();
    return t;
  }
  std::swap(ready[random_bits() % ready.size()], ready.back());
  Thread* t = ready.back();
  ready.pop_back();
  return t;
}

std::string name_of_cluster() {
  const std::string number = std::to_string(cluster.number);
  return cluster.blocks.size() == 1 ? "block " + number : "cluster " + number;
}

// Who waits for what, when nobody can go on.
std::string deadlock() {
  std::map<std::string, int> waiting;
  int ended = 0;
  for (const Thread& t : cluster.threads) {
    if (t.state == Thread::State::ended)
      ++ended;
    else
      ++waiting[std::string(t.waits_for) + " (" + place(t.where) + ")"];
  }
  std::string text = "deadlock: " + std::to_string(ended) + " threads have ended";
  for (const auto& [what, count] : waiting) text += ", " + std::to_string(count) + " wait at " + what;
  return text + "; " + name_of_cluster();
}

void run_cluster(uint32_t number, dim3 size, dim3 block_size, size_t shared_bytes) {
  const size_t threads = size_t(block_size.x) * block_size.y * block_size.z,
               blocks = size_t(size.x) * size.y * size.z;
  const unsigned wide = grid.x / size.x, high = grid.y / size.y;  // the grid in clusters
  const unsigned x = number % wide * size.x, y = number / wide % high * size.y,
                 z = number / wide / high * size.z;
  cluster.number = number;
  cluster.block_size = block_size;
  cluster.size = size;
  cluster.blocks.assign(blocks, {});
  for (unsigned i = 0; i < blocks; ++i) {
    cluster.blocks[i].index = {x + i % size.x, y + i / size.x % size.y, z + i / size.x / size.y};
    cluster.blocks[i].running = threads;
  }
  cluster.threads.resize(blocks * threads);
  cluster.warps.assign((blocks * threads + 31) / 32, {});
  ready.clear();
  reset_shared(shared_bytes);
  sm90_start_cluster();
  in_flight.clear();
  for (size_t i = 0; i < cluster.threads.size(); ++i) start(cluster.threads[i], int(i));
  while (error.empty() && !(ready.empty() && in_flight.empty())) {
    if (ready.empty() && std::all_of(cluster.blocks.begin(), cluster.blocks.end(),
                                     [](const Block& b) { return b.running == 0; })) {
      error = "the kernel ends while TMA still writes to shared memory; " + name_of_cluster();
      break;
    }
    if (!in_flight.empty() && (ready.empty() || (config.seed >= 2 && random_bits() % 4 == 0))) {
      auto some = in_flight.begin() + (config.seed >= 2 ? random_bits() % in_flight.size() : 0);
      const auto operation = std::move(*some);
      in_flight.erase(some);
      operation();
      continue;
    }
    self = next();
    switch_to(*self, stack_top(self->id));
  }
  for (const Thread& t : cluster.threads)
    if (error.empty() && t.state != Thread::State::ended) error = deadlock();
  self = nullptr;
}

std::string impossible(dim3 g, dim3 c, dim3 b, size_t shared_bytes) {
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 ||
      uint64_t(g.x) * g.y * g.z > 1 << 30)
    return "grid of " + std::to_string(g.x) + " x " + std::to_string(g.y) + " x " + std::to_string(g.z) +
           " blocks";
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t(b.x) * b.y * b.z > 1024)
    return "block of " + std::to_string(b.x) + " x " + std::to_string(b.y) + " x " + std::to_string(b.z) +
           " threads";
  if (const unsigned blocks = c.x * c.y * c.z; blocks != 1) {
    const std::string size = "cluster of " + std::to_string(c.x) + " x " + std::to_string(c.y) + " x " +
                             std::to_string(c.z) + " blocks";
    if (config.capability < 90) return size + ", which only sm_90 and newer have";
    if (blocks == 0 || blocks > 8 || g.x % c.x || g.y % c.y || g.z % c.z)
      return size + ": at most 8, and whole clusters in the grid";
    if (b.x * b.y * b.z % 32) return size + ": the emulator knows clusters of blocks of whole warps";
  }
  if (shared_bytes > size_t(config.shared_limit))
    return std::to_string(shared_bytes) + " bytes of shared memory, at most " +
           std::to_string(config.shared_limit);
  return "";
}

}  // namespace

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fail(const std::string& message, const Where& where) {
  const uint3 t = self->index, b = cluster.blocks[self->rank].index;
  auto triple = [](uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  if (error.empty())
    error = message + "; thread " + triple(t) + " of block " + triple(b) + " at " + place(where);
  switch_to_scheduler(true);  // the fibers are left as they are: kernels own nothing
  __builtin_unreachable();
}

void report(const std::string& message, const Where& where) {
  if (error.empty()) error = message + "; " + name_of_cluster() + ", of what began at " + place(where);
}

std::string run(dim3 g, dim3 c, dim3 b, size_t shared_bytes, const std::function<void()>& body) {
  if (std::string why = impossible(g, c, b, shared_bytes); !why.empty()) return "launch: " + why;
  grid = g;
  kernel = &body;
  error.clear();
  bank_conflicts = matrices_read = 0;
  random_bits.seed(unsigned(config.seed));
  forget_global_accesses();
  std::vector<uint32_t> order(uint64_t(g.x) * g.y * g.z / (uint64_t(c.x) * c.y * c.z));
  std::iota(order.begin(), order.end(), 0);
  if (config.seed == 1) std::reverse(order.begin(), order.end());
  if (config.seed >= 2) std::shuffle(order.begin(), order.end(), random_bits);
  for (uint32_t number : order) {
    run_cluster(number, c, b, shared_bytes);
    if (!error.empty()) break;
  }
  return error;
}

bool arrive(Meeting& meeting, size_t expected, const char* what, const Where& where, void* offer) {
  if (!meeting.present.empty()) {
    const Thread& first = *meeting.present.front();
    if (std::strcmp(first.waits_for, what) || first.where.line() != where.line() ||
        std::strcmp(first.where.file_name(), where.file_name()))
      fail(std::string("divergence: meets others that are at ") + first.waits_for + " (" +
               place(first.where) + ") with " + what,
           where);
  }
  meeting.present.push_back(self);
  meeting.offers.push_back(offer);
  self->waits_for = what;
  self->where = where;
  if (meeting.present.size() == expected) return true;
  park(what, where);
  return false;
}

void park(const char* what, const Where& where) {
  self->waits_for = what;
  self->where = where;
  self->state = Thread::State::waiting;
  switch_to_scheduler(false);
}

void wake(Thread* t) {
  t->state = Thread::State::ready;
  ready.push_back(t);
}

void dismiss(Meeting& meeting) {
  for (Thread* t : meeting.present)
    if (t != self) wake(t);
  meeting.present.clear();
  meeting.offers.clear();
}

void order_memory(const Meeting& meeting) {
  std::vector<uint32_t> latest(self->clock.size());
  for (const Thread* t : meeting.present)
    for (size_t i = 0; i < latest.size(); ++i) latest[i] = std::max(latest[i], t->clock[i]);
  for (Thread* t : meeting.present) {
    t->clock = latest;
    ++t->clock[t->id];
  }
}

Meeting& warp_meeting(unsigned mask, const char* what, const Where& where) {
  if (!(mask >> self->lane & 1)) fail(std::string(what) + ": the mask lacks the lane that calls it", where);
  const unsigned exist = unsigned(std::min<size_t>(cluster.threads.size() - 32 * self->warp, 32));
  if (exist < 32 && mask >> exist) fail(std::string(what) + ": the mask has lanes that do not exist", where);
  auto& meetings = cluster.warps[self->warp].meetings;
  for (auto& [m, meeting] : meetings)
    if (m == mask) return meeting;
  meetings.reserve(33);  // references to it stay valid
  if (meetings.size() == 33)
    fail(std::string(what) + ": more masks in one kernel than the emulator keeps", where);
  return meetings.emplace_back(mask, Meeting{}).second;
}

void barrier(int id, size_t threads, const char* what, const Where& where) {
  Meeting& meeting = cluster.blocks[self->rank].barriers[id];
  if (!arrive(meeting, threads, what, where)) return;
  order_memory(meeting);
  dismiss(meeting);
}

}  // namespace emu
