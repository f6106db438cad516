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

std::string name(const Event& e) {
  const int threads = int(block.threads.size());
  const std::string who = e.agent < threads       ? "thread " + std::to_string(e.agent)
                          : e.agent < 2 * threads ? "cp.async of thread " + std::to_string(e.agent - threads)
                                                  : "TMA or wgmma";
  return who + " at " + place(e.where);
}

// ---- shared memory -----------------------------------------------------------------------------------------------------

struct Cell {  // of 2 bytes
  Event write;
  std::vector<Event> reads;  // since the write, one per thread
};

std::vector<uint8_t> arena;  // what lies below the base belongs to nobody
std::vector<Cell> cells;

void check_race(const Event& e, const Thread& by, const char* what, const char* other, uint32_t address, const Where& where) {
  if (!known(e, by))
    fail(std::string("race in shared memory: ") + what + " of " + hex(address - shared_base()) + " is not ordered after the " +
             other + " by " + name(e),
         where);
}

void put(const Copy& copy) {
  if (copy.from) std::memcpy(&arena[copy.to], copy.from, copy.bytes);
  else std::memset(&arena[copy.to], 0, copy.bytes);
}

}  // namespace

// Nothing but 128 bytes of alignment may be relied on.
uint32_t shared_base() { return 1024 + 128 * unsigned(config.seed % 8); }

void reset_shared(size_t bytes) {
  arena.assign(shared_base() + bytes, 0xff);
  cells.clear();
  cells.resize(arena.size() / 2 + 1);
}

void check_shared(uint32_t address, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  if (address < shared_base() || uint64_t(address) + bytes > arena.size())
    fail(std::string("out of bounds in shared memory: ") + what + " of " + std::to_string(bytes) + " bytes at " +
         std::to_string(int64_t(address) - shared_base()) + ", there are " + std::to_string(arena.size() - shared_base()), where);
  if (address % align)
    fail(std::string("misaligned in shared memory: ") + what + " at " + hex(address) + ", not a multiple of " +
             std::to_string(align),
         where);
}

void claim_shared(uint32_t address, uint32_t bytes, const Event& event, const char* what, const Where& where) {
  for (uint32_t a = address; a < address + bytes; a += 2) {
    Cell& cell = cells[a / 2];
    check_race(cell.write, *self, what, "write", a, where);
    for (const Event& read : cell.reads) check_race(read, *self, what, "read", a, where);
    cell.write = event;
    cell.reads.clear();
  }
}

void record_read(uint32_t address, uint32_t bytes, const Event& event, const char* what, const Where& where, const Thread& by,
                 bool asynchronous) {
  for (uint32_t a = address; a < address + bytes; a += 2) {
    Cell& cell = cells[a / 2];
    if (cell.write.agent < 0)
      fail(std::string("uninitialised shared memory: ") + what + " of " + hex(a - shared_base()) + ", never written", where);
    check_race(cell.write, by, what, "write", a, where);
    if (asynchronous && !sm90_visible(cell.write, by))
      fail(std::string("no fence.proxy.async: ") + what + " of " + hex(a - shared_base()) + " may not see the write by " +
               name(cell.write),
           where);
    auto same = std::find_if(cell.reads.begin(), cell.reads.end(), [&](const Event& e) { return e.agent == event.agent; });
    if (same != cell.reads.end()) *same = event;
    else cell.reads.push_back(event);
  }
}

uint8_t* shared_bytes(uint32_t address) { return &arena[address]; }

void read_shared(void* to, uint32_t address, uint32_t bytes, uint32_t align, const char* what, const Where& where, Thread& by) {
  check_shared(address, bytes, align, what, where);
  record_read(address, bytes, {by.id, by.clock[by.id], where}, what, where, by);
  std::memcpy(to, &arena[address], bytes);
}

void write_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  check_shared(address, bytes, align, what, where);
  claim_shared(address, bytes, {self->id, self->clock[self->id], where}, what, where);
  std::memcpy(&arena[address], from, bytes);
}

void start_copy(const Copy& copy, const Where& where) {
  check_shared(copy.to, copy.bytes, copy.bytes, "cp.async", where);
  if (copy.from) check_global_read(copy.from, copy.bytes, copy.bytes, "cp.async", where);
  claim_shared(copy.to, copy.bytes, {self->id + int(block.threads.size()), copy.group, where}, "cp.async", where);
  if (chance()) put(copy);
  else self->copies.push_back(copy);
}

