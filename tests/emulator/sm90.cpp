#include "sm90.h"

#include <map>

namespace emu {
namespace {

constexpr uint64_t kMagic = 0x564f5443544d4150;
constexpr size_t kBarriers = 64;

struct Mbarrier {
  uint32_t count, pending;
  int64_t bytes = 0;   // expected and not yet come
  uint32_t phase = 0;  // phases that have ended
  std::vector<uint32_t> arriving, ended;  // clocks: of those that have arrived, and what the end of the last phase tells
  std::vector<Thread*> waiting;
  int agent;
  Event init;
  bool fenced = false;
  int loads = 0;  // under way
};

struct Store {
  uint32_t group;
  std::function<void()> finish;
};

struct State {  // of one thread
  std::vector<Store> stores;
  uint32_t store_groups = 0;
  std::vector<Accumulator> accumulators;
  bool fenced = false;
};

struct Warpgroup {
  Meeting meeting;
  uint32_t groups = 0;
};

std::map<uint32_t, Mbarrier> barriers;  // by address
std::vector<State> states;
std::vector<Warpgroup> warpgroups;

int threads() { return int(block.threads.size()); }
int store_agent(const Thread& t) { return 2 * threads() + t.id; }
int wgmma_agent(int group) { return 3 * threads() + group; }
size_t agents() { return 3 * threads() + (threads() + 127) / 128 + kBarriers; }

void need_sm90(const char* what, const Where& where) {
  if (config.capability != 90) fail(std::string(what) + ": only sm_90a has it", where);
}

void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

Mbarrier& barrier_at(uint32_t address, const char* what, const Where& where) {
  need_sm90(what, where);
  check_shared(address, 8, 8, what, where);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail(std::string(what) + ": no mbarrier was initialised here", where);
  if (found->second.init.clock > self->clock[found->second.init.agent])
    fail(std::string("race in shared memory: ") + what + " is not ordered after the mbarrier's initialisation at " +
             place(found->second.init.where),
         where);
  return found->second;
}

void end_phase_if_complete(Mbarrier& bar, const Where& where) {
  if (bar.pending || bar.bytes) return;
  if (bar.loads) return report("mbarrier: a phase ends while TMA still writes for it (fewer bytes expected than come)", where);
  bar.arriving[bar.agent] = ++bar.phase;
  bar.ended = bar.arriving;
  bar.pending = bar.count;
  for (Thread* t : bar.waiting) wake(t);
  bar.waiting.clear();
}

void arrive_at(Mbarrier& bar, uint32_t bytes, const char* what, const Where& where) {
  if (bar.pending == 0) fail(std::string(what) + ": more threads arrive than the mbarrier was initialised for", where);
  bar.bytes += bytes;
  if (bar.bytes >= 1 << 20) fail(std::string(what) + ": more than 2^20 - 1 bytes expected", where);
  join(bar.arriving, self->clock);
  ++self->clock[self->id];
  --bar.pending;
  end_phase_if_complete(bar, where);
}

// Calls part(shared address, global address or null where it is out of bounds, bytes) for all of a box.
template <class Part>
void each_part(const TensorMap& map, uint32_t smem, const int* at, Part part) {
  uint32_t count[5], index[5] = {}, elements = 1;
  for (int i = 0; i < map.rank; ++i) count[i] = (map.box[i] + map.step[i] - 1) / map.step[i], elements *= count[i];
  for (uint32_t done = 0; done < elements;) {
    const char* from = map.base;
    bool inside = true;
    for (int i = 0; i < map.rank; ++i) {
      const int64_t where = int64_t(at[i]) + int64_t(index[i]) * map.step[i];
      inside = inside && where >= 0 && where < int64_t(map.size[i]);
      from += where * int64_t(map.stride[i]);
    }
    // 16 bytes at once where they are neighbours, all of them inside.
    const uint32_t wide = 16 / map.element, here = smem + done * map.element;
    const int64_t first = int64_t(at[0]) + index[0];
    const bool together = map.step[0] == 1 && here % 16 == 0 && index[0] + wide <= count[0] && first + wide <= int64_t(map.size[0]);
    const uint32_t taken = together ? wide : 1;
    part(map.swizzle ? here ^ (here >> 3 & (map.swizzle - 16)) : here, inside ? from : nullptr, taken * map.element);
    done += taken;
    index[0] += taken;
    for (int i = 0; i < map.rank && index[i] == count[i]; ++i)
      if (index[i] = 0; i + 1 < map.rank) ++index[i + 1];
  }
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= (map.box[i] + map.step[i] - 1) / map.step[i];
  return bytes;
}

void check_tma(const TensorMap* map, uint32_t smem, int rank, const char* what, const Where& where) {
  need_sm90(what, where);
  if (map->magic != kMagic) fail(std::string(what) + ": this is no tensor map", where);
  if (map->rank != rank)
    fail(std::string(what) + ": " + std::to_string(rank) + " coordinates for a tensor of rank " + std::to_string(map->rank), where);
  check_shared(smem, box_bytes(*map), 128, what, where);
}

}  // namespace

size_t sm90_clocks() { return config.capability == 90 ? agents() : 0; }

void sm90_start_block() {
  barriers.clear();
  states.assign(threads(), {});
  warpgroups.assign((threads() + 127) / 128, {});
}

void sm90_end_thread() {
  const State& state = states[self->id];
  if (!state.stores.empty()) fail("the kernel ends while TMA may still read shared memory: no tma_store_wait_read", self->where);
  for (const Accumulator& a : state.accumulators)
    if (!a.landed) fail("the kernel ends before a product has landed: no wgmma_wait", self->where);
}

bool sm90_visible(const Event& write, const Thread& by) {
  return write.agent >= 2 * threads() || write.clock <= by.clock[agents() + write.agent];
}

// ---- TMA ---------------------------------------------------------------------------------------------------------------

std::string encode(TensorMap& map, const void* base, int element, int rank, const uint64_t* size, const uint64_t* stride,
                   const uint32_t* box, const uint32_t* step, int swizzle) {
  map = {kMagic, static_cast<const char*>(base), element, rank, swizzle, {}, {}, {}, {}};
  if (rank < 1 || rank > 5) return "rank " + std::to_string(rank);
  if (reinterpret_cast<uintptr_t>(base) % 16) return "the address is not a multiple of 16";
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128) return "swizzle " + std::to_string(swizzle);
  for (int i = 0; i < rank; ++i) {
    const std::string axis = " of axis " + std::to_string(i);
    map.size[i] = size[i], map.stride[i] = i ? stride[i] : uint64_t(element), map.box[i] = box[i], map.step[i] = step[i];
    if (size[i] == 0 || size[i] > uint64_t(1) << 32) return "size " + std::to_string(size[i]) + axis;
    if (i && (stride[i] % 16 || stride[i] >= uint64_t(1) << 40))
      return "stride " + std::to_string(stride[i]) + axis + ", not a multiple of 16 below 2^40";
    if (box[i] == 0 || box[i] > 256) return "box " + std::to_string(box[i]) + axis + ", not 1 to 256";
    if (step[i] == 0 || step[i] > 8) return "element stride " + std::to_string(step[i]) + axis + ", not 1 to 8";
  }
  const uint32_t row = box[0] * element;
  if (row % 16) return "rows of " + std::to_string(row) + " bytes, not a multiple of 16";
  if (swizzle && row > uint32_t(swizzle)) return "rows of " + std::to_string(row) + " bytes are longer than the swizzle";
  return "";
}

