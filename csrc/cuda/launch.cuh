// Launching a kernel, on a GPU or in the emulator, and errors of CUDA as a Status.
#pragma once
#include <string>
#include <utility>

#include "status.h"

#ifdef VTOK_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>

namespace vtok::cuda {

inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  const std::string message = std::string("CUDA: ") + cudaGetErrorString(error) + " (" + what + ")";
  return error == cudaErrorMemoryAllocation ? Status::OutOfMemory(message) : Status::Internal(message);
}

// What a launcher may want to know of the current device.
struct Device {
  // shared_limit: bytes a block may opt in to; capability: 80, 90, ...
  int multiprocessors, shared_limit, capability;
};

inline Status current_device(Device& device) {
  int id = 0, major = 0, minor = 0;
  VTOK_RETURN_IF_ERROR(status_of(cudaGetDevice(&id), "current device"));
  VTOK_RETURN_IF_ERROR(status_of(
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id), "device"));
  VTOK_RETURN_IF_ERROR(status_of(
      cudaDeviceGetAttribute(&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), "device"));
  VTOK_RETURN_IF_ERROR(
      status_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id), "device"));
  VTOK_RETURN_IF_ERROR(
      status_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id), "device"));
  device.capability = major * 10 + minor;
  return Status::Ok();
}

// How many clusters of a kernel's blocks the current device holds at once: a persistent kernel starts no
// more.
template <class... Parameters>
Status resident_clusters(void (*kernel)(Parameters...), unsigned cluster, unsigned threads,
                         size_t shared_bytes, int* count) {
  const char* what = "resident clusters";
  VTOK_RETURN_IF_ERROR(status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(shared_bytes)),
                                 what));
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = 1;
  size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &size;
  config.numAttrs = 1;
  return status_of(cudaOccupancyMaxActiveClusters(count, kernel, &config), what);
}

template <class... Parameters, class... Arguments>
Status launch(const char* what, dim3 cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024)  // the largest amount that needs no permission
    VTOK_RETURN_IF_ERROR(status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared_bytes)),
                                   what));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster.x;
  size.val.clusterDim.y = cluster.y;
  size.val.clusterDim.z = cluster.z;
  config.attrs = &size;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1;  // GPUs before sm_90 have no clusters
  return status_of(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace vtok::cuda
#endif

// VTOK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) is a Status. Commas of template
// arguments do no harm.
#define VTOK_LAUNCH(...) ::vtok::cuda::launch(#__VA_ARGS__, dim3(1), __VA_ARGS__)
// The same in clusters of `cluster` blocks (sm_90 and newer): at most 8, and the grid is made of whole ones.
#define VTOK_LAUNCH_CLUSTER(cluster, ...) ::vtok::cuda::launch(#__VA_ARGS__, cluster, __VA_ARGS__)
