// The entry of the op on a CPU: checks, the plan, and the choice of an algorithm.
#include "cpu/causal_conv3d.h"

#include "cpu/simd/conv_direct.h"

namespace vtok::cpu {

Status causal_conv3d(const ConvProblem& problem) {
  ConvPlan plan;
  VTOK_RETURN_IF_ERROR(make_plan(problem, &plan));
  if (problem.out.numel() == 0) return Status::Ok();
  return conv_direct(problem, plan);
}

const char* causal_conv3d_choice(const ConvProblem&) { return "direct"; }

}  // namespace vtok::cpu
