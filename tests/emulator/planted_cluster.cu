// c = a b^T in clusters of two blocks of 64 rows: each loads its own rows of a, and half of b for both. a
// comes to the products through registers, c goes by stmatrix and TMA. Right where bug is 0, and with one
// mistake for each other number. a (m, k), b (64, k), c (m, 64), contiguous; words (2 m): 64 per block from
// its peer's shared memory, then for each row of c, read back, whether it begins with 0. m a multiple of 128,
// k of 64.
#include "cuda/ptx_sm90.cuh"

using namespace vtok;

namespace {

constexpr uint32_t kTile = 64 * 128, kStage = 2 * kTile, kBarriers = 2 * kStage, kWords = kBarriers + 64,
                   kShared = kWords + 64 * 4 + 1024;

uint32_t starts_with_0(__nv_bfloat16 value) { return __bfloat162float(value) == 0; }

template <class T>
__global__ void __launch_bounds__(384, 1)
    gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
         const __grid_constant__ TensorMap c, const T* c_again, uint32_t* words, int k, int bug) {
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const uint32_t base = (ptx::smem_base() + 1023) / 1024 * 1024, full = base + kBarriers, empty = full + 16;
  const uint32_t rank = ptx::cluster_rank(), peer = rank ^ 1;
  const int first_row = int(blockIdx.x) * 64;
  if (t == 0) {
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, bug == 4 ? 128 : 256);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(bug == 20 ? reinterpret_cast<const TensorMap*>(c_again) : &a);
  }
  if (t < 64) ptx::st_shared(base + kWords + 4 * t, 1000 * rank + t);
  if (bug == 1 || bug == 16) {
    __syncthreads();
  } else {
    if (bug != 15) ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (t < 64) {
    const uint32_t theirs = ptx::mapa(base + kWords + 4 * t, peer);
    ptx::st_global(words + first_row + t,
                   bug == 14 ? ptx::ld_shared<uint32_t>(theirs) : ptx::ld_shared_cluster<uint32_t>(theirs));
  }

  if (warp < 4) {
    if (bug == 10)
      ptx::setmaxnreg_dec<152>();
    else if (bug != 12 || warp == 0)
      ptx::setmaxnreg_dec<40>();
    if (warp == 0 && ptx::elect_sync())
      for (int step = 0; step * 64 < k; ++step) {
        const int s = step % 2, phase = step / 2 % 2;
        if (bug == 5)
          ptx::mbarrier_wait(empty + 8 * s, phase ^ 1);
        else
          ptx::mbarrier_wait_cluster(empty + 8 * s, phase ^ 1);
        ptx::mbarrier_arrive_expect(full + 8 * s, bug == 2 ? kTile + kTile / 2 : kStage);
        const uint32_t tile = base + s * kStage, half = bug == 3 ? 0 : rank;
        ptx::tma_load(tile, &a, full + 8 * s, {step * 64, first_row});
        ptx::tma_load_multicast(tile + kTile + half * kTile / 2, &b, full + 8 * s,
                                {step * 64, int(half) * 32}, bug == 7 ? 7 : 3);
      }
  } else if (warp < 8) {
    if (bug == 11)
      ptx::setmaxnreg_inc<160>();
    else
      ptx::setmaxnreg_inc<232>();
    float d[32];
    uint32_t fragment[4][4];
    for (int step = 0; step * 64 < k; ++step) {
      const int s = step % 2, phase = step / 2 % 2;
      if (bug == 19)
        ptx::mbarrier_try_wait(full + 8 * s, phase);
      else
        while (!ptx::mbarrier_try_wait(full + 8 * s, phase)) {
        }
      if (bug == 9 && step == 0) ptx::wgmma_fence();
      for (int i = 0; i < 4; ++i)
        ptx::ldmatrix_x4(fragment[i], ptx::swizzled<128>(base + s * kStage, warp % 4 * 16 + lane % 16,
                                                         32 * i + lane / 16 * 16));
      const uint64_t right = ptx::wgmma_descriptor<128>(base + s * kStage + kTile);
      if (bug != 9) ptx::wgmma_fence();
      for (int i = 0; i < 4; ++i) ptx::wgmma_m64k16<T, 64>(d, fragment[i], right + 2 * i, step + i > 0);
      ptx::wgmma_commit();
      if (bug == 8) ptx::ldmatrix_x4(fragment[3], base + s * kStage + 16 * lane);
      ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive(empty + 8 * s);
      if (bug != 4) ptx::mbarrier_arrive_cluster(ptx::mapa(empty + 8 * s, peer));
    }
    // The tile of c lies where the first stage was, as fragments of mma_m16n8k16 lie: the last products have
    // read it.
    ptx::bar_sync<1>(128);
    for (int j = 0; j < 4; ++j) {
      uint32_t packed[4];
      for (int i = 0; i < 4; ++i) {
        const T pair[2] = {ptx::from_float<T>(d[8 * j + 2 * i]), ptx::from_float<T>(d[8 * j + 2 * i + 1])};
        memcpy(&packed[i], pair, 4);
      }
      ptx::stmatrix_x4(ptx::swizzled<128>(base, warp % 4 * 16 + lane % 16, 32 * j + lane / 16 * 16), packed);
    }
    if (bug != 13) ptx::fence_proxy_async();
    ptx::bar_sync<1>(128);
    if (warp == 4) {
      if (ptx::elect_sync()) {
        ptx::tma_store(&c, base, {0, first_row});
        ptx::tma_store_commit();
        if (bug == 17)
          ptx::tma_store_wait_read<0>();
        else if (bug != 18)
          ptx::tma_store_wait<0>();
        for (int row = first_row; row < first_row + 64; ++row)
          ptx::st_global(words + gridDim.x * 64 + row, starts_with_0(ptx::ld_global(c_again + row * 64)));
      }
      if (bug == 18 && lane == 0) ptx::tma_store_wait<0>();
    }
  } else if (bug != 10) {
    ptx::setmaxnreg_dec<40>();
  }
  if (bug != 6 && (bug != 21 || rank == 0)) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

Status encode_rows(TensorMap& map, const Tensor& t, uint32_t rows) {
  const uint64_t bytes = uint64_t(t.size[1]) * 2;
  return encode(
      map, t.data,
      {t.dtype, 2, {uint64_t(t.size[1]), uint64_t(t.size[0])}, {2, bytes}, {64, rows}, {1, 1}, 128});
}

}  // namespace

Status planted_cluster(Tensor a, Tensor b, Tensor c, Tensor words, int bug) {
  VTOK_RETURN_IF_ERROR(cuda::use_device(0));
  TensorMap maps[3];
  VTOK_RETURN_IF_ERROR(encode_rows(maps[0], a, 64));
  VTOK_RETURN_IF_ERROR(encode_rows(maps[1], b, 32));
  VTOK_RETURN_IF_ERROR(encode_rows(maps[2], c, 64));
  using T = __nv_bfloat16;
  return VTOK_LAUNCH_CLUSTER(dim3(2), gemm<T>, unsigned(a.size[0] / 64), 384, kShared, nullptr, maps[0],
                             maps[1], maps[2], static_cast<const T*>(c.data),
                             static_cast<uint32_t*>(words.data), int(a.size[1]), bug);
}
