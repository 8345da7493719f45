#include "ops/assign.h"

#include "common/scratch.h"
#include "ops/assign_serial.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

AssignSolution solve(const Tensor& cost, const std::optional<Tensor>& counts, bool with_duals, int64_t serial_seed) {
  const AssignBatch batch(cost, counts);
  const AssignDtype dtype = assign_dtype(cost);
  for (int64_t i = 0; counts.has_value() && i < batch.problems; ++i) {
    STD_TORCH_CHECK(batch.count(i) >= 0 && batch.count(i) <= batch.targets, "counts must lie in 0..", batch.targets,
                    ", got ", batch.count(i));
  }
  AssignSolution out(batch, with_duals);
  int32_t* broken = out.broken_data();
  const auto workspace = FASTMASK_SELECT(assign_workspace);
  const auto solve_problem = FASTMASK_SELECT(assign_problem);
  // Starting a thread costs what some 16,000 pairs do.
  const int64_t pairs = std::max<int64_t>(batch.queries * batch.targets, 1);
  parallel_for(0, batch.problems, std::max<int64_t>(16384 / pairs, 1), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const AssignProblem problem = batch.problem(i, dtype);
      const AssignResult result = out.of_problem(i, batch);
      if (serial_seed >= 0) {
        broken[i] = assign_problem_serial(problem, result, static_cast<uint32_t>(serial_seed));
      } else {
        broken[i] = solve_problem(problem, scratch.reserve(workspace(problem.queries, problem.targets)), result);
      }
      std::fill(result.query_of_target + problem.targets, result.query_of_target + batch.targets, -1);
      if (with_duals) std::fill(result.target_duals + problem.targets, result.target_duals + batch.targets, 0.0);
    }
    scratch.trim();
  });
  return out;
}

std::tuple<Tensor, Tensor> assign(Tensor cost, std::optional<Tensor> counts) {
  return solve(cost, counts, false, -1).without_duals();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign_duals(Tensor cost, std::optional<Tensor> counts) {
  return solve(cost, counts, true, -1).with_duals();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign_serial(Tensor cost, std::optional<Tensor> counts, int64_t seed) {
  return solve(cost, counts, true, std::max<int64_t>(seed, 0)).with_duals();
}

}  // namespace
}  // namespace fastmask

STABLE_TORCH_LIBRARY_IMPL(fastmask, CPU, library) {
  library.impl("assign", TORCH_BOX(&fastmask::assign));
  library.impl("assign_duals", TORCH_BOX(&fastmask::assign_duals));
  library.impl("_assign_serial", TORCH_BOX(&fastmask::assign_serial));
}
