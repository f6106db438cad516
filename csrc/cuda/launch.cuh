// Launching a kernel, and errors of CUDA as a Status. In the emulator the runtime and the driver are those of
// tests/emulator/runtime.h; this code is the same.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "status.h"

#ifdef VTOK_EMULATOR
#include "emulator.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace vtok::cuda {

// The runtime keeps a thread's last error until it is asked for: it must not turn up in a later call.
inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  const std::string message = std::string("CUDA: ") + cudaGetErrorString(error) + " (" + what + ")";
  cudaGetLastError();
  return error == cudaErrorMemoryAllocation ? Status::OutOfMemory(message) : Status::Internal(message);
}

// ---- the driver -------------------------------------------------------------------------------------------

// Functions of the driver, asked from the runtime, so that the module does not depend on libcuda.
struct Driver {
  decltype(&cuCtxGetCurrent) context_of_thread = nullptr;
  decltype(&cuCtxSetCurrent) set_context = nullptr;
  decltype(&cuCtxGetDevice) device_of_context = nullptr;
  decltype(&cuDeviceGet) device = nullptr;
  decltype(&cuDevicePrimaryCtxRetain) retain = nullptr;
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;  // null before CUDA 12
  Status problem;
};

inline const Driver& driver() {
  static const Driver found = [] {
    Driver d;
    auto find = [&](auto& function, const char* name) {
      void* address = nullptr;
      cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
      const Status asked = status_of(
          cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result), name);
      if (d.problem.ok()) d.problem = asked;
      if (asked.ok() && result == cudaDriverEntryPointSuccess)
        function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
    };
    find(d.context_of_thread, "cuCtxGetCurrent");
    find(d.set_context, "cuCtxSetCurrent");
    find(d.device_of_context, "cuCtxGetDevice");
    find(d.device, "cuDeviceGet");
    find(d.retain, "cuDevicePrimaryCtxRetain");
    find(d.encode, "cuTensorMapEncodeTiled");
    if (d.problem.ok() &&
        !(d.context_of_thread && d.set_context && d.device_of_context && d.device && d.retain))
      d.problem = Status::Internal("CUDA: the driver lacks the functions of contexts");
    return d;
  }();
  return found;
}

inline Status driver_status(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::Internal("CUDA: the driver's error " + std::to_string(int(result)) + " (" + what + ")");
}

// Makes `id` the device of this thread, for the runtime and for the driver. Any thread may be the caller,
// autograd's too: until its first launch it has no context, and tensor maps cannot be encoded without one.
// The runtime inside this module guesses the device from the context; torch's index leaves nothing to guess.
// Legal while a graph is captured.
inline Status use_device(int id) {
  int current = -1;
  VTOK_RETURN_IF_ERROR(status_of(cudaGetDevice(&current), "current device"));
  if (current != id) VTOK_RETURN_IF_ERROR(status_of(cudaSetDevice(id), "current device"));
  const Driver& d = driver();
  VTOK_RETURN_IF_ERROR(d.problem);
  CUdevice wanted = 0, bound = -1;
  CUcontext context = nullptr;
  VTOK_RETURN_IF_ERROR(driver_status(d.device(&wanted, id), "cuDeviceGet"));
  VTOK_RETURN_IF_ERROR(driver_status(d.context_of_thread(&context), "cuCtxGetCurrent"));
  if (context) VTOK_RETURN_IF_ERROR(driver_status(d.device_of_context(&bound), "cuCtxGetDevice"));
  if (bound == wanted) return Status::Ok();
  static std::mutex mutex;
  static std::map<int, CUcontext> primary;  // retained once for the life of the process, as the runtime does
  const std::lock_guard<std::mutex> lock(mutex);
  CUcontext& held = primary[id];
  if (!held) VTOK_RETURN_IF_ERROR(driver_status(d.retain(&held, wanted), "cuDevicePrimaryCtxRetain"));
  return driver_status(d.set_context(held), "cuCtxSetCurrent");
}

// ---- the device -------------------------------------------------------------------------------------------

// What a launcher may want to know of the current device.
struct Device {
  // shared_limit: bytes a block may opt in to; capability: 80, 90, ...
  int id, multiprocessors, shared_limit, capability;
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
  device.id = id;
  device.capability = major * 10 + minor;
  return Status::Ok();
}

// Grants a kernel all the shared memory that a block may opt in to, once per device: the grant belongs to the
// kernel, so that one of the exact need would be taken back by another thread's before the launch; and the
// driver may wait for running copies where it is changed. Kernels have no static shared memory.
inline Status grant_shared(const void* kernel, const char* what) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> granted;
  int id = 0, limit = 0;
  VTOK_RETURN_IF_ERROR(status_of(cudaGetDevice(&id), what));
  const std::lock_guard<std::mutex> lock(mutex);
  if (granted.count({kernel, id})) return Status::Ok();
  VTOK_RETURN_IF_ERROR(
      status_of(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), what));
  VTOK_RETURN_IF_ERROR(
      status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), what));
  granted.insert({kernel, id});
  return Status::Ok();
}

constexpr size_t kSharedWithoutGrant = 48 * 1024;

// ---- launches ---------------------------------------------------------------------------------------------

// How many clusters of a kernel's blocks the current device holds at once, where a multiprocessor has room for
// one block: a persistent kernel starts no more. Only a hint: where it is refused, blocks that do not fit wait.
template <class... Parameters>
Status resident_clusters(void (*kernel)(Parameters...), unsigned cluster, unsigned threads,
                         size_t shared_bytes, const Device& device, int* count) {
  *count = std::max(device.multiprocessors / int(cluster), 1);
  if (cluster == 1) return Status::Ok();
  VTOK_RETURN_IF_ERROR(grant_shared(reinterpret_cast<const void*>(kernel), "resident clusters"));
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = 1;
  size.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config = {dim3(cluster), dim3(threads), shared_bytes, nullptr, &size, 1};
  int most = 0;
  if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) != cudaSuccess)
    cudaGetLastError();
  else if (most > 0)
    *count = most;
  return Status::Ok();
}

template <class... Parameters, class... Arguments>
Status launch(const char* what, dim3 cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
#ifdef VTOK_EMULATOR
  emu::launched = what;
#endif
  if (shared_bytes > kSharedWithoutGrant)
    VTOK_RETURN_IF_ERROR(grant_shared(reinterpret_cast<const void*>(kernel), what));
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster.x;
  size.val.clusterDim.y = cluster.y;
  size.val.clusterDim.z = cluster.z;
  const unsigned attributes = cluster.x * cluster.y * cluster.z > 1;  // GPUs before sm_90 have no clusters
  const cudaLaunchConfig_t config = {grid, block, shared_bytes, stream, &size, attributes};
  return status_of(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace vtok::cuda

// VTOK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) is a Status. Commas of template
// arguments do no harm.
#define VTOK_LAUNCH(...) ::vtok::cuda::launch(#__VA_ARGS__, dim3(1), __VA_ARGS__)
// The same in clusters of `cluster` blocks (sm_90 and newer): at most 8, and the grid is made of whole ones.
#define VTOK_LAUNCH_CLUSTER(cluster, ...) ::vtok::cuda::launch(#__VA_ARGS__, cluster, __VA_ARGS__)
