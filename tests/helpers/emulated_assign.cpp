// The CUDA kernel's code on emulated threads. Without arguments, reads batches of problems from the standard input and
// writes what fastmask::assign_duals returns for each; with `queries targets bytes-of-shared-memory`, prints the plan.
#include "cuda_emulation.h"
// The emulation's names come first.
#include "cuda/assign_group.h"

namespace {

using namespace fastmask;

// A batch; its costs follow, as they lie in memory, and then, if has_counts, the counts.
struct Header {
  int64_t query_stride, target_stride, cost_bytes;
  int32_t dtype, problems, queries, targets, has_counts, threads, in_shared, seed;
};

bool read_bytes(void* data, size_t bytes) { return bytes == 0 || fread(data, bytes, 1, stdin) == 1; }

template <class T>
void write_all(const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), stdout);
}

char* aligned(std::vector<char>& memory) {
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

bool solve_next() {
  Header h;
  if (!read_bytes(&h, sizeof h)) return false;
  std::vector<char> cost(h.cost_bytes);
  std::vector<int64_t> counts(h.has_counts != 0 ? h.problems : 0);
  if (!read_bytes(cost.data(), cost.size()) || !read_bytes(counts.data(), counts.size() * sizeof(int64_t)))
    return false;

  std::vector<int64_t> assignment(static_cast<size_t>(h.problems) * h.targets, 99);
  std::vector<int32_t> broken(h.problems, 99);
  std::vector<double> query_duals(static_cast<size_t>(h.problems) * h.queries, __builtin_nan(""));
  std::vector<double> target_duals(static_cast<size_t>(h.problems) * h.targets, __builtin_nan(""));
  AssignLaunch launch{};
  launch.largest = {cost.data(), static_cast<AssignDtype>(h.dtype), h.query_stride, h.target_stride, h.queries,
                    h.targets};
  launch.problems = h.problems;
  launch.dims = 1;
  launch.leading[0] = h.problems;
  launch.cost_strides[0] = static_cast<int64_t>(h.queries) * h.targets;
  launch.count_strides[0] = 1;
  launch.counts = h.has_counts != 0 ? counts.data() : nullptr;
  launch.result = {assignment.data(), query_duals.data(), target_duals.data()};
  launch.broken = broken.data();
  const AssignPlan plan = matcher::plan_for(launch.largest, h.in_shared != 0 ? INT64_MAX : 0);
  launch.costs_in_shared = plan.costs_in_shared;
  launch.scratch_bytes = plan.scratch_bytes;
  // Memory starts as NaN and -1, not as zeros.
  std::vector<char> scratch(plan.scratch_bytes * h.problems + 64, static_cast<char>(0xff));
  launch.scratch = aligned(scratch);
  for (int64_t i = 0; i < h.problems; ++i) {
    std::vector<char> shared(plan.shared_bytes + 64, static_cast<char>(0xff));
    char* const memory = aligned(shared);
    emulation::run_block(h.threads, h.seed + static_cast<int>(i), [&] { matcher::solve_block(launch, i, memory); });
  }
  write_all(assignment);
  write_all(broken);
  write_all(query_duals);
  write_all(target_duals);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4) {
    const AssignProblem largest{nullptr, AssignDtype::kFloat32, atoi(argv[2]), 1, atoi(argv[1]), atoi(argv[2])};
    const AssignPlan plan = matcher::plan_for(largest, atoll(argv[3]));
    printf("%d %d %lld\n", plan.fits, plan.costs_in_shared, static_cast<long long>(plan.shared_bytes));
    return 0;
  }
  while (solve_next()) {
  }
}
