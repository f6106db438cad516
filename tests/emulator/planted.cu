// c = a b^T by tensor cores, in two stages of cp.async, with the sum of c by atomics; row 5 of b counts as
// zeros. Right where bug is 0, and with one mistake for each other number. a (32 blocks, k), b (8, k), c (32
// blocks, 8), all contiguous; total (1).
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "tensor.h"

using namespace vtok;

namespace {

constexpr uint32_t kA = 32 * 32, kB = 8 * 32, kStage = kA + kB, kResult = 2 * kStage,
                   kShared = kResult + 32 * 8 * 4;

template <class T>
__global__ void gemm(const T* a, const T* b, float* c, float* total, int k, int bug) {
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const uint32_t base = ptx::smem_base();
  const T* rows = a + int64_t(blockIdx.x) * 32 * k;

  auto load = [&](int step) {
    if (step * 16 < k) {
      const uint32_t stage = base + (bug == 1 ? 0 : step % 2 * kStage);
      const bool beyond = bug == 2 && step == 1 && t == 63;
      ptx::cp_async<16>(stage + 16 * t, rows + (t / 2 + 32 * beyond) * k + step * 16 + t % 2 * 8, true);
      const T* from = b + t / 2 * k + step * 16 + t % 2 * 8 + (bug == 4 && t == 3);
      const uint32_t to = stage + kA + 16 * t;
      if (t == 7) {
        ptx::cp_async<8>(to, from, true);
        ptx::cp_async<8>(to + 8, from + 4, true);
      } else if (t < (bug == 3 ? 15 : 16))
        ptx::cp_async<16>(to, from, t / 2 != 5);
    }
    if (bug != 5) ptx::cp_async_commit();
  };

  float d[4] = {};
  load(0);
  for (int step = 0; step * 16 < k; ++step) {
    load(step + 1);
    if (bug == 6)
      ptx::cp_async_wait<2>();
    else
      ptx::cp_async_wait<1>();
    if (bug == 7 && warp == 1 && step == 1)
      __syncthreads();
    else if (bug != 8)
      __syncthreads();
    const uint32_t stage = base + step % 2 * kStage;
    uint32_t left[4], right[2];
    ptx::ldmatrix_x4(left, stage + (warp * 16 + lane % 16) * 32 + lane / 16 * 16 + (bug == 9 ? 8 : 0));
    if (bug != 10 || lane < 16) ptx::ldmatrix_x2(right, stage + kA + lane % 8 * 32 + lane / 8 % 2 * 16);
    if (bug == 11 && lane < 16)
      ptx::mma_m16n8k16<T>(d, left, right);
    else
      ptx::mma_m16n8k16<T>(d, left, right);
    if (bug != 12) __syncthreads();
  }

  const uint32_t result = base + kResult + (warp * 16 + lane / 4) * 32 + lane % 4 * 8;
  ptx::st_shared(result, make_float2(d[0], d[1]));
  ptx::st_shared(result + 8 * 32 + (bug == 13 && t == 63 ? 8 : 0), make_float2(d[2], d[3]));
  if (bug != 14) __syncwarp();  // a warp reads what the same warp wrote
  if (bug == 15 && t > 40) return;
  float4 row = ptx::ld_shared<float4>(base + kResult + t * 16 + (bug == 16 && t == 5 ? 4 : 0));
  if (bug == 17 && t == 9) row = ptx::ld_shared<float4>(base + kResult + 40 * 16);
  const int64_t at = int64_t(bug == 18 ? 0 : blockIdx.x) * 256 + (bug == 19 && t == 63 ? 62 : t) * 4;
  ptx::st_global(
      reinterpret_cast<float4*>(c + at + (bug == 20 && blockIdx.x == gridDim.x - 1 && t == 63 ? 4 : 0)), row);
  if (bug == 21 && blockIdx.x) row = ptx::ld_global(reinterpret_cast<const float4*>(c + at - 256));
  if (bug == 22) row = ptx::ld_global(reinterpret_cast<const float4*>(c + at - t * 4 + (t + 1) % 64 * 4));

  float sum = row.x + row.y + row.z + row.w;
  if (bug == 23 && lane == 31) return;
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(bug == 24 && lane > 15 ? 0xffffu : ~0u, sum, by);
  if (bug == 25) sum = __shfl_sync(0xffff << 16 * (lane / 16), sum, 3);
  __syncthreads();
  if (bug == 26 && t == 0) ptx::st_global(total, 0.0f);
  if (lane == 0) ptx::red_add(total, sum);
}

Status run(Tensor a, Tensor b, Tensor c, Tensor total, int bug) {
  const int k = int(a.size[1]);
  const dim3 grid(unsigned(a.size[0] / 32)), block(bug == 27 ? 2048 : 64);
  const size_t shared = bug == 28 ? 200 << 10 : kShared;
  auto* sum = static_cast<float*>(total.data);
  if (a.dtype == DType::bf16)
    return VTOK_LAUNCH(gemm<__nv_bfloat16>, grid, block, shared, nullptr,
                       static_cast<const __nv_bfloat16*>(a.data), static_cast<const __nv_bfloat16*>(b.data),
                       static_cast<float*>(c.data), sum, k, bug);
  return VTOK_LAUNCH(gemm<__half>, grid, block, shared, nullptr, static_cast<const __half*>(a.data),
                     static_cast<const __half*>(b.data), static_cast<float*>(c.data), sum, k, bug);
}

}  // namespace

Status planted(Tensor a, Tensor b, Tensor c, Tensor total, int bug) { return run(a, b, c, total, bug); }
