// A problem of queries and targets: which side the persons are, what memory it takes, and where the results go.
#pragma once

#include "matcher/assign.h"
#include "matcher/workspace.h"

namespace fastmask {

using AssignDtype = matcher::CostType;

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
};

// The sizes of a problem's state; rows are rounded up to a multiple of `alignment`, or to an odd number if that is 1.
template <class Group>
FASTMASK_WORKSPACE_FN ProblemMemory size_of(const AssignProblem& problem, int32_t alignment) {
  ProblemMemory memory{};
  State& s = memory.state;
  s.persons = problem.queries < problem.targets ? problem.queries : problem.targets;
  s.objects = problem.queries < problem.targets ? problem.targets : problem.queries;
  s.stride = alignment == 1 ? s.objects | 1 : (s.objects + alignment - 1) / alignment * alignment;
  return memory;
}

template <class Group>
FASTMASK_WORKSPACE_FN void carve_costs(Carver<Group>& carver, State& s) {
  carver.take(s.costs, static_cast<int64_t>(s.persons) * s.stride);
}

template <class Group>
FASTMASK_WORKSPACE_FN void carve_all(Carver<Group>& carver, ProblemMemory& memory) {
  carve_costs(carver, memory.state);
  carve_state(carver, memory.state);
  carve_duals(carver, memory.state, memory.duals);
  carve_exact(carver, memory.state, memory.duals);
}

template <class Group>
FASTMASK_WORKSPACE_FN Costs costs_of(const AssignProblem& problem) {
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

// Solves `problem` as `costs` has it, and returns how many pairs of the matching are not finite.
template <class Group>
FASTMASK_GROUP_FN int32_t assign_and_write(Group& group, const AssignProblem& problem, const Costs& costs,
                                           const ProblemMemory& memory, const AssignResult& result) {
  const double tolerance = problem.dtype == CostType::kFloat64 ? kTolerance64 : kTolerance32;
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
