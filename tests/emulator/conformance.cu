// What the instructions of ptx.cuh do with exact values, word for word: the same source for a GPU and for the
// emulator, so that a mistake that two parts of the emulator share cannot hide. test_conformance.py knows
// what each word must be.
//
// nvcc -std=c++17 -arch=native -I csrc tests/emulator/conformance.cu -o conformance && ./conformance
// prints a word per line
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "tensor.h"

namespace vtok::cuda {

constexpr int kValues = 2048;  // float32 bit patterns to convert
constexpr int kWords = 12 * 32 + 3 * 4 * 32 + 6 * 32 + 64 + 3 * kValues;

// Element (r, c) of 32 rows of 8 is 8 r + c. Row r lies at place 5 r % 32, and lane l gives the address of
// row l.
__global__ void matrices(uint32_t* out) {
  const uint32_t base = ptx::smem_base(), lane = threadIdx.x, row = base + 16 * (5 * lane % 32);
  for (uint32_t c = 0; c < 8; ++c) ptx::st_shared(row + 2 * c, static_cast<uint16_t>(8 * lane + c));
  __syncthreads();
  uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
  ptx::ldmatrix_x4(x4, row);
  ptx::ldmatrix_x4_trans(x4_trans, row);
  ptx::ldmatrix_x2(x2, row);
  ptx::ldmatrix_x2_trans(x2_trans, row);
  for (int i = 0; i < 4; ++i) {
    ptx::st_global(out + 32 * i + lane, x4[i]);
    ptx::st_global(out + 128 + 32 * i + lane, x4_trans[i]);
  }
  for (int i = 0; i < 2; ++i) {
    ptx::st_global(out + 256 + 32 * i + lane, x2[i]);
    ptx::st_global(out + 320 + 32 * i + lane, x2_trans[i]);
  }
}

// A small integer for each register of a fragment: of which operand, which register, which half of it.
__device__ float integer(int operand, int i, int half) {
  return float(int(threadIdx.x * 7 + i * 13 + half * 5 + operand * 3 + threadIdx.x * threadIdx.x * i) % 9 -
               4);
}

template <class T>
__device__ uint32_t pair(int operand, int i) {
  uint32_t bits[2];
  for (int half = 0; half < 2; ++half) {
    const T value = ptx::from_float<T>(integer(operand, i, half));
    uint16_t raw;
    memcpy(&raw, &value, 2);
    bits[half] = raw;
  }
  return bits[0] | bits[1] << 16;
}

template <class T>
__global__ void products(uint32_t* out) {
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = integer(2, i, 0);
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) a[i] = ptx::to_tf32(integer(0, i, 0));
    for (int i = 0; i < 2; ++i) b[i] = ptx::to_tf32(integer(1, i, 0));
    ptx::mma_m16n8k8_tf32(d, a, b);
  } else {
    for (int i = 0; i < 4; ++i) a[i] = pair<T>(0, i);
    for (int i = 0; i < 2; ++i) b[i] = pair<T>(1, i);
    ptx::mma_m16n8k16<T>(d, a, b);
  }
  for (int i = 0; i < 4; ++i) ptx::st_global(out + 32 * i + threadIdx.x, static_cast<uint32_t>(int(d[i])));
}

__global__ void exchanges(uint32_t* out) {
  const uint32_t lane = threadIdx.x, value = 100 + lane;
  const uint32_t got[6] = {__shfl_xor_sync(~0u, value, 9),    __shfl_xor_sync(~0u, value, 17, 16),
                           __shfl_sync(~0u, value, 11, 8),    __shfl_down_sync(~0u, value, 5),
                           __shfl_up_sync(~0u, value, 3, 16), __ballot_sync(~0u, lane % 3 == 1)};
  for (int i = 0; i < 6; ++i) ptx::st_global(out + 32 * i + lane, got[i]);
}

