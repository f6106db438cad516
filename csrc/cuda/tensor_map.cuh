// Tensor maps of TMA: how a tensor lies in global memory and which boxes are copied. The driver encodes them;
// its function is asked from the runtime, so that the module does not depend on libcuda.
#pragma once
#include <cstdint>
#include <string>

#include "cuda/launch.cuh"
#include "tensor.h"

#ifdef VTOK_EMULATOR
#include "sm90.h"
#else
#include <cuda.h>
#endif

namespace vtok {

#ifdef VTOK_EMULATOR
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Sizes in elements, innermost first. stride[i]: bytes from one element to the next along axis i, multiples
// of 16; that of axis 0 is an element. box: elements per axis of a copy; step[i] > 1 takes every step[i]-th
// of the box. swizzle: 0, 32, 64 or 128 bytes, the longest row of a box.
struct TensorMapShape {
  DType dtype;
  int rank;
  uint64_t size[5], stride[5];
  uint32_t box[5], step[5];
  int swizzle;
};

#ifdef VTOK_EMULATOR
inline Status encode(TensorMap& map, const void* base, const TensorMapShape& s) {
  const std::string wrong =
      emu::encode(map, base, element_size(s.dtype), s.rank, s.size, s.stride, s.box, s.step, s.swizzle);
  return wrong.empty() ? Status::Ok() : Status::Internal("cuTensorMapEncodeTiled: " + wrong);
}
#else
inline Status encode(TensorMap& map, const void* base, const TensorMapShape& s) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  VTOK_RETURN_IF_ERROR(cuda::status_of(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
      "cuTensorMapEncodeTiled"));
  if (found != cudaDriverEntryPointSuccess) return Status::Unsupported("the driver has no tensor maps");
  const CUtensorMapDataType type = s.dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : s.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = s.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : s.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : s.swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                       : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < s.rank; ++i) {
    size[i] = s.size[i];
    stride[i] = s.stride[i];
    box[i] = s.box[i];
    step[i] = s.step[i];
  }
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, type, cuuint32_t(s.rank), const_cast<void*>(base), size, stride + 1, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS
             ? Status::Ok()
             : Status::Internal("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
}
#endif

}  // namespace vtok
