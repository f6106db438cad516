// Shared and global memory, with every access checked.
//
// Shared memory is an arena in which the blocks of a cluster have their parts. A kernel's address is of its
// own block's part; or, as map_shared makes it, of another's: then bits 24 and up are the block's rank + 1. A
// place is an index of the arena. Beside each 2 bytes stand the last write and the reads since: an access
// that is not ordered after the write (and, if it writes, after the reads) is a race, in whatever order the
// threads ran. Global memory is the buffers that the test has registered; beside each 2 bytes of it stands
// who wrote last.
#pragma once
#include "machine.h"

namespace emu {

// What an agent did at a time of its own clock.
struct Event {
  int agent = -1;
  uint32_t clock = 0;
  Where where;
};

// at the start of a cluster, for each block: filled with 0xff, nothing written
void reset_shared(size_t bytes);
uint32_t shared_base();
uint32_t map_shared(uint32_t address, int rank);
int rank_of(uint32_t place);
uint32_t same_place_in(int rank, uint32_t place);

// Bounds and alignment to `align` of an address; its place. Another block's only `anywhere`.
uint32_t check_shared(uint32_t address, uint32_t bytes, uint32_t align, const char* what, const Where& where,
                      bool anywhere = false);
// The same, for a read also initialized bytes and races; then copies.
void read_shared(void* to, uint32_t address, uint32_t bytes, uint32_t align, const char* what,
                 const Where& where, Thread& by, bool anywhere = false);
void write_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t align, const char* what,
                  const Where& where, Thread& by, bool anywhere = false);
// A copy is a write by the agent `by.id + n` at the clock of its group; finish_copies puts those up to a
// group in place.
void start_copy(Copy copy, const Where& where);
void finish_copies(Thread& by, uint32_t up_to_group);

// What instructions with memory accesses of their own are made of. claim_shared records a write by `event`
// that is not done yet; agents known to `by` are those it is ordered after.
void claim_shared(uint32_t place, uint32_t bytes, const Event& event, const char* what, const Where& where,
                  const Thread& by);
void record_read(uint32_t place, uint32_t bytes, const Event& event, const char* what, const Where& where,
                 const Thread& by, bool asynchronous = false);
uint8_t* shared_bytes(uint32_t place);
std::string name(const Event& event);

// The running thread writes registers: not those from which a product under way still reads.
void sm90_overwrites(const uint32_t* registers, int count, const char* what, const Where& where);

void register_global(const void* begin, uint64_t bytes, const char* name);
void forget_globals();
void forget_global_accesses();  // at the start of a launch
void read_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what,
                 const Where& where);
void check_global_read(const void* from, uint32_t bytes, uint32_t align, const char* what,
                       const Where& where);
void write_global(void* to, const void* from, uint32_t bytes, uint32_t align, const char* what,
                  const Where& where);
// Records a write by `event`, which is not done yet, of what `by` has asked for.
void claim_global(void* to, uint32_t bytes, uint32_t align, const Event& event, const char* what,
                  const Where& where, const Thread& by);
void add_global(float* to, float value, const Where& where);

}  // namespace emu
