// Tensor maps of TMA: how a tensor lies in global memory and which boxes are copied. The driver encodes them, in a
// thread that has a context (use_device).
#pragma once
#include <cstdint>
#include <string>

#include "cuda/launch.cuh"
#include "tensor.h"

namespace vtok {

using TensorMap = CUtensorMap;

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

inline std::string text_of(const TensorMapShape& s) {
  auto row = [&](const auto& values) {
    std::string text;
    for (int i = 0; i < s.rank; ++i) text += (i ? "x" : "") + std::to_string(values[i]);
    return text;
  };
  return "size " + row(s.size) + ", byte strides " + row(s.stride) + ", boxes of " + row(s.box) +
         " with steps " + row(s.step) + ", swizzle " + std::to_string(s.swizzle);
}

// Unsupported where the driver takes no such map: another kernel may run then.
inline Status encode(TensorMap& map, const void* base, const TensorMapShape& s) {
  const cuda::Driver& driver = cuda::driver();
  VTOK_RETURN_IF_ERROR(driver.problem);
  if (!driver.encode) return Status::Unsupported("the driver has no tensor maps");
  const CUtensorMapDataType type = s.dtype == DType::f32        ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : s.dtype == DType::bf16     ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : element_size(s.dtype) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
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
  const CUresult result =
      driver.encode(&map, type, cuuint32_t(s.rank), const_cast<void*>(base), size, stride + 1, box, step,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_ERROR_INVALID_VALUE)
    return Status::Unsupported("sm90: the driver refuses a tensor map of " + text_of(s));
  return cuda::driver_status(result, "cuTensorMapEncodeTiled");
}

}  // namespace vtok
