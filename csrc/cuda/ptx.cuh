// Every inline-PTX instruction of the CUDA kernels, one function each, and the memory accesses that a kernel
// may make: shared memory through 32-bit shared addresses, global memory through ld_global, st_global,
// red_add and cp_async. With VTOK_EMULATOR defined (tests/emulator) the same names come from an emulation on
// a CPU that checks every access.
//
// Asm statements are volatile, so that the compiler keeps their order among each other and around barriers.
#pragma once
#include <cstdint>

#ifdef VTOK_EMULATOR
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

namespace vtok::ptx {

// ---- shared memory ----------------------------------------------------------------------------------------

// The start of dynamic shared memory. Aligned to 128 bytes: round up for more.
__device__ __forceinline__ uint32_t smem_base() {
  extern __shared__ __align__(128) uint8_t vtok_dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(vtok_dynamic_shared));
}

template <class T>
__device__ __forceinline__ T ld_shared(uint32_t address) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(address));
    memcpy(&value, &bits, 2);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(address));
    memcpy(&value, &bits, 4);
  } else if constexpr (sizeof(T) == 8) {
    uint2 bits;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "r"(address));
    memcpy(&value, &bits, 8);
  } else {
    static_assert(sizeof(T) == 16, "2, 4, 8 or 16 bytes");
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(address));
    memcpy(&value, &bits, 16);
  }
  return value;
}

template <class T>
__device__ __forceinline__ void st_shared(uint32_t address, T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2 bits;
    memcpy(&bits, &value, 8);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(bits.x), "r"(bits.y) : "memory");
  } else {
    static_assert(sizeof(T) == 16, "2, 4, 8 or 16 bytes");
    uint4 bits;
    memcpy(&bits, &value, 16);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w)
                 : "memory");
  }
}

// ---- global memory ----------------------------------------------------------------------------------------

// Plain accesses, so that the compiler may order them; T of up to 16 bytes is one instruction where its
// alignment is its size.
template <class T>
__device__ __forceinline__ T ld_global(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *from;
}

template <class T>
__device__ __forceinline__ void st_global(T* to, T value) {
  __builtin_assume(__isGlobal(to));
  *to = value;
}

// *to += value, atomically; the order of several is any.
__device__ __forceinline__ void red_add(float* to, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value) : "memory");
}

// ---- asynchronous copies from global to shared memory -----------------------------------------------------

// Bytes of 4, 8 or 16, both addresses multiples of that. Not valid: zeros, and gmem is not read.
template <int Bytes>
__device__ __forceinline__ void cp_async(uint32_t smem, const void* gmem, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "4, 8 or 16 bytes");
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16)  // past the first-level cache, which only this width can leave out
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem),
                 "l"(__cvta_generic_to_global(gmem)), "r"(size)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem),
                 "l"(__cvta_generic_to_global(gmem)), "n"(Bytes), "r"(size)
                 : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's youngest groups are under way. Others see the copies after a barrier
// only.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------

// 8x8 matrices of 2-byte elements. Lane 8 i + j gives the address of row j of matrix i (16 bytes, aligned to
// 16; x2: lanes 0 to 15) and gets in r[i] the elements (lane / 4, 2 (lane % 4) + {0, 1}) of matrix i; with
// _trans the same of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem));
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem));
}

// d += a b, a 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8. With g = lane / 4 and t = lane % 4, two
// elements a register: a[i] (g + 8 (i % 2), 2 t + 8 (i / 2) + {0, 1}); b[i] (2 t + 8 i + {0, 1}, g); d[i] (g
// + 8 (i / 2), 2 t + i % 2).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, a 16 x 8, b 8 x 8, d as above; a register is one float32 of which the 19 upper bits count (see
// to_tf32): a[i] (g + 8 (i % 2), t + 4 (i / 2)); b[i] (t + 4 i, g).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- conversions ------------------------------------------------------------------------------------------

// 2^x within 2^-22 of itself; zero where that is below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounds to nearest, ties away from zero, which is what the instruction offers.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace vtok::ptx
#endif

namespace vtok::ptx {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// x / (1 + exp(-x)), to some units of float32. What exp2_approx takes for zero would not change 1.
__device__ __forceinline__ float silu(float x) {
  return __fdividef(x, 1 + exp2_approx(x * -1.4426950408889634f));
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

}  // namespace vtok::ptx
