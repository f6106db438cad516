#include "cpu/token_packing.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

namespace vtok::cpu {
namespace {

constexpr int64_t kSerialBytes = 256 * 1024;  // below which waking another thread costs more than it saves
constexpr int64_t kChunk = 1024;              // positions per task of packing and unpacking
constexpr int64_t kPiece = 128 * 1024;        // bytes of one plane that are read in one go
constexpr int64_t kExactAdditions = 2048;     // of values up to 2^12 in steps of 2^-30, from 0, in a double

bool contiguous(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t step = 1;
  for (int i = t.rank; i-- > 0; step *= t.size[i])
    if (t.size[i] != 1 && t.stride[i] != step) return false;
  return true;
}

bool same(const Tensor& t, DType dtype, std::initializer_list<int64_t> sizes) {
  return t.dtype == dtype && t.rank == static_cast<int>(sizes.size()) &&
         std::equal(sizes.begin(), sizes.end(), t.size);
}

Status check_mask(const Tensor& mask, const char* name) {
  const bool good =
      mask.dtype == DType::u8 && mask.rank == 2 && contiguous(mask) && mask.numel() < int64_t(1) << 31;
  return good ? Status::Ok()
              : Status::Invalid(std::string(name) + ": expected contiguous uint8 (B, n) with B n < 2**31");
}

// ---- scores -----------------------------------------------------------------------------------------------

// A video as rows of adjacent columns: the channels count as columns where they are innermost in both.
struct Rows {
  const char* data;
  int64_t width, batch, channel, frame, row, column;

  Rows(const Tensor& t, bool channels_inside)
      : data(static_cast<const char*>(t.data)), width(element_size(t.dtype)), batch(t.stride[0]),
        channel(t.stride[1]), frame(t.stride[2]), row(t.stride[3]),
        column(channels_inside ? 1 : t.stride[4]) {}
};

bool channels_inside(const Tensor& t) { return t.stride[1] == 1 && t.stride[4] == t.size[1]; }

// The mean absolute difference of every token. A task is a band of rows of tokens: it reads pieces of kPiece adjacent
// bytes, frame by frame and channel by channel, and sums them in whole numbers, so that no order matters.
class Scores {
 public:
  Scores(const Tensor& video, const Tensor& reconstruction, const Tensor& scores, int64_t frames,
         int64_t rows, int64_t columns)
      : inside_(channels_inside(video) && channels_inside(reconstruction)), a_(video, inside_),
        b_(reconstruction, inside_), dtype_(video.dtype), channels_(inside_ ? 1 : video.size[1]),
        frames_(frames), rows_(rows), step_(inside_ ? columns * video.size[1] : columns), t_(scores.size[1]),
        h_(scores.size[2]), w_(scores.size[3]),
        band_(std::clamp<int64_t>(kPiece / (rows * w_ * step_ * a_.width), 1, h_)),
        bands_((h_ + band_ - 1) / band_), at_most_(std::max<int64_t>(1, kExactAdditions / step_)),
        to_(static_cast<float*>(scores.data)) {}

  struct Memory {  // of a thread
    std::vector<double> sums;
    std::vector<int64_t> totals;
    std::vector<char> nan;
    explicit Memory(const Scores& s)
        : sums(s.band_ * s.w_ * s.step_), totals(s.band_ * s.w_), nan(s.band_ * s.w_) {}
  };

  int64_t tasks_of_item() const { return t_ * bands_; }

