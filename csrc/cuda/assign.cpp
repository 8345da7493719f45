#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/assign.h"
#include "ops/assign.h"

// A function of PyTorch's CUDA build, looked up at run time, so that the same binary also serves PyTorch's CPU build.
using GetStream = int32_t (*)(int32_t device, void** stream);

namespace fastmask {
namespace {

void* current_stream(int32_t device) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  static void* const symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(symbol != nullptr,
                  "cannot run assign on a GPU: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(reinterpret_cast<GetStream>(symbol)(device, &stream) == 0, "cannot get the current stream of device ",
                  device);
  return stream;
}

AssignSolution solve(Tensor cost, std::optional<Tensor> counts, bool with_duals) {
  const int32_t device = static_cast<int32_t>(cost.get_device_index());
  if (cost.dim() - 2 > kMaxBatchDims) {
    cost = torch::stable::contiguous(cost);
    if (counts.has_value()) counts = torch::stable::contiguous(*counts);
  }
  const AssignBatch batch(cost, counts);
  AssignSolution out(batch, with_duals);
  if (batch.problems == 0) return out;
  STD_TORCH_CHECK(batch.problems <= INT32_MAX, "cost has ", batch.problems, " problems; a launch takes ", INT32_MAX);
  STD_TORCH_CHECK(!counts.has_value() || counts->get_device_index() == device, "counts must be on the device of cost");

  AssignLaunch launch{};
  const int64_t dims = cost.dim();
  launch.largest = {cost.data_ptr(),       dtype_of(cost, "cost", true),        cost.stride(dims - 2),
                    cost.stride(dims - 1), static_cast<int32_t>(batch.queries), static_cast<int32_t>(batch.targets)};
  launch.problems = batch.problems;
  launch.counts = batch.counts;
  launch.result = out.result;
  launch.broken = out.broken_data();
  if (batch.leading.size() > kMaxBatchDims) {
    launch.dims = 1;
    launch.leading[0] = batch.problems;
    launch.cost_strides[0] = batch.queries * batch.targets;
    launch.count_strides[0] = 1;
  } else {
    launch.dims = static_cast<int32_t>(batch.leading.size());
    std::copy(batch.leading.begin(), batch.leading.end(), launch.leading);
    std::copy(batch.cost_strides.begin(), batch.cost_strides.end(), launch.cost_strides);
    std::copy(batch.count_strides.begin(), batch.count_strides.end(), launch.count_strides);
  }

  const torch::stable::accelerator::DeviceGuard guard(device);
  int64_t shared_limit = 0;
  const char* error = assign_cuda_shared_limit(shared_limit);
  STD_TORCH_CHECK(error == nullptr, "assign: ", error);
  const AssignPlan plan = assign_cuda_plan(launch.largest, shared_limit);
  STD_TORCH_CHECK(plan.fits, "cost has ", batch.queries, " queries and ", batch.targets,
                  " targets; this GPU's shared memory takes about 1000 of each");
  Tensor scratch = empty_result(cost, {batch.problems * plan.scratch_bytes}, ScalarType::Byte);
  launch.scratch = data_of<char>(scratch);
  launch.scratch_bytes = plan.scratch_bytes;
  launch.costs_in_shared = plan.costs_in_shared;
  error = assign_cuda_launch(launch, plan, current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "assign: ", error);
  return out;
}

std::tuple<Tensor, Tensor> assign(Tensor cost, std::optional<Tensor> counts) {
  return solve(cost, counts, false).without_duals();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign_duals(Tensor cost, std::optional<Tensor> counts) {
  return solve(cost, counts, true).with_duals();
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CUDA, library) {
  library.impl("assign", TORCH_BOX(&fastmask::assign));
  library.impl("assign_duals", TORCH_BOX(&fastmask::assign_duals));
}
