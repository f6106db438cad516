// mbarrier, clusters, and what else of sm_90 makes threads wait.
#include "sm90.h"

namespace emu {
namespace {

constexpr size_t kBarriers = 64;  // of a block

std::map<uint32_t, Mbarrier> mbarriers;  // by place

struct {
  uint32_t phase;  // phases that have ended
  Clock arriving, ended;
  std::vector<Thread*> waiting;
} cluster_barrier;

std::vector<std::map<int, Event>> reached;  // by rank and agent: the last access from outside
// by rank: of the multiprocessor's, what no warpgroup of the block has
std::vector<int> free_registers;
std::vector<Thread*> want_registers;

// Threads that have ended do not hold the others up.
void end_cluster_phase_if_complete() {
  bool any = false;
  for (const Thread& t : cluster.threads) {
    const bool arrived = states[t.id].cluster_arrivals > cluster_barrier.phase;
    if (!arrived && t.state != Thread::State::ended) return;
    any = any || arrived;
  }
  if (!any) return;
  ++cluster_barrier.phase;
  cluster_barrier.ended = cluster_barrier.arriving;
  for (Thread* t : cluster_barrier.waiting) wake(t);
  cluster_barrier.waiting.clear();
}

void arrive_at(uint32_t place, uint32_t bytes, const char* what, const Where& where) {
  Mbarrier& bar = barrier_at(place, what, where);
  if (bar.pending == 0)
    fail(std::string(what) + ": more threads arrive than the mbarrier was initialized for", where);
  bar.bytes += bytes;
  if (bar.bytes >= 1 << 20) fail(std::string(what) + ": more than 2^20 - 1 bytes expected", where);
  join(bar.arriving, self->clock);
  if (rank_of(place) == self->rank)
    join(bar.arriving_near, self->clock);
  else
    sm90_reach(rank_of(place), {self->id, self->clock[self->id], where});
  ++self->clock[self->id];
  --bar.pending;
  end_phase_if_complete(bar, where);
}

Mbarrier& wait_for(uint32_t address, uint32_t parity, const char* what, const Where& where) {
  Mbarrier& bar = barrier_at(check_shared(address, 8, 8, what, where), what, where);
  while ((bar.phase & 1) == parity) {
    bar.waiting.push_back(self);
    park(what, where);
  }
  return bar;
}

}  // namespace

size_t agents() { return 4 * threads() + (threads() + 127) / 128 + kBarriers * cluster.blocks.size(); }
size_t sm90_clocks() { return config.capability == 90 ? agents() : 0; }

void sm90_start_cluster() {
  const size_t block_threads = cluster.block_threads(), all = agents() + 2 * threads();
  mbarriers.clear();
  states.assign(threads(), {});
  warpgroups.assign((threads() + 127) / 128, {});
  cluster_barrier = {0, Clock(all), Clock(all), {}};
  reached.assign(cluster.blocks.size(), {});
  // As many registers as the compiler may give each thread where one block has the multiprocessor.
  for (Warpgroup& group : warpgroups) group.registers = int(min<size_t>(65536 / block_threads / 8 * 8, 256));
  free_registers.assign(cluster.blocks.size(), 0);
  want_registers.clear();
}

void sm90_end_thread() {
  if (!state().stores.empty())
    fail("the kernel ends while TMA may still read shared memory: no tma_store_wait_read", self->where);
  for (const Accumulator& a : state().accumulators)
    if (!a.landed) fail("the kernel ends before a product has landed: no wgmma_wait", self->where);
  if (config.capability != 90) return;
  end_cluster_phase_if_complete();
  if (cluster.blocks[self->rank].running) return;
  Clock known(self->clock.size());
  for (const Thread& t : cluster.threads)
    if (t.rank == self->rank) join(known, t.clock);
  for (const auto& [agent, event] : reached[self->rank])
    if (event.clock > known[agent])
      fail("a block ends, and its shared memory with it, not ordered after what is done to it by " +
               name(event),
           self->where);
}

bool sm90_visible(const Event& write, const Thread& by) {
  return write.agent >= 2 * threads() || write.clock <= by.clock[agents() + write.agent];
}

void sm90_reach(int rank, const Event& event) {
  if (cluster.blocks[rank].running == 0) fail("shared memory of a block that has ended", event.where);
  reached[rank][event.agent] = event;
}

void need_sm90(const char* what, const Where& where) {
  if (config.capability != 90) fail(std::string(what) + ": only sm_90a has it", where);
}

Mbarrier& barrier_at(uint32_t place, const char* what, const Where& where) {
  need_sm90(what, where);
  const auto found = mbarriers.find(place);
  if (found == mbarriers.end()) fail(std::string(what) + ": no mbarrier was initialized here", where);
  if (found->second.init.clock > self->clock[found->second.init.agent])
    fail(std::string("race in shared memory: ") + what +
             " is not ordered after the mbarrier's initialization at " + emu::place(found->second.init.where),
         where);
  return found->second;
}

void end_phase_if_complete(Mbarrier& bar, const Where& where) {
  if (bar.pending || bar.bytes) return;
  if (bar.loads)
    return report("mbarrier: a phase ends while TMA still writes for it (fewer bytes expected than come)",
                  where);
  bar.arriving[bar.agent] = bar.arriving_near[bar.agent] = ++bar.phase;
  bar.ended = bar.arriving;
  bar.ended_near = bar.arriving_near;
  bar.pending = bar.count;
  for (Thread* t : bar.waiting) wake(t);
  bar.waiting.clear();
}

// A warpgroup that wants more registers than are free waits until others give some back.
void set_registers(int count, bool more, const Where& where) {
  const char* what = more ? "setmaxnreg_inc" : "setmaxnreg_dec";
  warpgroup(what, count, where, [&](Warpgroup& group, int**) {
    if (more ? count < group.registers : count > group.registers)
      fail(std::string(what) + ": to " + std::to_string(count) + " registers from " +
               std::to_string(group.registers),
           where);
    int& left = free_registers[self->rank];
    const int wanted = 128 * (count - group.registers);
    while (wanted > left) {
      want_registers.push_back(self);
      park(what, where);
    }
    left -= wanted;
    group.registers = count;
    for (Thread* t : want_registers) wake(t);
    want_registers.clear();
  });
}

}  // namespace emu

