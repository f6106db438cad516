#include "memory.h"

#include <map>
#include <memory>
#include <unordered_map>

#include "sm90.h"

namespace emu {
namespace {

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

bool known(const Event& e, const Thread& by) { return e.agent < 0 || e.clock <= by.clock[e.agent]; }

// ---- shared memory ----------------------------------------------------------------------------------------

struct Cell {  // of 2 bytes
  Event write;
  std::vector<Event> reads;  // since the write, one per thread
};

constexpr int kRankBit = 24;

uint32_t part;  // bytes of the arena per block, so many that swizzles are the same in each
uint32_t end;   // of what a block has of it; what lies below the base belongs to nobody
std::vector<uint8_t> arena;
std::vector<Cell> cells;

std::string offset(uint32_t place) { return hex(place % part - shared_base()); }

void check_race(const Event& e, const Thread& by, const char* what, const char* other, uint32_t place,
                const Where& where) {
  if (!known(e, by))
    fail(std::string("race in shared memory: ") + what + " of " + offset(place) +
             " is not ordered after the " + other + " by " + name(e),
         where);
}

void put(const Copy& copy) {
  if (copy.from)
    std::memcpy(&arena[copy.to], copy.from, copy.bytes);
  else
    std::memset(&arena[copy.to], 0, copy.bytes);
}

}  // namespace

// Nothing but 128 bytes of alignment may be relied on.
uint32_t shared_base() { return 1024 + 128 * unsigned(config.seed % 8); }

void reset_shared(size_t bytes) {
  end = uint32_t(shared_base() + bytes);
  part = (end + 1023) / 1024 * 1024;
  arena.assign(part * cluster.blocks.size(), 0xff);
  cells.clear();
  cells.resize(arena.size() / 2 + 1);
}

uint32_t map_shared(uint32_t address, int rank) { return address | uint32_t(rank + 1) << kRankBit; }
int rank_of(uint32_t place) { return int(place / part); }
uint32_t same_place_in(int rank, uint32_t place) { return uint32_t(rank) * part + place % part; }

uint32_t check_shared(uint32_t address, uint32_t bytes, uint32_t align, const char* what, const Where& where,
                      bool anywhere) {
  const int mapped = int(address >> kRankBit) - 1, rank = mapped < 0 ? self->rank : mapped;
  const uint32_t within = address & ((1 << kRankBit) - 1);
  const bool reachable = mapped < 0 || (anywhere && mapped < int(cluster.blocks.size()));
  if (!reachable || within < shared_base() || uint64_t(within) + bytes > end)
    fail(std::string("out of bounds in shared memory: ") + what + " of " + std::to_string(bytes) +
             " bytes at " + (mapped < 0 ? "" : "rank " + std::to_string(mapped) + ", ") +
             std::to_string(int64_t(within) - shared_base()) +
             (mapped >= 0 && !anywhere ? ", an address for shared::cluster"
                                       : ", there are " + std::to_string(end - shared_base())),
         where);
  if (within % align)
    fail(std::string("misaligned in shared memory: ") + what + " at " + hex(within) + ", not a multiple of " +
             std::to_string(align),
         where);
  return uint32_t(rank) * part + within;
}

void claim_shared(uint32_t place, uint32_t bytes, const Event& event, const char* what, const Where& where,
                  const Thread& by) {
  for (uint32_t a = place; a < place + bytes; a += 2) {
    Cell& cell = cells[a / 2];
    check_race(cell.write, by, what, "write", a, where);
    for (const Event& read : cell.reads) check_race(read, by, what, "read", a, where);
    cell.write = event;
    cell.reads.clear();
  }
}

void record_read(uint32_t place, uint32_t bytes, const Event& event, const char* what, const Where& where,
                 const Thread& by, bool asynchronous) {
  for (uint32_t a = place; a < place + bytes; a += 2) {
    Cell& cell = cells[a / 2];
    if (cell.write.agent < 0)
      fail(std::string("uninitialized shared memory: ") + what + " of " + offset(a) + ", never written",
           where);
    check_race(cell.write, by, what, "write", a, where);
    if (asynchronous && !sm90_visible(cell.write, by))
      fail(std::string("no fence.proxy.async: ") + what + " of " + offset(a) + " may not see the write by " +
               name(cell.write),
           where);
    auto same = std::find_if(cell.reads.begin(), cell.reads.end(),
                             [&](const Event& e) { return e.agent == event.agent; });
    if (same != cell.reads.end())
      *same = event;
    else
      cell.reads.push_back(event);
  }
}

uint8_t* shared_bytes(uint32_t place) { return &arena[place]; }

std::string name(const Event& e) {
  const int threads = int(cluster.threads.size()), per_block = int(cluster.block_threads());
  const std::string of =
      cluster.blocks.size() == 1 ? "" : " of rank " + std::to_string(e.agent % threads / per_block);
  const std::string who = e.agent < threads ? "thread " + std::to_string(e.agent % per_block) + of
                          : e.agent < 2 * threads
                              ? "cp.async of thread " + std::to_string(e.agent % threads % per_block) + of
                              : "TMA or wgmma";
  return who + " at " + place(e.where);
}

void read_shared(void* to, uint32_t address, uint32_t bytes, uint32_t align, const char* what,
                 const Where& where, Thread& by, bool anywhere) {
  const uint32_t at = check_shared(address, bytes, align, what, where, anywhere);
  const Event event{by.id, by.clock[by.id], where};
  if (rank_of(at) != by.rank) sm90_reach(rank_of(at), event);
  record_read(at, bytes, event, what, where, by);
  std::memcpy(to, &arena[at], bytes);
}

void write_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t align, const char* what,
                  const Where& where, Thread& by, bool anywhere) {
  const uint32_t at = check_shared(address, bytes, align, what, where, anywhere);
  const Event event{by.id, by.clock[by.id], where};
  if (rank_of(at) != by.rank) sm90_reach(rank_of(at), event);
  claim_shared(at, bytes, event, what, where, by);
  std::memcpy(&arena[at], from, bytes);
}

