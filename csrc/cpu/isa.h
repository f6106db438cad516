// Which compiled instance of the kernels runs: chosen once from what the processor has, or by name for tests.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define VTOK_X86 1
#else
#define VTOK_X86 0
#endif

namespace vtok::cpu {

enum class Isa : int { portable, avx2, wide, avx512 };

Isa active_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
bool set_isa(const char* name);  // "auto" or an instance's name; false where unknown or not supported here

}  // namespace vtok::cpu

// Declares `signature` in every instance's namespace; VTOK_DISPATCH(call) runs the active instance's.
#if VTOK_X86
#define VTOK_DECLARE(signature)   \
  namespace vtok::cpu::portable { \
  signature;                      \
  }                               \
  namespace vtok::cpu::avx2 {     \
  signature;                      \
  }                               \
  namespace vtok::cpu::wide {     \
  signature;                      \
  }                               \
  namespace vtok::cpu::avx512 {   \
  signature;                      \
  }
#define VTOK_DISPATCH(call)                                            \
  [&] {                                                                \
    switch (::vtok::cpu::active_isa()) {                               \
      case ::vtok::cpu::Isa::avx512: return ::vtok::cpu::avx512::call; \
      case ::vtok::cpu::Isa::wide: return ::vtok::cpu::wide::call;     \
      case ::vtok::cpu::Isa::avx2: return ::vtok::cpu::avx2::call;     \
      default: return ::vtok::cpu::portable::call;                     \
    }                                                                  \
  }()
#else
#define VTOK_DECLARE(signature)   \
  namespace vtok::cpu::portable { \
  signature;                      \
  }
#define VTOK_DISPATCH(call) ::vtok::cpu::portable::call
#endif
