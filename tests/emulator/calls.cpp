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
}
