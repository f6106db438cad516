// Host side of the convolutions on a GPU: checks, the tables of the problem that every kernel takes, and
// scratch memory.
#pragma once
#include <functional>
#include <vector>

#include "cuda/causal_conv3d/epilogue.cuh"
#include "cuda/launch.cuh"

namespace vtok::cuda {

// Hands out pieces of the caller's scratch memory of *bytes; where there are too few it only counts.
class Workspace {
 public:
  Workspace(void* base, int64_t* bytes)
      : base_(static_cast<char*>(base)), bytes_(bytes), room_(base ? *bytes : 0) {}
  template <class T = char>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(base_ + at);
  }
  // Writes the need to *bytes; true where the room does not suffice, and nothing may be launched.
  bool only_counts() const {
    *bytes_ = used_;
    return !base_ || used_ > room_;
  }

 private:
  char* base_;
  int64_t *bytes_, room_, used_ = 0;
};

constexpr int kMaxMergedTaps = 8;

struct WeightView {  // element strides; negative where a tap is mirrored, and then `data` is the last tap
  const void* data;
  int64_t group, n, channel, tap[3];
};

// The weights as the kernels read them, [groups * outputs][kt][k_frame], k_frame = (plane tap, channel) and
// zeros up to whole slices; and the bias in float32. One launch per call, at a cost of one read and one write
// of the weights: the kernels never see a stale copy.
struct RelaidWeight {
  WeightView from;
  int groups, outputs, channels;
  int taps[3], kernel[3];  // the weight's own, and as the kernels see them: fewer where taps are merged
  int k_frame;
  // depth-to-space: kernel channel n is row n % phase_channels * phases + n / phase_channels
  int phases, phase_channels;
  const void* bias;  // or null
  // Where `folded`: tap i of an axis is the sum of the weight's own taps tap_begin[axis][i] to
  // tap_begin[axis][i + 1] - 1.
  bool folded;
  int8_t tap_begin[3][kMaxMergedTaps + 1];
};
Status relay_weight(const RelaidWeight& w, DType dtype, void* to, float* bias_to, void* stream);

// A source of `length` (upsampled) coordinates for outputs of `out`, everything of the forward call but
// dgrad's changes.
Status make_source(const ConvProblem& p, Source* source);

// Fills the pointers, strides and the unit of reading x (and the cache) and tells whether 16-byte chunks of
// channels can be read.
bool bind_source(const Tensor& x, const Tensor& cache, int groups, Source* source);

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The convolution that forward and dgrad share. `source` is bound; `weight.data` may be null where only
// scratch is counted.
struct ConvTask {
  Source source;
  bool chunks;  // 16-byte chunks of channels can be read
  Epilogue epilogue;
  RelaidWeight weight;
  DType dtype;     // of the output, and of the weights as they come
  DType operands;  // what the kernel multiplies: that, or e4m3
  bool tf32;
};
// The task as several with fewer taps, where taps read the same elements (an upsampled input, a single
// replicated frame).
std::vector<ConvTask> merge_taps(const ConvTask& task);

// What sm80 and sm90 share of a call: forward.cu and dgrad.cu check it, make the tasks, and leave each to `run`,
// which only counts its scratch memory where the workspace only counts.
using RunTask = std::function<Status(ConvTask&, Workspace&)>;
Status run_forward(const RunTask& run, const ConvProblem& problem, void* workspace, int64_t* workspace_bytes);
Status run_dgrad(const RunTask& run, const ConvProblem& problem, const Tensor& grad, const Tensor& grad_x,
                 const Tensor& grad_cache, void* workspace, int64_t* workspace_bytes, void* stream);

}  // namespace vtok::cuda
