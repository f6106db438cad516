// The plan of a causal_conv3d call on a CPU, which turns every kind of padding, caching, striding and
// upsampling into plain lookups, so that the kernels never branch on a mode and never see a padded copy:
//   - an output frame is a sum over (source frame, set of temporal taps); taps that read the same source
//     frame (a replicated first frame, a frame upsampled in time) are summed in the weights, taps that read
//     zeros do not appear at all;
//   - an output row (column) and a tap give a source row (column), or -1 where they read zeros.
#pragma once
#include <vector>

#include "conv_problem.h"
#include "status.h"

namespace vtok::cpu {

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
  int threads;  // at most so many work on it
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
Status make_plan(const ConvProblem& problem, int threads, ConvPlan* plan);

}  // namespace vtok::cpu
