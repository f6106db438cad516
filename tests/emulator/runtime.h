// The part of the CUDA runtime and of the driver that the launchers call, so that the host code of csrc/cuda is
// compiled here as it is. What a GPU's driver refuses is refused, and state is kept as it keeps it: per thread the
// runtime's device and the driver's context, per kernel and device the shared memory that it was granted.
//
// A thread has no context until it launches, asks for the occupancy, or sets one. cudaSetDevice moves the
// runtime's device only, which is the least that releases of CUDA promise.
#pragma once
#include <functional>
#include <tuple>

#include "sm90.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {  // gridDim and blockDim are macros here
  dim3 grid, block;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);

// ---- the driver -------------------------------------------------------------------------------------------

enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_INVALID_CONTEXT = 201,
};
using CUdevice = int;
using CUcontext = struct EmulatedContext*;
using CUtensorMap = emu::TensorMap;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B,
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

CUresult cuCtxGetCurrent(CUcontext* context);
CUresult cuCtxSetCurrent(CUcontext context);
CUresult cuCtxGetDevice(CUdevice* device);
CUresult cuDeviceGet(CUdevice* device, int ordinal);
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill);

// ---- what the tests may see and set -----------------------------------------------------------------------

namespace emu {

constexpr int kDevices = 2;  // alike

struct HostCounts {
  int64_t launches, attributes, look_ups, encodes, occupancies;
};
inline HostCounts host_counts;
inline int last_device = -1;     // where the last launch went
inline bool run_kernels = true;  // else a launch is checked, and done at once
inline int64_t refuse_rank = 0;  // tensor maps of this rank are refused; 0: none
inline bool refuse_occupancy = false;
inline std::function<void()> after_attribute;  // called when one has been set, by the thread that did

// Everything about a launch but running it: where the kernel goes to, or why it cannot.
cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t run_launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
cudaError_t check_occupancy(const void* kernel, const cudaLaunchConfig_t& config, int* count);

}  // namespace emu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more bytes of parameters than every GPU takes");
  const cudaError_t error = emu::check_launch(reinterpret_cast<const void*>(kernel), *config);
  if (error != cudaSuccess || !emu::run_kernels) return error;
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  return emu::run_launch(*config, [&] { std::apply(kernel, held); });
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  return emu::check_occupancy(reinterpret_cast<const void*>(kernel), *config, count);
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
