#include "cuda/device.h"

#include "cuda/launch.cuh"

std::string vtok::cuda::problem() {
  Device device;
  return current_device(device).message;
}
