// The CUDA kernel's code on emulated threads, for ctypes.
#include "cuda_emulation.h"
// The emulation's names come first.
#include "cuda/assign_group.h"

extern "C" void emulated_assign(const void* cost, int dtype, int64_t problems, int queries, int targets,
                                int64_t query_stride, int64_t target_stride, const int64_t* counts, int64_t* assignment,
                                int32_t* broken, double* query_duals, double* target_duals, int threads, int in_shared,
                                int seed) {
  using namespace fastmask;
  AssignLaunch launch{};
  launch.largest = {cost, static_cast<AssignDtype>(dtype), query_stride, target_stride, queries, targets};
  launch.problems = problems;
  launch.dims = 1;
  launch.leading[0] = problems;
  launch.cost_strides[0] = static_cast<int64_t>(queries) * targets;
  launch.count_strides[0] = 1;
  launch.counts = counts;
  launch.result = {assignment, query_duals, target_duals};
  launch.broken = broken;
  const AssignPlan plan = matcher::plan_for(launch.largest, in_shared != 0 ? INT64_MAX : 0);
  launch.costs_in_shared = plan.costs_in_shared;
  launch.scratch_bytes = plan.scratch_bytes;
  // Memory starts as NaN and -1, not as zeros.
  std::vector<char> scratch(plan.scratch_bytes * problems + 64, static_cast<char>(0xff));
  launch.scratch = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  for (int64_t i = 0; i < problems; ++i) {
    std::vector<char> shared(plan.shared_bytes + 64, static_cast<char>(0xff));
    char* aligned = shared.data() + (64 - reinterpret_cast<uintptr_t>(shared.data()) % 64) % 64;
    emulation::run_block(threads, seed + static_cast<int>(i), [&] { matcher::solve_block(launch, i, aligned); });
  }
}

// {fits, costs in shared memory, bytes of shared memory} for the largest problem of a batch.
extern "C" void emulated_plan(int queries, int targets, int64_t shared_limit, int64_t* out) {
  using namespace fastmask;
  const AssignProblem largest{nullptr, AssignDtype::kFloat32, targets, 1, queries, targets};
  const AssignPlan plan = matcher::plan_for(largest, shared_limit);
  out[0] = plan.fits;
  out[1] = plan.costs_in_shared;
  out[2] = plan.shared_bytes;
}