void tma_load(uint32_t smem, const TensorMap* map, uint32_t address, const int* at, int rank, const Where& where) {
  check_tma(map, smem, rank, "tma_load", where);
  Mbarrier& bar = barrier_at(address, "tma_load", where);
  if (!bar.fenced) fail("tma_load: no fence_mbarrier_init after the mbarrier's initialisation", where);
  claim_shared(smem, box_bytes(*map), {bar.agent, bar.phase + 1, where}, "tma_load", where);
  std::vector<int> place(at, at + rank);
  each_part(*map, smem, at, [&](uint32_t, const char* from, uint32_t bytes) {
    if (from) check_global_read(from, bytes, map->element, "tma_load", where);
  });
  ++bar.loads;
  auto finish = [&bar, map = *map, smem, place, where] {
    each_part(map, smem, place.data(), [&](uint32_t to, const char* from, uint32_t bytes) {
      if (from) std::memcpy(shared_bytes(to), from, bytes);
      else std::memset(shared_bytes(to), 0, bytes);
    });
    --bar.loads;
    bar.bytes -= box_bytes(map);
    end_phase_if_complete(bar, where);
  };
  if (chance()) finish();
  else in_flight.push_back(finish);
}

void tma_store(const TensorMap* map, uint32_t smem, const int* at, int rank, const Where& where) {
  check_tma(map, smem, rank, "tma_store", where);
  State& state = states[self->id];
  record_read(smem, box_bytes(*map), {store_agent(*self), state.store_groups + 1, where}, "tma_store", where, *self, true);
  std::vector<int> place(at, at + rank);
  auto finish = [map = *map, smem, place, where] {
    each_part(map, smem, place.data(), [&](uint32_t from, const char* to, uint32_t bytes) {
      if (to) write_global(const_cast<char*>(to), shared_bytes(from), bytes, map.element, "tma_store", where);
    });
  };
  if (chance()) {
    finish();
    state.stores.push_back({state.store_groups + 1, [] {}});
  } else {
    state.stores.push_back({state.store_groups + 1, finish});
  }
}