  void run(int64_t task, Memory& memory) const {
    const int64_t first = task % bands_ * band_, last = std::min(first + band_, h_);
    const int64_t group = task / bands_ % t_, batch = task / bands_ / t_, tokens = (last - first) * w_;
    // The first frame is a group of its own.
    const int64_t begin = group ? 1 + (group - 1) * frames_ : 0, depth = group ? frames_ : 1;
    std::fill(memory.sums.begin(), memory.sums.end(), 0.0);
    std::fill(memory.totals.begin(), memory.totals.end(), 0);
    std::fill(memory.nan.begin(), memory.nan.end(), 0);
    int64_t added = 0;
    for (int64_t f = begin; f < begin + depth; ++f)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t r = 0, count; r < rows_; r += count) {
          count = std::min(rows_ - r, at_most_);
          if (added + count > at_most_) {
            flush(tokens, memory);
            added = 0;
          }
          added += count;
          for (int64_t y = first; y < last; ++y) {
            auto at = [&](const Rows& v) {
              return v.data +
                     (batch * v.batch + f * v.frame + c * v.channel + (y * rows_ + r) * v.row) * v.width;
            };
            const ScoreRows block{dtype_, at(a_),    at(b_), count,    w_ * step_,
                                  a_.row, a_.column, b_.row, b_.column};
            VTOK_DISPATCH(add_differences(block, memory.sums.data() + (y - first) * w_ * step_));
          }
        }
    flush(tokens, memory);
    const double divisor = static_cast<double>(channels_ * depth * rows_ * step_) * 0x1p30;
    float* to = to_ + ((batch * t_ + group) * h_ + first) * w_;
    for (int64_t i = 0; i < tokens; ++i)
      to[i] = memory.nan[i] ? std::numeric_limits<float>::quiet_NaN()
                            : static_cast<float>(static_cast<double>(memory.totals[i]) / divisor);
  }

 private:
  // Moves the sums into the totals, before an addition to them could round.
  void flush(int64_t tokens, Memory& memory) const {
    for (int64_t x = 0; x < tokens; ++x)
      for (int64_t i = 0; i < step_; i += kExactAdditions) {
        double part = 0;
        for (int64_t k = i; k < std::min(step_, i + kExactAdditions); ++k) part += memory.sums[x * step_ + k];
        if (part == part)
          memory.totals[x] += static_cast<int64_t>(part * 0x1p30);
        else
          memory.nan[x] = 1;
      }
    std::fill(memory.sums.begin(), memory.sums.end(), 0.0);
  }

  const bool inside_;
  const Rows a_, b_;
  const DType dtype_;
  const int64_t channels_, frames_, rows_, step_;  // step: columns of a row of a token
  const int64_t t_, h_, w_, band_, bands_;
  const int64_t
      at_most_;  // rows of pixels that a sum takes: with their columns, as many additions as stay exact
  float* const to_;
};

}  // namespace

Status router_scores(const Tensor& video, const Tensor& reconstruction, const Tensor& scores, int64_t frames,
                     int64_t rows, int64_t columns, int threads) {
  if (!is_float(video.dtype) || video.rank != 5)
    return Status::Invalid("video: expected float32, bfloat16 or float16 (B, C, T, H, W)");
  if (!same(reconstruction, video.dtype,
            {video.size[0], video.size[1], video.size[2], video.size[3], video.size[4]}))
    return Status::Invalid("reconstruction: expected the type and sizes of video");
  if (frames < 1 || rows < 1 || columns < 1 || video.size[1] < 1 || video.size[2] < 1 ||
      (video.size[2] - 1) % frames || video.size[3] % rows || video.size[4] % columns)
    return Status::Invalid("grid: must divide the sizes of video");
  const int64_t t = 1 + (video.size[2] - 1) / frames, h = video.size[3] / rows, w = video.size[4] / columns;
  if (!same(scores, DType::f32, {video.size[0], t, h, w}) || !contiguous(scores))
    return Status::Invalid("scores: expected contiguous float32 (B, t, h, w)");
  if (scores.numel() == 0) return Status::Ok();
  if (threads < 1 || video.numel() * element_size(video.dtype) < kSerialBytes) threads = 1;
  const Scores work(video, reconstruction, scores, frames, rows, columns);
  std::vector<Scores::Memory> memory(threads, Scores::Memory(work));
  parallel_for(scores.size[0] * work.tasks_of_item(), threads,
               [&](int64_t task, int thread) { work.run(task, memory[thread]); });
  return Status::Ok();
}

// ---- selection --------------------------------------------------------------------------------------------

namespace {

// A number per score in their order: NaN above all, -0 as 0.
uint32_t key(uint32_t bits, uint32_t infinity) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > infinity) return 0xffffffffu;
  return bits >> 31 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

