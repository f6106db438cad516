// The emulator of the CUDA execution model, as kernels and launchers see it: see emulator.py for how to use
// it.
//
//   types.h         qualifiers, vector types and half precision of CUDA C++
//   machine.h .cpp  threads as fibers, the scheduler, barriers and shuffles, vector clocks
//   memory.h .cpp   shared and global memory, with every access checked
//   instructions.h  the functions of ptx.cuh
//   sm90.h          those of ptx_sm90.cuh: mbarrier.cpp (and clusters), tma.cpp, wgmma.cpp
//   calls.h .cpp    calling a launcher from Python
#pragma once
#include <tuple>

#include "instructions.h"
#include "status.h"

namespace vtok::cuda {

struct Device {
  int multiprocessors, shared_limit, capability;
};

inline Status current_device(Device& device) {
  device = {emu::config.multiprocessors, emu::config.shared_limit, emu::config.capability};
  return Status::Ok();
}

template <class... Parameters>
Status resident_clusters(void (*)(Parameters...), unsigned cluster, unsigned, size_t, int* count) {
  *count = emu::config.multiprocessors / int(cluster);
  return Status::Ok();
}

template <class... Parameters, class... Arguments>
Status launch(const char* what, dim3 cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more bytes of parameters than every GPU takes");
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  emu::launched = what;
  const std::string error = emu::run(grid, cluster, block, shared_bytes, [&] { std::apply(kernel, held); });
  return error.empty() ? Status::Ok() : Status::Internal(error);
}

}  // namespace vtok::cuda