namespace vtok::ptx {

using namespace emu;

void mbarrier_init(uint32_t bar, uint32_t count, Where where) {
  need_sm90("mbarrier_init", where);
  const uint32_t place = check_shared(bar, 8, 8, "mbarrier_init", where);
  if (mbarriers.count(place)) fail("mbarrier_init: there is an mbarrier here already", where);
  if (count == 0 || count >= 1 << 20) fail("mbarrier_init: " + std::to_string(count) + " threads", where);
  if (mbarriers.size() == kBarriers * cluster.blocks.size())
    fail("mbarrier_init: more mbarriers than the emulator has", where);
  Mbarrier& b = mbarriers[place];
  b.count = b.pending = count;
  b.agent = wgmma_agent(int(warpgroups.size())) + int(mbarriers.size()) - 1;
  b.arriving.resize(self->clock.size());
  b.arriving_near.resize(self->clock.size());
  b.init = {self->id, self->clock[self->id], where};
}

void fence_mbarrier_init() {
  for (auto& [place, bar] : mbarriers) bar.fenced = bar.fenced || bar.init.agent == self->id;
}

void mbarrier_arrive(uint32_t bar, Where where) {
  arrive_at(check_shared(bar, 8, 8, "mbarrier_arrive", where), 0, "mbarrier_arrive", where);
}

void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes, Where where) {
  arrive_at(check_shared(bar, 8, 8, "mbarrier_arrive_expect", where), bytes, "mbarrier_arrive_expect", where);
}

void mbarrier_arrive_cluster(uint32_t bar, Where where) {
  arrive_at(check_shared(bar, 8, 8, "mbarrier_arrive_cluster", where, true), 0, "mbarrier_arrive_cluster",
            where);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Where where) {
  const Mbarrier& bar = wait_for(address, parity, "mbarrier_wait", where);
  if (bar.phase) join(self->clock, bar.ended_near);
}

void mbarrier_wait_cluster(uint32_t address, uint32_t parity, Where where) {
  const Mbarrier& bar = wait_for(address, parity, "mbarrier_wait_cluster", where);
  if (bar.phase) join(self->clock, bar.ended);
}

// A first try may fail too early; a second waits, so that a loop of tries that can never succeed is found to
// be a deadlock.
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Where where) {
  const Mbarrier& bar =
      barrier_at(check_shared(address, 8, 8, "mbarrier_try_wait", where), "mbarrier_try_wait", where);
  state().tried = !state().tried && (bar.phase & 1) == parity && (config.seed < 2 || chance());
  if (state().tried) return false;
  mbarrier_wait(address, parity, where);
  return true;
}

void fence_proxy_async() {
  for (size_t agent : {size_t(self->id), size_t(self->id + threads())})
    self->clock[agents() + agent] = self->clock[agent];
  ++self->clock[self->id];
}

void cluster_arrive(Where where) {
  need_sm90("cluster_arrive", where);
  collective("cluster_arrive", ~0u, 0, where, [](int**) {});
  if (state().cluster_arrivals > state().cluster_waits)
    fail("cluster_arrive: twice without cluster_wait", where);
  join(cluster_barrier.arriving, self->clock);
  ++self->clock[self->id];
  ++state().cluster_arrivals;
  end_cluster_phase_if_complete();
}

void cluster_wait(Where where) {
  need_sm90("cluster_wait", where);
  collective("cluster_wait", ~0u, 0, where, [](int**) {});
  if (state().cluster_arrivals == state().cluster_waits)
    fail("cluster_wait: no cluster_arrive before it", where);
  ++state().cluster_waits;
  if (cluster_barrier.phase < state().cluster_waits) {
    cluster_barrier.waiting.push_back(self);
    park("cluster_wait", where);
  }
  join(self->clock, cluster_barrier.ended);
}

// PTX leaves open which lane it is, but it is the same each time.
bool elect_sync(Where where) {
  need_sm90("elect_sync", where);
  collective("elect_sync", ~0u, 0, where, [](int**) {});
  return self->lane == (31 + 7 * config.seed) % 32;
}

}  // namespace vtok::ptx