void keys_of(const void* scores, DType dtype, int64_t n, uint32_t* keys) {
  if (dtype == DType::f32) {
    const auto* from = static_cast<const uint32_t*>(scores);
    for (int64_t i = 0; i < n; ++i) keys[i] = key(from[i], 0x7f800000u);
  } else {
    const auto* from = static_cast<const uint16_t*>(scores);
    const uint32_t infinity = dtype == DType::bf16 ? 0x7f800000u : 0x7c000000u;
    for (int64_t i = 0; i < n; ++i) keys[i] = key(uint32_t(from[i]) << 16, infinity);
  }
}

// The k-th largest key (k from 1), and how many are larger: digits of 11, 11 and 10 bits from the top, each
// by a histogram.
uint32_t kth_largest(const uint32_t* keys, int64_t n, int64_t k, int64_t* larger) {
  uint32_t prefix = 0, known = 0;
  *larger = 0;
  for (int shift : {21, 10, 0}) {
    const uint32_t digits = shift ? 2048 : 1024;
    int64_t histogram[2048] = {};
    for (int64_t i = 0; i < n; ++i)
      if ((keys[i] & known) == prefix) ++histogram[keys[i] >> shift & (digits - 1)];
    uint32_t digit = digits - 1;
    while (*larger + histogram[digit] < k) *larger += histogram[digit--];
    prefix |= digit << shift;
    known |= (digits - 1) << shift;
  }
  return prefix;
}

}  // namespace

Status select_tokens(const Tensor& scores, const Tensor& budget, const Tensor& keep, bool strictly,
                     int threads) {
  VTOK_RETURN_IF_ERROR(check_mask(keep, "keep"));
  const int64_t clips = keep.size[0], n = keep.size[1];
  if (!is_float(scores.dtype) || !same(scores, scores.dtype, {clips, n}) || !contiguous(scores))
    return Status::Invalid("scores: expected contiguous float32, bfloat16 or float16 of keep's sizes");
  if (!same(budget, DType::i64, {clips}) || !contiguous(budget))
    return Status::Invalid("budget: expected contiguous int64 (B)");
  if (keep.numel() == 0) return Status::Ok();
  if (threads < 1 || keep.numel() < kSerialBytes / 16) threads = 1;
  std::vector<std::vector<uint32_t>> buffers(threads, std::vector<uint32_t>(n));
  parallel_for(clips, threads, [&](int64_t clip, int thread) {
    auto* mask = static_cast<uint8_t*>(keep.data) + clip * n;
    const int64_t count = std::clamp<int64_t>(static_cast<const int64_t*>(budget.data)[clip], 0, n);
    if (count == n || (count == 0 && !strictly)) {
      std::memset(mask, count == n, n);
      return;
    }
    uint32_t* keys = buffers[thread].data();
    keys_of(static_cast<const char*>(scores.data) + clip * n * element_size(scores.dtype), scores.dtype, n,
            keys);
    int64_t larger;
    const uint32_t bound = kth_largest(keys, n, strictly ? count + 1 : count, &larger);
    if (strictly) {
      for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] > bound;
    } else {
      int64_t ties = count - larger;
      for (int64_t i = 0; i < n; ++i) {
        const bool tie = keys[i] == bound && ties > 0;
        mask[i] = keys[i] > bound || tie;
        ties -= tie;
      }
    }
  });
  return Status::Ok();
}

// ---- moving -----------------------------------------------------------------------------------------------

namespace {

int64_t count(const uint8_t* mask, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n;) {
    uint32_t part = 0;
    for (const int64_t end = std::min(n, i + kChunk); i < end; ++i) part += mask[i] != 0;
    sum += part;
  }
  return sum;
}

// Where the rows of each chunk of positions begin; one more for the end.
std::vector<int64_t> chunk_rows(const Tensor& mask, int threads) {
  const int64_t n = mask.size[1], chunks = (n + kChunk - 1) / kChunk;
  std::vector<int64_t> rows(mask.size[0] * chunks + 1);
  const auto* data = static_cast<const uint8_t*>(mask.data);
  parallel_for(mask.size[0], mask.numel() < kSerialBytes ? 1 : threads, [&](int64_t clip, int) {
    for (int64_t i = 0; i < chunks; ++i)
      rows[clip * chunks + i + 1] = count(data + clip * n + i * kChunk, std::min(kChunk, n - i * kChunk));
  });
  for (size_t i = 1; i < rows.size(); ++i) rows[i] += rows[i - 1];
  return rows;
}

