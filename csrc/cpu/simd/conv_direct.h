// The direct convolution as one implicit GEMM: rows are output pixels, columns output channels, and the inner
// dimension runs over (source frame, row tap, column tap, input channel). The job below is the same for every
// instruction set; it holds plain pointers only (see vec.h for why the kernels see no std:: templates).
// conv_direct.cpp of the parent folder fills it.
#pragma once
#include "cpu/conv_plan.h"
#include "cpu/isa.h"

namespace vtok::cpu {

// Rows or columns. Output index i is of phase i % phases. Under nearest upsampling each phase reads every
// source index through a contiguous group of taps, which are summed in the weights: a 3x3 kernel on a frame
// upsampled by 2 has 2x2 taps per phase.
struct DirectAxis {
  int64_t out;
  int phases, max_taps;
  const int* taps;  // [phases] number of groups
  // [phases][max_taps + 1]: group j holds the kernel's taps begin[j] .. begin[j + 1] - 1
  const int* begin;
  const int32_t* source;  // [out][max_taps] or -1
  // [phases][max_taps]: for the outputs number lo .. hi - 1 of the phase, source = first + (number - lo) *
  // step.
  struct Affine {
    int64_t lo, hi, first;
    int step;
  };
  const Affine* affine;
  int64_t count(int phase) const { return (out - phase + phases - 1) / phases; }
};

struct DirectTerm {
  const char* base;       // the source frame of batch item 0, in x or in the cache
  const int64_t* stride;  // of that tensor
  int slot;               // which summed temporal taps: slot_mask[slot]
};

// Output frames whose terms use the same slots in the same order.
struct DirectPattern {
  const int32_t* frames;
  int64_t count;
  int terms;
};

struct DirectRegion {  // all pixels of one pattern and one phase
  int pattern, row_phase, col_phase;
  int64_t pixels;
};

struct DirectJob {
  const ConvProblem* problem;
  const ConvPlan* plan;
  int64_t channels, out_channels;  // of one group
  int slots;
  const uint64_t* slot_mask;
  const int64_t* term_begin;  // [To + 1]
  const DirectTerm* terms;
  DirectAxis row, col;
  const DirectPattern* patterns;
  const DirectRegion* regions;
  int64_t region_count;
};

// Prepares the job from the plan and runs it on the active instruction set.
Status conv_direct(const ConvProblem& problem, const ConvPlan& plan);

// Outputs of one batch item: frames, rows, columns.
struct OutputBox {
  int64_t batch;
  int64_t begin[3], end[3];
};
// The same for some of the outputs.
Status conv_direct(const ConvProblem& problem, const ConvPlan& plan, const OutputBox& box);

}  // namespace vtok::cpu

VTOK_DECLARE(bool run_direct(const DirectJob& job))  // false where memory is short
