// What one causal_conv3d call asks for, and the plan that turns every kind of padding, caching, striding and
// upsampling into plain lookups, so that the kernels never branch on a mode and never see a padded copy:
//   - an output frame is a sum over (source frame, set of temporal taps); taps that read the same source
//     frame (a replicated first frame, a frame upsampled in time) are summed in the weights, taps that read
//     zeros do not appear at all;
//   - an output row (column) and a tap give a source row (column), or -1 where they read zeros.
#pragma once
#include <vector>

#include "status.h"
#include "tensor.h"

namespace vtok::cpu {

enum class PadMode : int { zeros = 0, replicate = 1, reflect = 2 };
enum class Activation : int { none = 0, silu = 1 };
enum class Algorithm : int { automatic = 0, direct = 1, winograd2 = 2, winograd4 = 4 };

struct ConvProblem {
  Tensor x;       // (B, C, T, H, W), any strides; all three float types
  Tensor cache;   // (B, C, n, H, W) or absent: the frames before x
  Tensor weight;  // (O, C/groups, kt, kh, kw), any strides, the type of x
  Tensor bias;    // (O) or absent, contiguous, float32 or the type of x
  // the output's shape, or the output's shape before `upsample` (then it is upsampled like x), or absent
  Tensor residual;
  Tensor out;  // (B, O, To, Ho, Wo), channel stride 1
  int stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1};
  int groups = 1;
  int64_t pad[6] = {};  // front, back, top, bottom, left, right; in upsampled frames, rows, columns
  PadMode time_mode = PadMode::zeros, spatial_mode = PadMode::zeros;
  int upsample[3] = {1, 1, 1};  // nearest, before the convolution
  // T frames become 1 + (T-1)*upsample[0]; only where there is no cache
  bool upsample_first_frame_once = false;
  bool has_alpha = false;
  // alpha * residual + (1 - alpha) * activation(conv + bias); without alpha the residual is added
  float alpha = 0;
  Activation activation = Activation::none;
  Algorithm algorithm = Algorithm::automatic;
  int threads = 1;
};

// One term of an output frame: source frame `frame` (in the cache where from_cache) times the sum of the taps
// in `taps` (bit kt of the mask).
struct FrameTap {
  int64_t frame;
  bool from_cache;
  int variant;  // index into ConvPlan::variants
};

struct ConvPlan {
  int64_t batch, channels, out_channels;
  int64_t T, H, W;     // input
  int64_t To, Ho, Wo;  // output
  int kt, kh, kw;
  // To + 1 offsets into frame_taps. A frame may have no term at all: its convolution is zero.
  std::vector<int64_t> frame_begin;
  std::vector<FrameTap> frame_taps;
  std::vector<uint64_t> variants;  // distinct sets of temporal taps that must be summed, as bit masks
  std::vector<int32_t> rows;       // [Ho][kh] source row or -1
  std::vector<int32_t> cols;       // [Wo][kw] source column or -1
  // Where the residual is read: [To], [Ho], [Wo].
  std::vector<int64_t> residual_frame;
  std::vector<int32_t> residual_row, residual_col;

  int64_t macs() const;  // multiply-accumulates of the direct sum over this plan (per whole batch)
};

// Checks shapes (clear messages; Python has checked the same for its users) and fills the plan.
Status make_plan(const ConvProblem& problem, ConvPlan* plan);

}  // namespace vtok::cpu
