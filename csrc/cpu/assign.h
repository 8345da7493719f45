// The best matching of one problem's queries and targets.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "matcher/problem.h"

namespace fastmask {

constexpr int64_t kMaxAssignShortSide = 65535;   // a bid keeps its person in 16 bits
constexpr int64_t kMaxAssignLongSide = 1048575;  // float64 searches keep an object in 20 bits

struct AssignWorkspace {
  matcher::ProblemMemory problem;
  double* copy;  // [queries * targets], of costs in half precision or contiguous along neither side

  void lay_out(Carver& carver, int64_t queries, int64_t targets) {
    problem.lay_out(carver, static_cast<int32_t>(queries), static_cast<int32_t>(targets), kMostLanes);
    carver.take(copy, queries * targets);
  }
};

// Among the matchings with the fewest pairs of NaN or infinite cost, finds the one with the smallest total of the other
// costs; returns the number of such pairs. Duals: cost >= query dual + target dual for every finite pair, equal on the
// matching; the duals of the longer side are at most 0, and 0 where unmatched. NaN if a pair is not finite.
FASTMASK_KERNEL(int32_t assign_problem(const AssignProblem& problem, const AssignWorkspace& work,
                                       const AssignResult& result))

}  // namespace fastmask
