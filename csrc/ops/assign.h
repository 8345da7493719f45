// The checks and results of fastmask::assign, shared by CPU and CUDA.
#pragma once

#include <algorithm>
#include <tuple>

#include "cpu/assign.h"
#include "ops/tensors.h"

namespace fastmask {

// Costs (..., N, M) as a list of problems, which are read in place with any strides.
struct AssignBatch {
  Tensor cost;
  std::vector<int64_t> leading, cost_strides, count_strides;
  const int64_t* counts = nullptr;
  int64_t problems = 1, queries, targets;

  AssignBatch(const Tensor& cost_in, const std::optional<Tensor>& counts_in) : cost(cost_in) {
    const int64_t dims = cost.dim();
    check_tensor(dims >= 2, cost, "cost", "(..., N, M)");
    queries = cost.size(dims - 2);
    targets = cost.size(dims - 1);
    STD_TORCH_CHECK(
        std::min(queries, targets) <= kMaxAssignShortSide && std::max(queries, targets) <= kMaxAssignLongSide,
        "cost must have at most ", kMaxAssignShortSide, " queries or targets on its shorter side and ",
        kMaxAssignLongSide, " on the longer one, got ", queries, " queries and ", targets, " targets");
    for (int64_t d = 0; d < dims - 2; ++d) {
      leading.push_back(cost.size(d));
      cost_strides.push_back(cost.stride(d));
      problems *= cost.size(d);
    }
    if (!counts_in.has_value()) return;
    const Tensor& given = *counts_in;
    bool fits = given.scalar_type() == ScalarType::Long && given.dim() == dims - 2;
    for (int64_t d = 0; fits && d < dims - 2; ++d) {
      fits = given.size(d) == leading[d];
      count_strides.push_back(given.stride(d));
    }
    check_tensor(fits, given, "counts", "int64 with the leading dimensions of cost");
    counts = data_of<const int64_t>(given);
  }

  int64_t count(int64_t problem) const { return counts == nullptr ? targets : counts[offset(problem, count_strides)]; }

  AssignProblem problem(int64_t i, Dtype dtype) const {
    const int64_t dims = cost.dim();
    const char* data = data_of<const char>(cost) + offset(i, cost_strides) * matcher::element_size(dtype);
    return {data,
            dtype,
            cost.stride(dims - 2),
            cost.stride(dims - 1),
            static_cast<int32_t>(queries),
            static_cast<int32_t>(count(i))};
  }

 private:
  int64_t offset(int64_t index, const std::vector<int64_t>& strides) const {
    int64_t at = 0;
    for (size_t d = leading.size(); d-- > 0; index /= leading[d]) at += index % leading[d] * strides[d];
    return at;
  }
};

// The results of fastmask::assign_duals; fastmask::assign leaves the duals out.
struct AssignSolution {
  Tensor assignment;                 // (..., M) int64
  Tensor broken;                     // (...) int32
  Tensor query_duals, target_duals;  // (..., N) and (..., M) float64, or undefined
  AssignResult result;               // pointers to the first problem's results

  AssignSolution(const AssignBatch& batch, bool with_duals) {
    const auto new_tensor = [&](std::vector<int64_t> trailing, ScalarType type) {
      std::vector<int64_t> sizes = batch.leading;
      sizes.insert(sizes.end(), trailing.begin(), trailing.end());
      return empty_result(batch.cost, sizes, type);
    };
    assignment = new_tensor({batch.targets}, ScalarType::Long);
    broken = new_tensor({}, ScalarType::Int);
    result = {data_of<int64_t>(assignment), nullptr, nullptr};
    if (!with_duals) return;
    query_duals = new_tensor({batch.queries}, ScalarType::Double);
    target_duals = new_tensor({batch.targets}, ScalarType::Double);
    result.query_duals = data_of<double>(query_duals);
    result.target_duals = data_of<double>(target_duals);
  }

  int32_t* broken_data() { return data_of<int32_t>(broken); }

  AssignResult of_problem(int64_t i, const AssignBatch& batch) const {
    return {result.query_of_target + i * batch.targets,
            result.query_duals == nullptr ? nullptr : result.query_duals + i * batch.queries,
            result.target_duals == nullptr ? nullptr : result.target_duals + i * batch.targets};
  }

  std::tuple<Tensor, Tensor> without_duals() const { return {assignment, broken}; }
  std::tuple<Tensor, Tensor, Tensor, Tensor> with_duals() const {
    return {assignment, broken, query_duals, target_duals};
  }
};

}  // namespace fastmask