void start_copy(Copy copy, const Where& where) {
  copy.to = check_shared(copy.to, copy.bytes, copy.bytes, "cp.async", where);
  if (copy.from) check_global_read(copy.from, copy.bytes, copy.bytes, "cp.async", where);
  claim_shared(copy.to, copy.bytes, {self->id + int(cluster.threads.size()), copy.group, where}, "cp.async",
               where, *self);
  if (chance())
    put(copy);
  else
    self->copies.push_back(copy);
}

void finish_copies(Thread& by, uint32_t up_to_group) {
  std::erase_if(by.copies, [&](const Copy& copy) {
    if (copy.group > up_to_group) return false;
    put(copy);
    return true;
  });
  uint32_t& clock = by.clock[by.id + cluster.threads.size()];
  clock = std::max(clock, up_to_group);
}

// ---- global memory ----------------------------------------------------------------------------------------

namespace {

struct Buffer {
  uintptr_t end;
  std::string name;
};

constexpr uint32_t kNobody = ~0u, kSeveral = ~0u - 1;

struct Access {  // the last write of 2 bytes, and which block has read them
  enum : uint8_t { none, plain, atomic } kind = none;
  int agent = 0;
  uint32_t clock = 0, cluster = 0, reader = kNobody;
};

constexpr uintptr_t kPage = 1024;

std::map<uintptr_t, Buffer> buffers;  // by first address; they do not overlap
std::unordered_map<uintptr_t, std::unique_ptr<Access[]>> pages;

Access& access_of(uintptr_t address) {
  auto& page = pages[address / kPage];
  if (!page) page = std::make_unique<Access[]>(kPage / 2);
  return page[address % kPage / 2];
}

void check_global(const void* pointer, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin() || std::prev(after)->second.end < address + bytes) {
    std::string near = after == buffers.begin()
                           ? ""
                           : std::to_string(int64_t(address - std::prev(after)->first)) +
                                 " from the start of " + std::prev(after)->second.name + ", which has " +
                                 std::to_string(std::prev(after)->second.end - std::prev(after)->first);
    fail(std::string("out of bounds in global memory: ") + what + " of " + std::to_string(bytes) +
             " bytes at " + hex(address) + (near.empty() ? "" : ", " + near),
         where);
  }
  if (address % align)
    fail(std::string("misaligned in global memory: ") + what + " at " + hex(address) +
             ", not a multiple of " + std::to_string(align),
         where);
}

