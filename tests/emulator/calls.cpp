#include "calls.h"

int emu::answer(const vtok::Status& status, char* message, size_t room) {
  std::snprintf(message, room, "%s", status.message.c_str());
  return static_cast<int>(status.code);
}

extern "C" {

void emu_prepare(int seed, int shared_limit, int multiprocessors, int capability) {
  emu::config = {seed, shared_limit, multiprocessors, capability};
  emu::forget_globals();
}

void emu_register(const void* begin, uint64_t bytes, const char* name) {
  emu::register_global(begin, bytes, name);
}
const char* emu_launched() { return emu::launched; }
uint64_t emu_bank_conflicts() { return emu::bank_conflicts; }
uint64_t emu_matrices_read() { return emu::matrices_read; }
int emu_last_device() { return emu::last_device; }
// launches, grants of shared memory, look-ups of the driver's functions, tensor maps, questions of occupancy
const int64_t* emu_host_counts() { return &emu::host_counts.launches; }
// what the driver refuses: tensor maps of a rank, or 0; the occupancy query
void emu_refuse(int rank, int occupancy) {
  emu::refuse_rank = rank;
  emu::refuse_occupancy = occupancy != 0;
}
void emu_run_kernels(int run) { emu::run_kernels = run != 0; }
}
