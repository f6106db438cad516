// The functions of csrc/cuda/ptx.cuh, as the PTX instruction set defines them.
#pragma once
#include "memory.h"

struct __nv_bfloat16;
struct __half;

namespace vtok::ptx {

using emu::Where;

inline uint32_t smem_base() { return emu::shared_base(); }

template <class T>
T ld_shared(uint32_t address, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  emu::read_shared(&value, address, sizeof(T), sizeof(T), "ld_shared", where, *emu::self);
  return value;
}

template <class T>
void st_shared(uint32_t address, T value, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emu::write_shared(address, &value, sizeof(T), sizeof(T), "st_shared", where, *emu::self);
}

template <class T>
T ld_global(const T* from, Where where = Where::current()) {
  T value;
  emu::read_global(&value, from, sizeof(T), alignof(T), "ld_global", where);
  return value;
}

template <class T>
void st_global(T* to, T value, Where where = Where::current()) {
  emu::write_global(to, &value, sizeof(T), alignof(T), "st_global", where);
}

inline void red_add(float* to, float value, Where where = Where::current()) {
  emu::add_global(to, value, where);
}

// ---- asynchronous copies ----------------------------------------------------------------------------------

template <int Bytes>
void cp_async(uint32_t smem, const void* gmem, bool valid, Where where = Where::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (reinterpret_cast<uintptr_t>(gmem) % Bytes)  // even where it is not read
    emu::fail("misaligned in global memory: cp_async of " + std::to_string(Bytes) + " bytes", where);
  emu::start_copy({emu::self->groups + 1, smem, Bytes, valid ? gmem : nullptr}, where);
}

inline void cp_async_commit() { ++emu::self->groups; }

template <int N>
void cp_async_wait() {
  if (emu::self->groups > N) emu::finish_copies(*emu::self, emu::self->groups - N);
}

// ---- matrices ---------------------------------------------------------------------------------------------

// Each lane reads what it gets, so that a row must be visible to all four lanes among which it is divided.
template <int N>
void ldmatrix(const char* what, uint32_t (&r)[N], uint32_t smem, bool transposed, const Where& where) {
  struct Offer {
    uint32_t address, *r;
  };
  emu::sm90_overwrites(r, N, what, where);
  emu::collective(what, ~0u, Offer{smem, r}, where, [&](Offer** lanes) {
    for (int i = 0; i < N; ++i) {
      int rows_in_banks[8] = {};  // a row fills one of eight groups of four banks; the same row is read once
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = lanes[8 * i + row]->address;
        emu::check_shared(address, 16, 16, what, where);
        bool again = false;
        for (int before = 0; before < row; ++before)
          again = again || lanes[8 * i + before]->address == address;
        rows_in_banks[address / 16 % 8] += !again;
      }
      ++emu::matrices_read;
      emu::bank_conflicts += *std::max_element(rows_in_banks, rows_in_banks + 8) - 1;
      for (int lane = 0; lane < 32; ++lane) {
        emu::Thread& by = emu::cluster.threads[32 * emu::self->warp + lane];
        if (!transposed) {
          emu::read_shared(&lanes[lane]->r[i], lanes[8 * i + lane / 4]->address + 4 * (lane % 4), 4, 4, what,
                           where, by);
          continue;
        }
        for (int e = 0; e < 2; ++e)
          emu::read_shared(reinterpret_cast<uint16_t*>(&lanes[lane]->r[i]) + e,
                           lanes[8 * i + 2 * (lane % 4) + e]->address + 2 * (lane / 4), 2, 2, what, where,
                           by);
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem, Where where = Where::current()) {
  ldmatrix("ldmatrix_x4", r, smem, false, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t smem, Where where = Where::current()) {
  ldmatrix("ldmatrix_x2", r, smem, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem, Where where = Where::current()) {
  ldmatrix("ldmatrix_x4_trans", r, smem, true, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t smem, Where where = Where::current()) {
  ldmatrix("ldmatrix_x2_trans", r, smem, true, where);
}

inline float low(uint32_t bits, __nv_bfloat16) { return __bfloat162float({uint16_t(bits)}); }
inline float low(uint32_t bits, __half) { return __half2float({uint16_t(bits)}); }
// tf32: the lower bits do not count
inline float low(uint32_t bits, float) { return std::bit_cast<float>(bits & ~0x1fffu); }

// d (16 x 8) += a (16 x kK) b (kK x 8), where a 4-byte register holds 4 / sizeof(T) neighbors along k; T
// float means tf32. Sums in float32 in the order of k, which no GPU promises.
template <class T, int kK>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Where& where) {
  struct Offer {
    float* d;
    const uint32_t *a, *b;
  };
  emu::collective(what, ~0u, Offer{d, a, b}, where, [](Offer** lanes) {
    constexpr int kWide = sizeof(T) == 2 ? 2 : 1;
    float left[16][kK], right[8][kK];
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < kWide; ++e) {
        const int g = lane / 4, k = lane % 4 * kWide + e;
        for (int i = 0; i < 4; ++i)
          left[g + 8 * (i % 2)][k + 4 * kWide * (i / 2)] = low(lanes[lane]->a[i] >> 16 * e, T{});
        for (int i = 0; i < 2; ++i) right[g][k + 4 * kWide * i] = low(lanes[lane]->b[i] >> 16 * e, T{});
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < kK; ++k) sum += left[row][k] * right[column][k];
        lanes[lane]->d[i] = sum;
      }
  });
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Where where = Where::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  mma<T, 16>("mma_m16n8k16", d, a, b, where);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Where where = Where::current()) {
  mma<float, 8>("mma_m16n8k8_tf32", d, a, b, where);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

// The lower bits are zero here; a GPU leaves them open.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;
}

}  // namespace vtok::ptx
