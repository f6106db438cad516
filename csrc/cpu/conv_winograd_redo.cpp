// The tiles that Winograd convolution leaves to the direct one, joined to boxes: a call of the direct convolution
// packs the weights, which costs about as much as kPackingPixels outputs.
#include <algorithm>

#include "cpu/conv_winograd_schedule.h"
#include "cpu/simd/conv_direct.h"

namespace vtok::cpu {
namespace {

constexpr int64_t kPackingPixels = 32;
constexpr size_t kMostBoxes = 64;

int64_t cost(const OutputBox& b) {
  int64_t pixels = 1;
  for (int i = 0; i < 3; ++i) pixels *= b.end[i] - b.begin[i];
  return pixels + kPackingPixels;
}

OutputBox around(const OutputBox& a, const OutputBox& b) {
  OutputBox both = a;
  for (int i = 0; i < 3; ++i) {
    both.begin[i] = std::min(a.begin[i], b.begin[i]);
    both.end[i] = std::max(a.end[i], b.end[i]);
  }
  return both;
}

// Adds a box, joined with all those whose union with it is cheaper than both.
void add(std::vector<OutputBox>& boxes, OutputBox box) {
  for (size_t i = 0; i < boxes.size();) {
    const OutputBox both = around(boxes[i], box);
    if (boxes[i].batch != box.batch || cost(both) > cost(boxes[i]) + cost(box)) {
      ++i;
      continue;
    }
    box = both;
    boxes[i] = boxes.back();
    boxes.pop_back();
    i = 0;
  }
  boxes.push_back(box);
}

}  // namespace

Status redo_directly(const ConvProblem& p, const ConvPlan& plan, int m, const Terms& terms,
                     const std::vector<uint8_t>& uneven, std::vector<uint8_t>& broken) {
  auto any = [](const std::vector<uint8_t>& marks) {
    return std::find(marks.begin(), marks.end(), 1) != marks.end();
  };
  if (!any(uneven) && !any(broken)) return Status::Ok();
  const int64_t tiles = tile_count(plan, m), across = ceil_div(plan.Wo, m);
  const int64_t sources = int64_t(uneven.size()) / (plan.batch * tiles);
  std::vector<OutputBox> boxes;
  for (int64_t b = 0; b < plan.batch; ++b)
    for (int64_t t = 0; t < plan.To; ++t) {
      uint8_t* marks = &broken[(b * plan.To + t) * tiles];
      for (const auto& term : terms.frames[t]) {
        const uint8_t* of_source = &uneven[(b * sources + term.source) * tiles];
        for (int64_t i = 0; i < tiles; ++i) marks[i] |= of_source[i];
      }
      for (int64_t i = 0; i < tiles; ++i) {
        if (!marks[i]) continue;
        const int64_t top = i / across * m, left = i % across * m;
        add(boxes, {b, {t, top, left}, {t + 1, std::min(top + m, plan.Ho), std::min(left + m, plan.Wo)}});
        if (boxes.size() > kMostBoxes) return conv_direct(p, plan);
      }
    }
  int64_t parts = 0;
  for (const OutputBox& box : boxes) parts += cost(box);
  if (parts >= plan.batch * plan.To * plan.Ho * plan.Wo + kPackingPixels) return conv_direct(p, plan);
  for (const OutputBox& box : boxes) VTOK_RETURN_IF_ERROR(conv_direct(p, plan, box));
  return Status::Ok();
}

}  // namespace vtok::cpu
