// c = a b^T by wgmma, in two stages filled by TMA, and stored by TMA: right where bug is 0 or 25, and with
// one mistake for each other number. a (m, k), b (64, k), c (m, 64), all contiguous; k a multiple of 64, rows
// beyond m are neither read nor written.
#include "cuda/ptx_sm90.cuh"

using namespace vtok;

namespace {

constexpr uint32_t kTile = 64 * 128, kStage = 2 * kTile, kBarriers = 2 * kStage,
                   kShared = kBarriers + 64 + 1024;

template <class T>
__global__ void gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                     const __grid_constant__ TensorMap c, int k, int bug) {
  const int t = threadIdx.x;
  const bool consumer = t >= 128;
  const uint32_t base = bug == 1 ? ptx::smem_base() + 128 : (ptx::smem_base() + 1023) / 1024 * 1024,
                 full = base + kBarriers, empty = full + 16;
  if (t == 0) {
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, bug == 2 ? 129 : bug == 3 ? 64 : 128);
    }
    if (bug != 4) ptx::fence_mbarrier_init();
  }
  if (bug != 5) __syncthreads();

  if (!consumer) {
    for (int step = 0; t == 0 && step * 64 < k; ++step) {
      const int s = step % 2, phase = step / 2 % 2, rows = int(blockIdx.x) * 64;
      ptx::mbarrier_wait(empty + 8 * s, bug == 6 ? phase : phase ^ 1);
      ptx::mbarrier_arrive_expect(full + 8 * s, bug == 7 ? kTile : bug == 8 ? kStage + 16 : kStage);
      const uint32_t tile = base + (bug == 9 ? step : s) * kStage;
      ptx::tma_load(tile, &a, full + 8 * s, {step * 64, rows});
      ptx::tma_load(tile + kTile, &b, full + 8 * (bug == 10 ? s ^ 1 : s), {step * 64, 0});
    }
  } else {
    float d[32];
    for (float& x : d) x = 0;
    if (bug != 11) ptx::wgmma_fence();
    for (int step = 0; step * 64 < k; ++step) {
      const int s = step % 2, phase = step / 2 % 2;
      ptx::mbarrier_wait(full + 8 * s, bug == 12 ? phase ^ 1 : phase);
      if (bug == 13 && step == 1) d[5] *= 2;
      const uint64_t left = ptx::wgmma_descriptor<128>(base + s * kStage),
                     right = ptx::wgmma_descriptor<128>(base + s * kStage + kTile);
      for (int i = 0; i < 4; ++i)
        if (bug != 14 || t < 200)
          ptx::wgmma_m64k16<T, 64>(d, left + 2 * i, right + 2 * i + (bug == 15 && t == 130 ? 1 : 0),
                                   step + i > 0);
      ptx::wgmma_commit();
      if (bug != 16) ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive(empty + 8 * s);
    }
    // The tile of c, as TMA takes it: two boxes of 32 floats' rows.
    for (int i = 0; i < 32; ++i) {
      const int w = t % 128, row = 16 * (w / 32) + w % 32 / 4 + 8 * (i / 2 % 2),
                column = 8 * (i / 4) + 2 * (w % 4) + i % 2;
      ptx::st_shared(ptx::swizzled<128>(base + column / 32 * kTile, row, column % 32 * 4), d[i]);
    }
    if (bug != 17) ptx::fence_proxy_async();
    if (bug != 18) ptx::bar_sync<1>(bug == 19 ? 160 : 128);
    if (t == 128) {
      for (int half = 0; half < 2; ++half)
        ptx::tma_store(&c, base + half * kTile, {32 * half, int(bug == 20 ? 0 : blockIdx.x) * 64});
      ptx::tma_store_commit();
      if (bug == 22) ptx::st_shared(base, 0.0f);
      if (bug != 21) ptx::tma_store_wait_read<0>();
    }
    if (bug == 25) {
      ptx::bar_sync<1>(128);
      ptx::st_shared(base + 4 * (t - 128), 0.0f);
    }
  }
}

// A fragment is loaded again before its product has been waited for (bug 1), with the same values, or after.
__global__ void reload(float* out, int bug) {
  using T = __nv_bfloat16;
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, t = threadIdx.x;
  for (uint32_t i = t; i < 128 * 64; i += 128)
    ptx::st_shared(ptx::swizzled<128>(base, i / 64, i % 64 * 2), ptx::from_float<T>(float(i % 5)));
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t row = ptx::swizzled<128>(base, t / 32 * 16 + t % 16, t % 32 / 16 * 16);
  uint32_t a[4];
  float d[32];
  for (float& x : d) x = 0;
  ptx::ldmatrix_x4(a, row);
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<T, 64>(d, a, ptx::wgmma_descriptor<128>(base + kTile));
  ptx::wgmma_commit();
  if (bug == 1) ptx::ldmatrix_x4(a, row);
  ptx::wgmma_wait<0>();
  if (bug == 0) ptx::ldmatrix_x4(a, row);
  ptx::st_global(out + t, d[0] + float(a[0] & 1));
}

Status encode_rows(TensorMap& map, const Tensor& t, uint32_t columns, int bug) {
  const uint64_t width = element_size(t.dtype);
  return encode(map, t.data,
                {t.dtype,
                 2,
                 {uint64_t(t.size[1]), uint64_t(t.size[0])},
                 {width, bug == 23 ? 8 : uint64_t(t.size[1]) * width},
                 {bug == 24 ? 2 * columns : columns, 64},
                 {1, 1},
                 128});
}

}  // namespace

Status planted_reload(Tensor out, int bug) {
  return VTOK_LAUNCH(reload, 1, 128, kStage + 1024, nullptr, static_cast<float*>(out.data), bug);
}

Status planted_sm90(Tensor a, Tensor b, Tensor c, int bug) {
  VTOK_RETURN_IF_ERROR(cuda::use_device(0));
  TensorMap maps[3];
  VTOK_RETURN_IF_ERROR(encode_rows(maps[0], a, 64, bug));
  VTOK_RETURN_IF_ERROR(encode_rows(maps[1], b, 64, 0));
  VTOK_RETURN_IF_ERROR(encode_rows(maps[2], c, 32, 0));
  const dim3 grid(unsigned((a.size[0] + 63) / 64));
  if (a.dtype == DType::bf16)
    return VTOK_LAUNCH(gemm<__nv_bfloat16>, grid, 256, kShared, nullptr, maps[0], maps[1], maps[2],
                       int(a.size[1]), bug);
  return VTOK_LAUNCH(gemm<__half>, grid, 256, kShared, nullptr, maps[0], maps[1], maps[2], int(a.size[1]),
                     bug);
}
