// The form of the matcher that CUDA runs, on one CPU thread; for tests.
#pragma once

#include "cpu/assign.h"

namespace fastmask {

// As assign_problem; the work between two barriers is done in an order that `seed` scrambles.
int32_t assign_problem_serial(const AssignProblem& problem, const AssignResult& result, uint32_t seed);

}  // namespace fastmask
