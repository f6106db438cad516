#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace vtok::cpu {
namespace {

Isa best() {
#if VTOK_X86
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (isa_supported(isa)) return isa;
#endif
  return Isa::portable;
}

std::atomic<int>& active() {
  static std::atomic<int> isa{static_cast<int>(best())};
  return isa;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::wide: return "wide";
    case Isa::avx512: return "avx512";
  }
  return "?";
}

bool isa_supported(Isa isa) {
  if (isa == Isa::portable) return true;
#if VTOK_X86
  __builtin_cpu_init();
  // (every processor with AVX2 has F16C; older compilers cannot ask for it)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2;
#else
  return false;
#endif
}

bool set_isa(const char* name) {
  if (!strcmp(name, "auto")) {
    active() = static_cast<int>(best());
    return true;
  }
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::wide, Isa::avx512})
    if (!strcmp(name, isa_name(isa)) && isa_supported(isa)) {
      active() = static_cast<int>(isa);
      return true;
    }
  return false;
}

}  // namespace vtok::cpu