// out: 64 words, of which the first 32 hold 1, 2, ... and the others 0.5: copied, or zeros, and added up.
__global__ void copies(uint32_t* out) {
  const uint32_t lane = threadIdx.x, base = ptx::smem_base();
  if (lane < 4)
    ptx::cp_async<16>(base + 16 * lane, out + 4 * lane, lane != 2);
  else if (lane < 10)
    ptx::cp_async<8>(base + 64 + 8 * (lane - 4), out + 16 + 2 * (lane - 4), lane != 5);
  else if (lane < 14)
    ptx::cp_async<4>(base + 112 + 4 * (lane - 10), out + 28 + lane - 10, lane != 12);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  ptx::st_global(out + lane, 2 * ptx::ld_shared<uint32_t>(base + 4 * lane));
  ptx::red_add(reinterpret_cast<float*>(out) + 32 + lane / 4, float(lane));
}

__global__ void conversions(uint32_t* out) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t bits = i * 2654435761u;  // all exponents, signs and last places
  float value;
  memcpy(&value, &bits, 4);
  const __nv_bfloat16 bf16 = ptx::from_float<__nv_bfloat16>(value);
  // Around the ends of what float16 holds, too.
  const __half half =
      ptx::from_float<__half>(i % 2 ? value : float(int(bits >> 8) - (1 << 23)) / float(1 << (i / 2 % 31)));
  uint16_t words[2];
  memcpy(&words[0], &bf16, 2);
  memcpy(&words[1], &half, 2);
  ptx::st_global(out + 3 * i, words[0] | uint32_t(words[1]) << 16);
  ptx::st_global(out + 3 * i + 1, ptx::to_tf32(value) & ~0x1fffu);
  const float back = ptx::to_float(half);
  uint32_t wide;
  memcpy(&wide, &back, 4);
  ptx::st_global(out + 3 * i + 2, back != back ? 0x7fffffffu : wide);
}

Status conformance(const Tensor& words) {
  auto* out = static_cast<uint32_t*>(words.data);
  if (words.numel() != kWords) return Status::Invalid("expected " + std::to_string(kWords) + " words");
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(matrices, 1, 32, 512, nullptr, out));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(products<__nv_bfloat16>, 1, 32, 0, nullptr, out += 12 * 32));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(products<__half>, 1, 32, 0, nullptr, out += 128));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(products<float>, 1, 32, 0, nullptr, out += 128));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(exchanges, 1, 32, 0, nullptr, out += 128));
  VTOK_RETURN_IF_ERROR(VTOK_LAUNCH(copies, 1, 32, 128, nullptr, out += 6 * 32));
  return VTOK_LAUNCH(conversions, kValues / 128, 128, 0, nullptr, out += 64);
}

}  // namespace vtok::cuda

#ifndef VTOK_EMULATOR
#include <cstdio>
#include <vector>

int main() {
  constexpr int kWords = vtok::cuda::kWords, kCopied = 12 * 32 + 3 * 128 + 6 * 32;
  std::vector<uint32_t> words(kWords);
  for (int i = 0; i < 64; ++i) words[kCopied + i] = i < 32 ? i + 1 : 0x3f000000u;
  void* memory = nullptr;
  vtok::Tensor out;
  out.rank = 1;
  out.size[0] = kWords;
  out.stride[0] = 1;
  out.dtype = vtok::DType::i32;
  auto tried = [](cudaError_t error) {
    if (error != cudaSuccess) {
      std::printf("%s\n", cudaGetErrorString(error));
      std::exit(1);
    }
  };
  tried(cudaMalloc(&memory, kWords * 4));
  tried(cudaMemcpy(memory, words.data(), kWords * 4, cudaMemcpyHostToDevice));
  out.data = memory;
  const vtok::Status status = vtok::cuda::conformance(out);
  if (!status.ok()) return std::printf("%s\n", status.message.c_str()), 1;
  tried(cudaMemcpy(words.data(), memory, kWords * 4, cudaMemcpyDeviceToHost));
  for (uint32_t word : words) std::printf("%08x\n", word);
}
#endif
