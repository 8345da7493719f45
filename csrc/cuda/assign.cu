// One launch solves a batch, with one block per problem. Costs are kept in shared memory if they fit (300 x 100 take
// 120 kB), otherwise in global memory and so mostly in L2. Compiled with -fmad=false, because a fused multiply-add
// would round the duals differently from the CPU.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "cuda/assign_group.h"

namespace fastmask {
namespace {

using namespace matcher;

constexpr int kMaxThreads = 384;  // leaves each thread 168 registers; the 128 that 512 threads leave are too few

__global__ void __launch_bounds__(kMaxThreads, 1) assign_kernel(const AssignLaunch launch) {
  extern __shared__ __align__(64) char shared[];
  solve_block(launch, blockIdx.x, shared);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

AssignPlan assign_cuda_plan(const AssignProblem& largest, int64_t shared_limit) {
  return plan_for(largest, shared_limit);
}

// Allows the kernel all shared memory that a block may have, once per device: the limit belongs to the kernel, not to a
// launch, so that lowering it for one thread's sizes would break another thread's launch.
const char* assign_cuda_shared_limit(int64_t& bytes) {
  static std::mutex mutex;
  static std::map<int, int> limits;  // by device, for kernels that have their limit set
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