void tma_store_wait(uint32_t left) {
  State& state = states[self->id];
  if (state.store_groups < left) return;
  const uint32_t up_to = state.store_groups - left;
  std::erase_if(state.stores, [&](const Store& store) {
    if (store.group > up_to) return false;
    store.finish();
    return true;
  });
  uint32_t& clock = self->clock[store_agent(*self)];
  clock = std::max(clock, up_to);
}

// ---- wgmma -------------------------------------------------------------------------------------------------------------

namespace {

// The 128 threads meet; the last calls execute(offers by thread of the warpgroup).
template <class Offer, class Execute>
void warpgroup(const char* what, Offer offer, const Where& where, Execute execute) {
  need_sm90(what, where);
  if (threads() % 128) fail(std::string(what) + ": the block has a warpgroup of fewer than 128 threads", where);
  Warpgroup& group = warpgroups[self->id / 128];
  if (!arrive(group.meeting, 128, what, where, &offer)) return;
  Offer* offers[128];
  for (int i = 0; i < 128; ++i) offers[group.meeting.present[i]->id % 128] = static_cast<Offer*>(group.meeting.offers[i]);
  execute(group, offers);
  dismiss(group.meeting);
}

// Row r, 16 elements of k: where its two 16-byte chunks are.
struct Tile {
  uint32_t start, group_stride;
  uint32_t width;  // of a row

  Tile(uint64_t descriptor, const Where& where) {
    const int swizzle = int(descriptor >> 62);
    if (swizzle == 0) fail("wgmma: the emulator knows swizzled tiles only", where);
    width = 256 >> swizzle;
    start = uint32_t(descriptor & 0x3fff) << 4, group_stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) fail("wgmma: the emulator knows base offset 0 only", where);
    if ((start - start % width) % (8 * width))
      fail("wgmma: a tile swizzled over " + std::to_string(width) + " bytes must start at a multiple of " +
               std::to_string(8 * width),
           where);
  }
  uint32_t chunk(int row, int half) const {
    const uint32_t address = start + row / 8 * group_stride + row % 8 * width + 16 * half;
    return address ^ (address >> 3 & (width - 16));
  }
};

std::vector<float> read_tile(const Tile& tile, int rows, float (*element)(uint16_t), int group, bool all_warps,
                             const Where& where) {
  std::vector<float> values(rows * 16);
  const Event event{wgmma_agent(group), warpgroups[group].groups + 1, where};
  for (int row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = tile.chunk(row, half);
      check_shared(address, 16, 16, "wgmma", where);
      for (int warp = all_warps ? 0 : row / 16; warp < (all_warps ? 4 : row / 16 + 1); ++warp)  // by those that need the row
        record_read(address, 16, event, "wgmma", where, block.threads[128 * group + 32 * warp], true);
      for (int i = 0; i < 8; ++i) {
        uint16_t bits;
        std::memcpy(&bits, shared_bytes(address + 2 * i), 2);
        values[row * 16 + half * 8 + i] = element(bits);
      }
    }
  return values;
}

}  // namespace

void wgmma_fence(const Where& where) {
  warpgroup("wgmma_fence", 0, where, [](Warpgroup&, int**) {});
  State& state = states[self->id];
  state.fenced = true;
  for (Accumulator& a : state.accumulators)
    if (a.landed) a.seen.assign(a.d, a.d + a.value.size());
}

void wgmma_commit(const Where& where) {
  warpgroup("wgmma_commit", 0, where, [](Warpgroup& group, int**) { ++group.groups; });
}

