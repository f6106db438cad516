#include "runtime.h"

#include <map>
#include <mutex>

#include "machine.h"

namespace {

thread_local int slot = 0;               // the runtime's device
thread_local CUcontext bound = nullptr;  // the driver's context
thread_local std::string detail;         // of this thread's last error
thread_local cudaError_t last = cudaSuccess;

std::mutex guard;                                    // of what follows
std::mutex machine;                                  // one kernel at a time
std::map<std::pair<const void*, int>, int> granted;  // shared memory of a kernel on a device

char contexts[emu::kDevices];  // one address for each
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(contexts + device); }
int device_of(CUcontext context) { return int(reinterpret_cast<char*>(context) - contexts); }
bool exists(int device) { return device >= 0 && device < emu::kDevices; }

cudaError_t failed(cudaError_t error, std::string why) {
  detail = std::move(why);
  return last = error;
}

// Where the runtime puts work: into the thread's context, or else the primary one of its device.
int bind() {
  if (!bound) bound = context_of(slot);
  return device_of(bound);
}

std::string too_much_shared(const void* kernel, int device, size_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = granted.find({kernel, device});
  const int most = std::max(48 << 10, found == granted.end() ? 0 : found->second);
  return bytes <= size_t(most) ? ""
                               : "launch: " + std::to_string(bytes) +
                                     " bytes of shared memory, and the kernel is "
                                     "granted " +
                                     std::to_string(most);
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  if (!detail.empty()) return detail.c_str();
  return error == cudaSuccess ? "no error" : "an error";
}

cudaError_t cudaGetLastError() {
  const cudaError_t was = last;
  last = cudaSuccess;
  return was;
}

cudaError_t cudaGetDevice(int* device) {
  *device = bound ? device_of(bound) : slot;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return failed(cudaErrorInvalidDevice, "no device " + std::to_string(device));
  slot = device;
  if (bound) bound = context_of(device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return failed(cudaErrorInvalidDevice, "no device " + std::to_string(device));
  const auto& c = emu::config;
  *value = attribute == cudaDevAttrMultiProcessorCount            ? c.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? c.shared_limit
           : attribute == cudaDevAttrComputeCapabilityMajor       ? c.capability / 10
                                                                  : c.capability % 10;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > emu::config.shared_limit)
    return failed(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory, at most " +
                                             std::to_string(emu::config.shared_limit));
  {
    const std::lock_guard<std::mutex> lock(guard);
    ++emu::host_counts.attributes;
    granted[{kernel, bind()}] = value;
  }
  if (emu::after_attribute) emu::after_attribute();
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  static const std::map<std::string, void*> functions = {
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&cuCtxGetCurrent)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&cuCtxSetCurrent)},
      {"cuCtxGetDevice", reinterpret_cast<void*>(&cuCtxGetDevice)},
      {"cuDeviceGet", reinterpret_cast<void*>(&cuDeviceGet)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(&cuDevicePrimaryCtxRetain)},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&cuTensorMapEncodeTiled)},
  };
  ++emu::host_counts.look_ups;
  const auto it = functions.find(name);
  *found = it == functions.end() || version < 12000 ? cudaDriverEntryPointSymbolNotFound
                                                    : cudaDriverEntryPointSuccess;
  *function = it == functions.end() ? nullptr : it->second;
  return cudaSuccess;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = bound, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return bound = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  return *device = device_of(bound), CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!exists(ordinal)) return CUDA_ERROR_INVALID_VALUE;
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (!exists(device)) return CUDA_ERROR_INVALID_VALUE;
  return *context = context_of(device), CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  ++emu::host_counts.encodes;
  if (int64_t(rank) == emu::refuse_rank) return CUDA_ERROR_INVALID_VALUE;
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8     ? 1
                      : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                : 2;
  uint64_t stride[5] = {};  // the driver takes none of the innermost axis
  for (cuuint32_t i = 1; i < rank && i < 5; ++i) stride[i] = strides[i - 1];
  const int bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << int(swizzle);
  const std::string wrong = emu::encode(*map, address, element, int(rank), sizes, stride, box, steps, bytes);
  return wrong.empty() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

namespace emu {

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config) {
  const int device = bind();
  if (std::string why = too_much_shared(kernel, device, config.dynamicSmemBytes); !why.empty())
    return failed(cudaErrorInvalidValue, why);
  const std::lock_guard<std::mutex> lock(guard);
  last_device = device;
  ++host_counts.launches;
  return cudaSuccess;
}

cudaError_t run_launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine);
  const dim3 cluster = config.numAttrs ? config.attrs[0].val.clusterDim : dim3(1);
  const std::string error = run(config.grid, cluster, config.block, config.dynamicSmemBytes, kernel);
  return error.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, error);
}

cudaError_t check_occupancy(const void* kernel, const cudaLaunchConfig_t& config, int* count) {
  const int device = bind();
  ++host_counts.occupancies;
  if (refuse_occupancy) return failed(cudaErrorInvalidValue, "the occupancy query is refused");
  if (std::string why = too_much_shared(kernel, device, config.dynamicSmemBytes); !why.empty())
    return failed(cudaErrorInvalidValue, why);
  *count = emu::config.multiprocessors / int(config.attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

}  // namespace emu
