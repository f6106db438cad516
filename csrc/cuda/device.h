// What a host compiler may ask of the CUDA runtime.
#pragma once
#include <string>

namespace vtok::cuda {

// why no GPU can be used here, such as a driver older than the runtime; "" where one can
std::string problem();

}  // namespace vtok::cuda