void wgmma_wait(uint32_t left, const Where& where) {
  warpgroup("wgmma_wait", 0, where, [](Warpgroup&, int**) {});
  const uint32_t groups = warpgroups[self->id / 128].groups;
  if (groups < left) return;
  const uint32_t up_to = groups - left;
  for (Accumulator& a : states[self->id].accumulators) {
    if (a.landed || a.group > up_to) continue;
    std::copy(a.value.begin(), a.value.end(), a.d);
    a.seen = a.value, a.landed = true;
  }
  uint32_t& clock = self->clock[wgmma_agent(self->id / 128)];
  clock = std::max(clock, up_to);
}

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, float (*element)(uint16_t), const Where& where) {
  struct Offer {
    float* d;
    uint64_t a, b;
    bool accumulate;
  };
  need_sm90("wgmma", where);
  State& state = states[self->id];
  auto& known = state.accumulators;
  auto own = std::find_if(known.begin(), known.end(), [&](const Accumulator& x) { return x.d == d; });
  if (own == known.end()) {
    if (!state.fenced) fail("wgmma: no wgmma_fence before the first product", where);
    known.push_back({d, {}, std::vector<float>(d, d + n / 2), 0, true});
    own = known.end() - 1;
  }
  if (own->landed) {
    if (accumulate && std::memcmp(own->seen.data(), d, n / 2 * sizeof(float)))
      fail("wgmma: registers changed since the last wgmma_fence", where);
    own->value.assign(d, d + n / 2);
  }
  const int group_number = self->id / 128;
  warpgroup("wgmma", Offer{d, a, b, accumulate}, where, [&](Warpgroup& group, Offer** offers) {
    for (int i = 0; i < 128; ++i)
      if (offers[i]->a != a || offers[i]->b != b || offers[i]->accumulate != accumulate)
        fail("wgmma: threads have different descriptors", where);
    const auto left = read_tile(Tile(a, where), 64, element, group_number, false, where);
    const auto right = read_tile(Tile(b, where), n, element, group_number, true, where);
    for (int t = 0; t < 128; ++t) {
      auto& all = states[128 * group_number + t].accumulators;
      Accumulator& to = *std::find_if(all.begin(), all.end(), [&](const Accumulator& x) { return x.d == offers[t]->d; });
      to.value.resize(n / 2);
      for (int i = 0; i < n / 2; ++i) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
        float sum = accumulate ? to.value[i] : 0;
        for (int k = 0; k < 16; ++k) sum += left[row * 16 + k] * right[column * 16 + k];
        to.value[i] = sum;
      }
      to.group = group.groups + 1, to.landed = false;
      std::fill(to.d, to.d + n / 2, NAN);  // until they are waited for
    }
  });
}

}  // namespace emu

// ---- mbarrier ----------------------------------------------------------------------------------------------------------

namespace vtok::ptx {

using namespace emu;

void mbarrier_init(uint32_t bar, uint32_t count, Where where) {
  need_sm90("mbarrier_init", where);
  check_shared(bar, 8, 8, "mbarrier_init", where);
  if (barriers.count(bar)) fail("mbarrier_init: there is an mbarrier here already", where);
  if (count == 0 || count >= 1 << 20) fail("mbarrier_init: " + std::to_string(count) + " threads", where);
  if (barriers.size() == kBarriers) fail("mbarrier_init: more mbarriers than the emulator has", where);
  Mbarrier& b = barriers[bar];
  b.count = b.pending = count;
  b.agent = wgmma_agent(int(warpgroups.size())) + int(barriers.size()) - 1;
  b.arriving.resize(self->clock.size());
  b.init = {self->id, self->clock[self->id], where};
}

void fence_mbarrier_init() {
  for (auto& [address, bar] : barriers) bar.fenced = bar.fenced || bar.init.agent == self->id;
}

void mbarrier_arrive(uint32_t bar, Where where) {
  arrive_at(barrier_at(bar, "mbarrier_arrive", where), 0, "mbarrier_arrive", where);
}

void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes, Where where) {
  arrive_at(barrier_at(bar, "mbarrier_arrive_expect", where), bytes, "mbarrier_arrive_expect", where);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Where where) {
  Mbarrier& bar = barrier_at(address, "mbarrier_wait", where);
  while ((bar.phase & 1) == parity) {
    bar.waiting.push_back(self);
    park("mbarrier_wait", where);
  }
  if (bar.phase) join(self->clock, bar.ended);
}

void fence_proxy_async() {
  for (size_t agent : {size_t(self->id), self->id + block.threads.size()}) self->clock[agents() + agent] = self->clock[agent];
  ++self->clock[self->id];
}

void tma_store_commit() { ++states[self->id].store_groups; }

}  // namespace vtok::ptx
