#include "ops/assign.h"

#include "matcher/serial_group.h"
#include "ops/parallel.h"

namespace fastmask {
namespace {

// The matcher's CUDA form on one CPU thread, for tests: the work between two barriers is done in an order that `seed`
// scrambles.
int32_t solve_serially(const AssignProblem& problem, Scratch& scratch, const AssignResult& result, uint32_t seed) {
  using namespace matcher;
  // An odd stride, as in the kernel, where it avoids bank conflicts of shared memory in rows and columns.
  const auto memory = scratch.lay_out<ProblemMemory>(problem.queries, problem.targets, 1);
  scratch.fill(0xff);  // NaN and -1: results must not depend on previous values
  SerialGroup group(seed);
  return assign_and_write(group, problem, memory, result);
}

AssignSolution solve(const Tensor& cost, const std::optional<Tensor>& counts, bool with_duals, int64_t serial_seed) {
  const AssignBatch batch(cost, counts);
  const Dtype dtype = dtype_of(cost, "cost", true);
  for (int64_t i = 0; counts.has_value() && i < batch.problems; ++i) {
    STD_TORCH_CHECK(batch.count(i) >= 0 && batch.count(i) <= batch.targets, "counts must lie in 0..", batch.targets,
                    ", got ", batch.count(i));
  }
  AssignSolution out(batch, with_duals);
  int32_t* broken = out.broken_data();
  const auto solve_problem = FASTMASK_SELECT(assign_problem);
  // Starting a thread costs as much as about 16,000 pairs.
  const int64_t pairs = std::max<int64_t>(batch.queries * batch.targets, 1);
  parallel_for(0, batch.problems, std::max<int64_t>(16384 / pairs, 1),
               [&](int64_t begin, int64_t end, Scratch& scratch) {
                 for (int64_t i = begin; i < end; ++i) {
                   const AssignProblem problem = batch.problem(i, dtype);
                   const AssignResult result = out.of_problem(i, batch);
                   if (serial_seed >= 0) {
                     broken[i] = solve_serially(problem, scratch, result, static_cast<uint32_t>(serial_seed));
                   } else {
                     const auto work = scratch.lay_out<AssignWorkspace>(problem.queries, problem.targets);
                     broken[i] = solve_problem(problem, work, result);
                   }
                   std::fill(result.query_of_target + problem.targets, result.query_of_target + batch.targets, -1);
                   if (with_duals)
                     std::fill(result.target_duals + problem.targets, result.target_duals + batch.targets, 0.0);
                 }
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

FASTMASK_LIBRARY_IMPL(CPU, library) {
  library.impl("assign", TORCH_BOX(&fastmask::assign));
  library.impl("assign_duals", TORCH_BOX(&fastmask::assign_duals));
  library.impl("_assign_serial", TORCH_BOX(&fastmask::assign_serial));
}
