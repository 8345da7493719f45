// Launches the matcher on a GPU: one block for each problem of a batch, in one launch.
#pragma once

#include <cstdint>

#include "matcher/problem.h"

namespace fastmask {

constexpr int kMaxBatchDims = 6;

// A batch of problems. The strides locate problem i's cost and count by its index over the leading dimensions.
struct AssignLaunch {
  AssignProblem largest;  // N queries and M targets; its cost is the batch's
  int64_t problems;
  int32_t dims;
  int64_t leading[kMaxBatchDims];
  int64_t cost_strides[kMaxBatchDims];   // in elements
  int64_t count_strides[kMaxBatchDims];  // in elements
  const int64_t* counts;                 // or null: all M targets
  AssignResult result;                   // of problem 0; those of the others follow
  int32_t* broken;                       // [problems]
  char* scratch;                         // assign_cuda_plan().scratch_bytes bytes for each problem
  int64_t scratch_bytes;
  bool costs_in_shared;
};

struct AssignPlan {
  int64_t shared_bytes;   // of a block
  int64_t scratch_bytes;  // of a problem, in global memory
  bool costs_in_shared;
  bool fits;  // false if not even the prices fit in shared memory
};

AssignPlan assign_cuda_plan(const AssignProblem& largest, int64_t shared_limit);

// Both return nullptr, or an error message. The current device must be that of the stream. The limit is that of a block
// on the current device; it must be read before a launch there.
const char* assign_cuda_shared_limit(int64_t& bytes);
const char* assign_cuda_launch(const AssignLaunch& launch, const AssignPlan& plan, void* stream);

}  // namespace fastmask
