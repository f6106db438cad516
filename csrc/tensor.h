// The one struct that crosses the border between Python and the kernels: a pointer, a type, sizes and strides
// (in elements).
// No torch headers anywhere: a build does not depend on a torch version.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vtok {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, i32 = 4, i64 = 5, u8 = 6, e4m3 = 7 };

constexpr int kMaxRank = 6;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  explicit operator bool() const { return rank > 0; }  // an absent optional tensor has rank 0
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= size[i];
    return n;
  }
};

constexpr int element_size(DType t) {
  switch (t) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f64:
    case DType::i64: return 8;
    case DType::u8:
    case DType::e4m3: return 1;
  }
  return 0;
}

inline bool is_float(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16; }

}  // namespace vtok
