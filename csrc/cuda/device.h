// What a host compiler may ask of the CUDA runtime.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "status.h"

namespace vtok::cuda {

// Where a launcher puts its work: torch's index of a device, and the handle of a stream of it.
using Queue = std::array<int64_t, 2>;

// Makes the queue's device the current one of this thread, whichever thread that is.
Status use(const Queue& queue);
inline void* stream_of(const Queue& queue) { return reinterpret_cast<void*>(queue[1]); }

// why no GPU can be used here, such as a driver older than the runtime; "" where one can
std::string problem();

}  // namespace vtok::cuda