// Clusters are never ordered among each other; threads of one are by barriers.
void check_global_race(const Access& a, bool is_atomic, const char* what, uintptr_t address,
                       const Where& where, const Thread& by) {
  if (a.kind == Access::none || (is_atomic && a.kind == Access::atomic)) return;
  if (a.kind == Access::plain && a.cluster == cluster.number && a.clock <= by.clock[a.agent]) return;
  const std::string who = a.agent < int(cluster.threads.size()) ? "thread " + std::to_string(a.agent) : "TMA";
  fail(std::string("race in global memory: ") + what + " of " + hex(address) + ", which " + who + " of " +
           (cluster.blocks.size() == 1 ? "block " : "cluster ") + std::to_string(a.cluster) +
           (a.kind == Access::atomic ? " has added to" : " has written"),
       where);
}

void record_global_write(const void* to, uint32_t bytes, bool is_atomic, const Event& event, const char* what,
                         const Where& where, const Thread& by) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t a = address; a < address + bytes; a += 2) {
    Access& last = access_of(a);
    check_global_race(last, is_atomic, what, a, where, by);
    if (last.reader != kNobody && last.reader != cluster.number)
      fail(std::string("race in global memory: ") + what + " of " + hex(a) + ", which another block has read",
           where);
    last = {is_atomic ? Access::atomic : Access::plain, event.agent, event.clock, cluster.number,
            last.reader};
  }
}

Event now(const Where& where) { return {self->id, self->clock[self->id], where}; }

}  // namespace

void register_global(const void* begin, uint64_t bytes, const char* name) {
  uintptr_t first = reinterpret_cast<uintptr_t>(begin), end = first + bytes;
  std::string all = name;
  for (auto b = buffers.begin(); b != buffers.end();) {  // views of one storage may overlap: they become one
    if (b->first >= end || b->second.end <= first) {
      ++b;
      continue;
    }
    first = std::min(first, b->first);
    end = std::max(end, b->second.end);
    all = b->second.name + "+" + all;
    b = buffers.erase(b);
  }
  if (end > first) buffers[first] = {end, all};
}

void forget_globals() { buffers.clear(); }
void forget_global_accesses() { pages.clear(); }

void check_global_read(const void* from, uint32_t bytes, uint32_t align, const char* what,
                       const Where& where) {
  check_global(from, bytes, align, what, where);
  const auto address = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t a = address; a < address + bytes; a += 2) {
    Access& last = access_of(a);
    check_global_race(last, false, what, a, where, *self);
    last.reader = last.reader == kNobody || last.reader == cluster.number ? cluster.number : kSeveral;
  }
}

void read_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what,
                 const Where& where) {
  check_global_read(from, bytes, align, what, where);
  std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what,
                  const Where& where) {
  check_global(to, bytes, align, what, where);
  record_global_write(to, bytes, false, now(where), what, where, *self);
  std::memcpy(to, from, bytes);
}

void claim_global(void* to, uint32_t bytes, uint32_t align, const Event& event, const char* what,
                  const Where& where, const Thread& by) {
  check_global(to, bytes, align, what, where);
  record_global_write(to, bytes, false, event, what, where, by);
}

void add_global(float* to, float value, const Where& where) {
  check_global(to, 4, 4, "red_add", where);
  record_global_write(to, 4, true, now(where), "red_add", where, *self);
  *to += value;
}

}  // namespace emu
