// One launch solves a batch, one block a problem. Costs stay in shared memory where they fit (300 x 100 take 120 kB),
// else in global memory and so, for the most part, in L2. Compiled with -fmad=false: a fused multiply-add would round
// the duals otherwise than the CPU.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "cuda/assign_group.h"

namespace fastmask {
namespace {

using namespace matcher;

constexpr int kMaxThreads = 384;  // leaves each thread 168 registers; with 512, 128 would not do

__global__ void __launch_bounds__(kMaxThreads, 1) assign_kernel(const AssignLaunch launch) {
  extern __shared__ __align__(64) char shared[];
  solve_block(launch, blockIdx.x, shared);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

AssignPlan assign_cuda_plan(const AssignProblem& largest, int64_t shared_limit) {
  return plan_for(largest, shared_limit);
}

// The kernel is allowed all that a block may have, once for each device: the allowance belongs to the kernel and not to
// a launch, so that one which follows the sizes would be taken from under a launch of another thread.
const char* assign_cuda_shared_limit(int64_t& bytes) {
  static std::mutex mutex;
  static std::map<int, int> limits;  // by device, whose kernel has its allowance
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return message(error);
  const std::lock_guard<std::mutex> lock(mutex);
  if (limits.count(device) == 0) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(assign_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    }
    if (error != cudaSuccess) return message(error);
    limits[device] = limit;
  }
  bytes = limits[device];
  return nullptr;
}

const char* assign_cuda_launch(const AssignLaunch& launch, const AssignPlan& plan, void* stream) {
  const int64_t pairs = static_cast<int64_t>(launch.largest.queries) * launch.largest.targets;
  const int threads = pairs > 8192 ? kMaxThreads : pairs > 1024 ? 256 : 64;
  AssignLaunch argument = launch;
  void* arguments[] = {&argument};
  return message(cudaLaunchKernel(assign_kernel, dim3(static_cast<unsigned>(launch.problems)), dim3(threads), arguments,
                                  plan.shared_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastmask
