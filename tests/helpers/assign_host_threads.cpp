// Several host threads launch the matcher in many sizes on two GPUs that are not there. Prints each request for shared
// memory, the device and the bytes, and each launch that fails.
#include <thread>

#include "cuda/assign.cu"

namespace fastmask {
namespace {

alignas(64) char shared[64];  // the kernel's, which does not run

void launch(int queries, int targets) {
  AssignLaunch launch{};
  launch.largest = {nullptr, AssignDtype::kFloat32, targets, 1, queries, targets};
  launch.problems = 1;
  int64_t limit = 0;
  const char* error = assign_cuda_shared_limit(limit);
  const AssignPlan plan = assign_cuda_plan(launch.largest, limit);
  if (error == nullptr) error = plan.fits ? assign_cuda_launch(launch, plan, nullptr) : "does not fit";
  if (error != nullptr) printf("device %d, %d x %d: %s\n", driver::device, queries, targets, error);
}

}  // namespace
}  // namespace fastmask

int main() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([i] {
      driver::device = i % 2;
      for (int n = 0; n < 200; ++n) fastmask::launch(10 + 97 * (n + i) % 500, 5 + 31 * n % 100);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const driver::Request& request : driver::requests) printf("device %d: %d\n", request.device, request.bytes);
}