void finish_copies(Thread& by, uint32_t up_to_group) {
  std::erase_if(by.copies, [&](const Copy& copy) {
    if (copy.group > up_to_group) return false;
    put(copy);
    return true;
  });
  uint32_t& clock = by.clock[by.id + block.threads.size()];
  clock = std::max(clock, up_to_group);
}

// ---- global memory -----------------------------------------------------------------------------------------------------

namespace {

struct Buffer {
  uintptr_t end;
  std::string name;
};

constexpr uint32_t kNobody = ~0u, kSeveral = ~0u - 1;

struct Access {  // the last write of 2 bytes, and which block has read them
  enum : uint8_t { none, plain, atomic } kind = none;
  uint16_t thread = 0;
  uint32_t clock = 0, block = 0, reader = kNobody;
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
    std::string near = after == buffers.begin() ? ""
                                                : std::to_string(int64_t(address - std::prev(after)->first)) +
                                                      " from the start of " + std::prev(after)->second.name + ", which has " +
                                                      std::to_string(std::prev(after)->second.end - std::prev(after)->first);
    fail(std::string("out of bounds in global memory: ") + what + " of " + std::to_string(bytes) + " bytes at " + hex(address) +
         (near.empty() ? "" : ", " + near), where);
  }
  if (address % align)
    fail(std::string("misaligned in global memory: ") + what + " at " + hex(address) + ", not a multiple of " +
             std::to_string(align),
         where);
}

// Blocks are never ordered among each other; threads of one block are by barriers.
void check_global_race(const Access& a, bool is_atomic, const char* what, uintptr_t address, const Where& where) {
  if (a.kind == Access::none || (is_atomic && a.kind == Access::atomic)) return;
  if (a.kind == Access::plain && a.block == block.number && a.clock <= self->clock[a.thread]) return;
  fail(std::string("race in global memory: ") + what + " of " + hex(address) + ", which thread " + std::to_string(a.thread) +
           " of block " + std::to_string(a.block) + (a.kind == Access::atomic ? " has added to" : " has written"),
       where);
}

void record_global_write(const void* to, uint32_t bytes, bool is_atomic, const char* what, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t a = address; a < address + bytes; a += 2) {
    Access& last = access_of(a);
    check_global_race(last, is_atomic, what, a, where);
    if (last.reader != kNobody && last.reader != block.number)
      fail(std::string("race in global memory: ") + what + " of " + hex(a) + ", which another block has read", where);
    last = {is_atomic ? Access::atomic : Access::plain, uint16_t(self->id), self->clock[self->id], block.number, last.reader};
  }
}

}  // namespace

void register_global(const void* begin, uint64_t bytes, const char* name) {
  uintptr_t first = reinterpret_cast<uintptr_t>(begin), end = first + bytes;
  std::string all = name;
  for (auto b = buffers.begin(); b != buffers.end();) {  // views of one storage may overlap: they become one
    if (b->first >= end || b->second.end <= first) { ++b; continue; }
    first = std::min(first, b->first), end = std::max(end, b->second.end);
    all = b->second.name + "+" + all;
    b = buffers.erase(b);
  }
  if (end > first) buffers[first] = {end, all};
}

void forget_globals() { buffers.clear(); }
void forget_global_accesses() { pages.clear(); }

void check_global_read(const void* from, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  check_global(from, bytes, align, what, where);
  const auto address = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t a = address; a < address + bytes; a += 2) {
    Access& last = access_of(a);
    check_global_race(last, false, what, a, where);
    last.reader = last.reader == kNobody || last.reader == block.number ? block.number : kSeveral;
  }
}

void read_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  check_global_read(from, bytes, align, what, where);
  std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what, const Where& where) {
  check_global(to, bytes, align, what, where);
  record_global_write(to, bytes, false, what, where);
  std::memcpy(to, from, bytes);
}

void add_global(float* to, float value, const Where& where) {
  check_global(to, 4, 4, "red_add", where);
  record_global_write(to, 4, true, "red_add", where);
  *to += value;
}

}  // namespace emu
