// token_packing on a CPU: scores per token, the choice of the highest, and moving kept tokens to a packed
// form and back.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "status.h"
#include "tensor.h"

namespace vtok::cpu {

// Mean |video - reconstruction| of each cell of `frames` x `rows` x `columns` pixels and all channels; frame
// 0 is the whole time of its cells. Both (B, C, T, H, W), float32, bfloat16 or float16, any strides; scores
// float32 (B, t, h, w), contiguous. Each difference is cut to a multiple of 2^-30 and to at most 4096, sums
// are exact and the division is in double: no order of summation shows.
Status router_scores(const Tensor& video, const Tensor& reconstruction, const Tensor& scores, int64_t frames,
                     int64_t rows, int64_t columns, int threads);

// Marks `budget` (int64, per clip, clamped) scores of each row of scores (B, n), contiguous: the highest, NaN
// first, equals by position. With `strictly` those above the (budget + 1)-th highest instead. keep: uint8 (B,
// n), contiguous.
Status select_tokens(const Tensor& scores, const Tensor& budget, const Tensor& keep, bool strictly,
                     int threads);

// mask: uint8 (B, n), contiguous, in all that follows. cu_seqlens: int32 (B + 1).
Status count_tokens(const Tensor& mask, const Tensor& cu_seqlens, int threads);

// Elements of any type are moved as 1, 2, 4 or 8 bytes. tokens (B, C, n), any strides; values (N, C) and
// indices int32 (N), contiguous; rows after the last token are not written.
Status pack_tokens(const Tensor& tokens, const Tensor& mask, const Tensor& values, const Tensor& indices,
                   int threads);

// values (N, C), contiguous; fill: one element; dense (B, C, n) with the channels of a position adjacent.
Status unpack_tokens(const Tensor& values, const Tensor& mask, const Tensor& fill, const Tensor& dense,
                     int threads);

// Rows of pixels whose differences add up column by column. What the kernel sees; steps and rows are in
// elements.
struct ScoreRows {
  DType dtype;
  const void *video, *reconstruction;
  int64_t rows, columns, video_row, video_step, reconstruction_row, reconstruction_step;
};

}  // namespace vtok::cpu

// sums[i] += |video[row, i] - reconstruction[row, i]| of each row, cut as above; exact up to 2048 times from
// 0. NaN stays NaN.
VTOK_DECLARE(void add_differences(const ScoreRows& rows, double* sums))