// fn(the constant number of bytes, or 0): a copy of known size is a few instructions, else it is a call.
template <class F>
void with_row_size(int64_t bytes, F&& fn) {
  switch (bytes) {
    case 1: return fn(std::integral_constant<int64_t, 1>());
    case 2: return fn(std::integral_constant<int64_t, 2>());
    case 4: return fn(std::integral_constant<int64_t, 4>());
    case 8: return fn(std::integral_constant<int64_t, 8>());
    case 10: return fn(std::integral_constant<int64_t, 10>());
    case 12: return fn(std::integral_constant<int64_t, 12>());
    case 16: return fn(std::integral_constant<int64_t, 16>());
    case 20: return fn(std::integral_constant<int64_t, 20>());
    case 24: return fn(std::integral_constant<int64_t, 24>());
    case 32: return fn(std::integral_constant<int64_t, 32>());
    case 64: return fn(std::integral_constant<int64_t, 64>());
    default: return fn(std::integral_constant<int64_t, 0>());
  }
}

// Channels apart: a few tokens at a time, so that their rows stay in the first-level cache while the channels
// come in.
template <class T>
void gather_channels(const T* from, int64_t channels, int64_t channel, int64_t position,
                     const int32_t* indices, int64_t count, T* to) {
  const int64_t block = std::max<int64_t>(16, 16384 / std::max<int64_t>(1, channels * sizeof(T)));
  for (int64_t k = 0; k < count; k += block)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = k; i < std::min(count, k + block); ++i)
        to[i * channels + c] = from[c * channel + indices[i] * position];
}

}  // namespace

Status count_tokens(const Tensor& mask, const Tensor& cu_seqlens, int threads) {
  VTOK_RETURN_IF_ERROR(check_mask(mask, "mask"));
  if (!same(cu_seqlens, DType::i32, {mask.size[0] + 1}) || !contiguous(cu_seqlens))
    return Status::Invalid("cu_seqlens: expected contiguous int32 (B + 1)");
  auto* to = static_cast<int32_t*>(cu_seqlens.data);
  const int64_t n = mask.size[1];
  parallel_for(mask.size[0], mask.numel() < kSerialBytes ? 1 : threads, [&](int64_t clip, int) {
    to[clip + 1] = static_cast<int32_t>(count(static_cast<const uint8_t*>(mask.data) + clip * n, n));
  });
  to[0] = 0;
  for (int64_t clip = 0; clip < mask.size[0]; ++clip) to[clip + 1] += to[clip];
  return Status::Ok();
}

Status pack_tokens(const Tensor& tokens, const Tensor& mask, const Tensor& values, const Tensor& indices,
                   int threads) {
  VTOK_RETURN_IF_ERROR(check_mask(mask, "mask"));
  if (tokens.rank != 3 || tokens.size[0] != mask.size[0] || tokens.size[2] != mask.size[1])
    return Status::Invalid("tokens: expected (B, C, n) for the mask's (B, n)");
  const int64_t channels = tokens.size[1], n = mask.size[1], chunks = (n + kChunk - 1) / kChunk;
  if (!same(values, tokens.dtype, {values.size[0], channels}) || !contiguous(values))
    return Status::Invalid("values: expected contiguous (N, C) of the type of tokens");
  if (!same(indices, DType::i32, {values.size[0]}) || !contiguous(indices))
    return Status::Invalid("indices: expected contiguous int32 (N)");
  if (mask.numel() == 0) return Status::Ok();
  const int64_t width = element_size(tokens.dtype), bytes = channels * width;
  if (threads < 1 || tokens.numel() * width < kSerialBytes) threads = 1;
  const std::vector<int64_t> rows = chunk_rows(mask, threads);
  if (rows.back() > values.size[0])
    return Status::Invalid("values: room for " + std::to_string(values.size[0]) + " tokens, of " +
                           std::to_string(rows.back()));
  advise_huge_pages(values);
  const int64_t channel = tokens.stride[1], position = tokens.stride[2];
  with_row_size(channels == 1 || channel == 1 ? bytes : 0, [&](auto size) {
    parallel_for(tokens.size[0] * chunks, threads, [&](int64_t task, int) {
      const int64_t clip = task / chunks, first = task % chunks * kChunk, row = rows[task],
                    found = rows[task + 1] - row;
      const auto* keep = static_cast<const uint8_t*>(mask.data) + clip * n + first;
      int32_t kept[kChunk + 1];
      const int32_t end = static_cast<int32_t>(std::min(kChunk, n - first));
      for (int32_t i = 0, k = 0; i < end; ++i) {  // no branch to mispredict
        kept[k] = static_cast<int32_t>(first) + i;
        k += keep[i] != 0;
      }
      if (found == 0) return;  // where nothing at all is kept, the outputs are empty and their pointers null
      std::memcpy(static_cast<int32_t*>(indices.data) + row, kept, found * sizeof(int32_t));
      if (channels == 0) return;
      const char* from = static_cast<const char*>(tokens.data) + clip * tokens.stride[0] * width;
      char* to = static_cast<char*>(values.data) + row * bytes;
      if (channels == 1 || channel == 1) {
        const int64_t copied = size ? int64_t(size) : bytes;
        for (int64_t k = 0; k < found; ++k)
          std::memcpy(to + k * copied, from + kept[k] * position * width, copied);
        return;
      }
      auto gather = [&](auto element) {
        using T = decltype(element);
        gather_channels(reinterpret_cast<const T*>(from), channels, channel, position, kept, found,
                        reinterpret_cast<T*>(to));
      };
      switch (width) {
        case 1: return gather(uint8_t());
        case 2: return gather(uint16_t());
        case 4: return gather(uint32_t());
        default: return gather(uint64_t());
      }
    });
  });
  return Status::Ok();
}

