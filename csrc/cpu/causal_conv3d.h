// causal_conv3d on a CPU: one entry, which chooses between the direct implicit GEMM and Winograd, and the
// bounded cache of transformed weights.
#pragma once
#include "cpu/conv_problem.h"

namespace vtok::cpu {

Status causal_conv3d(const ConvProblem& problem);

// "direct", "winograd2", "winograd4", or "reference" where ATen is measured to be faster at such shapes.
const char* causal_conv3d_choice(const ConvProblem& problem);

struct WeightCacheStats {
  int64_t bytes, bound, entries, hits, misses;
};
void set_weight_cache(int64_t bytes);
void clear_weight_cache();
WeightCacheStats weight_cache_stats();

}  // namespace vtok::cpu
