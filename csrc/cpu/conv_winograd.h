// Winograd convolution on a CPU, F(m x m, 3 x 3) with m = 2 or 4. See simd/conv_winograd.h for the algorithm.
#pragma once
#include "cpu/conv_plan.h"

namespace vtok::cpu {

// 3x3 taps in the plane at stride 1 and dilation 1, one group. Time may do as it likes.
bool winograd_can_run(const ConvProblem& problem, const ConvPlan& plan, int m);
Status conv_winograd(const ConvProblem& problem, const ConvPlan& plan, int m);
// A rough estimate, for comparing algorithms; counts the weight transform where the cache will not hold its
// result.
double winograd_seconds(const ConvProblem& problem, const ConvPlan& plan, int m);

}  // namespace vtok::cpu