Status unpack_tokens(const Tensor& values, const Tensor& mask, const Tensor& fill, const Tensor& dense,
                     int threads) {
  VTOK_RETURN_IF_ERROR(check_mask(mask, "mask"));
  if (dense.rank != 3 || dense.size[0] != mask.size[0] || dense.size[2] != mask.size[1])
    return Status::Invalid("dense: expected (B, C, n) for the mask's (B, n)");
  const int64_t channels = dense.size[1], n = mask.size[1], chunks = (n + kChunk - 1) / kChunk;
  if (!same(values, dense.dtype, {values.size[0], channels}) || !contiguous(values))
    return Status::Invalid("values: expected contiguous (N, C) of the type of dense");
  if (!fill || fill.dtype != dense.dtype || fill.numel() != 1)
    return Status::Invalid("fill: expected one element of the type of values");
  if (dense.numel() == 0) return Status::Ok();
  if ((channels > 1 && dense.stride[1] != 1) || (n > 1 && dense.stride[2] != channels) ||
      (dense.size[0] > 1 && dense.stride[0] != n * channels))
    return Status::Invalid("dense: expected the channels of a position adjacent");
  const int64_t width = element_size(dense.dtype), bytes = channels * width;
  if (threads < 1 || dense.numel() * width < kSerialBytes) threads = 1;
  const std::vector<int64_t> rows = chunk_rows(mask, threads);
  if (rows.back() > values.size[0])
    return Status::Invalid("packed.mask: keeps " + std::to_string(rows.back()) + " positions, of " +
                           std::to_string(values.size[0]) + " values");
  advise_huge_pages(dense);
  const std::unique_ptr<char[]> empty(new char[bytes]);
  for (int64_t c = 0; c < channels; ++c) std::memcpy(empty.get() + c * width, fill.data, width);
  with_row_size(bytes, [&](auto size) {
    parallel_for(dense.size[0] * chunks, threads, [&](int64_t task, int) {
      const int64_t first = task / chunks * n + task % chunks * kChunk,
                    positions = std::min(kChunk, n - task % chunks * kChunk);
      const int64_t copied = size ? int64_t(size) : bytes;
      const auto* keep = static_cast<const uint8_t*>(mask.data) + first;
      const char* from = static_cast<const char*>(values.data) + rows[task] * bytes;
      char* to = static_cast<char*>(dense.data) + first * bytes;
      for (int64_t i = 0; i < positions; ++i, to += copied) {
        std::memcpy(to, keep[i] ? from : empty.get(), copied);
        from += keep[i] ? copied : 0;
      }
    });
  });
  return Status::Ok();
}

}  // namespace vtok::cpu
