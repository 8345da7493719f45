// One launch solves a batch, one block a problem. Costs stay in shared memory where they fit (300 x 100 take 120 kB),
// else in global memory and so, for the most part, in L2. Compiled with -fmad=false: a fused multiply-add would round
// the duals otherwise than the CPU.
#include <cuda_runtime.h>

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

const char* assign_cuda_shared_limit(int64_t& bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bytes = limit;
  return message(error);
}

const char* assign_cuda_launch(const AssignLaunch& launch, const AssignPlan& plan, void* stream) {
  const cudaError_t error = cudaFuncSetAttribute(assign_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(plan.shared_bytes));
  if (error != cudaSuccess) return message(error);
  const int64_t pairs = static_cast<int64_t>(launch.largest.queries) * launch.largest.targets;
  const int threads = pairs > 8192 ? kMaxThreads : pairs > 1024 ? 256 : 64;
  assign_kernel<<<static_cast<unsigned>(launch.problems), threads, plan.shared_bytes,
                  static_cast<cudaStream_t>(stream)>>>(launch);
  return message(cudaGetLastError());
}

}  // namespace fastmask
