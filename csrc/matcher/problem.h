// A problem of queries and targets: which side are the persons, the memory that it takes, and where the results go.
#pragma once

#include "matcher/assign.h"

namespace fastmask {

using AssignDtype = Dtype;

struct AssignProblem {
  const void* cost;
  AssignDtype dtype;
  int64_t query_stride, target_stride;  // in elements
  int32_t queries, targets;
};

struct AssignResult {
  int64_t* query_of_target;  // [targets]; -1 for targets beyond the queries
  double* query_duals;       // [queries], or null
  double* target_duals;      // [targets], or null
};

namespace matcher {

struct ProblemMemory {
  State state;
  Duals duals;

  // The sizes of a problem's state. Rows are rounded up to a multiple of `alignment`, or to an odd number if that is 1.
  FASTMASK_HOST_DEVICE void resize(int32_t queries, int32_t targets, int32_t alignment) {
    state.persons = queries < targets ? queries : targets;
    state.objects = queries < targets ? targets : queries;
    state.stride = alignment == 1 ? state.objects | 1 : static_cast<int32_t>(round_up(state.objects, alignment));
  }

  FASTMASK_HOST_DEVICE void lay_out_costs(Carver& carver) {
    carver.take(state.costs, static_cast<int64_t>(state.persons) * state.stride);
  }

  void lay_out(Carver& carver, int32_t queries, int32_t targets, int32_t alignment) {
    resize(queries, targets, alignment);
    lay_out_costs(carver);
    state.lay_out(carver);
    duals.lay_out(carver, state);
    duals.exact.lay_out(carver, state);
  }
};

template <class Group>
FASTMASK_GROUP_FN Costs costs_of(const AssignProblem& problem) {
  if (problem.targets <= problem.queries) {
    return {problem.cost, problem.dtype, problem.targets, problem.queries, problem.target_stride, problem.query_stride};
  }
  return {problem.cost, problem.dtype, problem.queries, problem.targets, problem.query_stride, problem.target_stride};
}

// Writes the query of each target, and the duals: those of the objects are minus their prices.
template <class Group>
FASTMASK_GROUP_FN void write_result(Group& group, const AssignProblem& problem, const ProblemMemory& memory,
                                    bool proved, const AssignResult& result) {
  const State& s = memory.state;
  const bool by_target = problem.targets <= problem.queries;
  if (!by_target) {
    group.elements(problem.targets, [&](int32_t t) { result.query_of_target[t] = kNobody; });
    group.sync();
  }
  group.elements(s.persons, [&](int32_t i) {
    if (by_target) {
      result.query_of_target[i] = s.object[i];
    } else {
      result.query_of_target[s.object[i]] = i;
    }
  });
  const double unproved = __builtin_nan("");
  double* person_duals = by_target ? result.target_duals : result.query_duals;
  double* object_duals = by_target ? result.query_duals : result.target_duals;
  if (person_duals != nullptr) {
    group.elements(s.persons, [&](int32_t i) { person_duals[i] = proved ? memory.duals.person[i] : unproved; });
  }
  if (object_duals != nullptr) {
    group.elements(s.objects, [&](int32_t k) {
      object_duals[k] = s.persons == 0 ? 0.0 : proved ? 0.0 - memory.duals.exact.price[k] : unproved;
    });
  }
}

// Solves `problem`, whose costs `costs` reads; returns how many pairs of the matching are not finite.
template <class Group>
FASTMASK_GROUP_FN int32_t assign_and_write(Group& group, const AssignProblem& problem, const Costs& costs,
                                           const ProblemMemory& memory, const AssignResult& result) {
  const double tolerance = problem.dtype == Dtype::kFloat64 ? kTolerance64 : kTolerance32;
  const int32_t broken = costs.persons == 0 ? 0 : assign(group, costs, memory.state, memory.duals, tolerance);
  write_result(group, problem, memory, broken == 0, result);
  return broken;
}

template <class Group>
FASTMASK_GROUP_FN int32_t assign_and_write(Group& group, const AssignProblem& problem, const ProblemMemory& memory,
                                           const AssignResult& result) {
  return assign_and_write(group, problem, costs_of<Group>(problem), memory, result);
}

}  // namespace matcher
}  // namespace fastmask
