// causal_conv3d on a CPU: one entry, which chooses between the direct implicit GEMM and Winograd, and the
// bounded cache of transformed weights.
#pragma once
#include "conv_problem.h"
#include "status.h"

namespace vtok::cpu {

enum class Algorithm : int { automatic = 0, direct = 1, winograd2 = 2, winograd4 = 4 };

// x, cache and weight in any layout; residual and out with channel stride 1; bias in float32 or the type of x.
Status causal_conv3d(const ConvProblem& problem, Algorithm algorithm, int threads);

// "direct", "winograd2", "winograd4", or "reference" where ATen is measured to be faster at such shapes.
// Pointers are not read.
const char* causal_conv3d_choice(const ConvProblem& problem, int threads);

struct WeightCacheStats {
  int64_t bytes, bound, entries, hits, misses;
};
void set_weight_cache(int64_t bytes);
void clear_weight_cache();
WeightCacheStats weight_cache_stats();

}  // namespace vtok::cpu
