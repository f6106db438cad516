#include "cuda/device.h"

#include "cuda/launch.cuh"

namespace vtok::cuda {

Status use(const Queue& queue) { return use_device(int(queue[0])); }

std::string problem() {
  Device device;
  return current_device(device).message;
}

}  // namespace vtok::cuda
