// The Python module fastmask._native: entry points that are not PyTorch operators.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/assign.h"

namespace py = pybind11;

namespace {

std::string simd_level() { return fastmask::simd_level_name(fastmask::simd_level()); }

void set_simd_level(int level) { fastmask::set_simd_level(static_cast<fastmask::SimdLevel>(level)); }

// Reads the argument as SciPy does: anything that NumPy casts to float64 without loss.
py::array as_matrix(const py::object& cost_matrix) {
  const auto& numpy = py::detail::npy_api::get();
  PyObject* array = numpy.PyArray_FromAny_(cost_matrix.ptr(), py::dtype::of<double>().release().ptr(), 0, 0,
                                           py::detail::npy_api::NPY_ARRAY_ALIGNED_, nullptr);
  if (array == nullptr) throw py::error_already_set();
  py::array matrix = py::reinterpret_steal<py::array>(array);
  if (matrix.ndim() != 2) {
    throw py::value_error("expected a matrix (2-D array), got a " + std::to_string(matrix.ndim()) + " array");
  }
  return matrix;
}

// Solves one problem, with strides in elements, without holding the interpreter's lock.
std::vector<int64_t> solve(const double* cost, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                           bool maximize) {
  std::vector<double> negated;
  if (maximize) {
    negated.reserve(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) negated.push_back(-cost[i * row_stride + j * column_stride]);
    }
    cost = negated.data();
    row_stride = columns;
    column_stride = 1;
  }
  // 0 times a finite cost is 0, and 0 times any other cost is NaN: a single sum tells whether to check each cost.
  double zero = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) zero += 0 * cost[i * row_stride + j * column_stride];
  }
  if (zero != 0) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const double value = cost[i * row_stride + j * column_stride];
        if (std::isnan(value) || value == -HUGE_VAL) throw py::value_error("matrix contains invalid numeric entries");
      }
    }
  }
  std::vector<int64_t> row_of(columns);
  const fastmask::AssignProblem problem{cost,          fastmask::Dtype::kFloat64,  row_stride,
                                        column_stride, static_cast<int32_t>(rows), static_cast<int32_t>(columns)};
  using namespace fastmask;
  Scratch& scratch = thread_scratch();
  const auto work = scratch.lay_out<AssignWorkspace>(rows, columns);
  const int32_t broken = FASTMASK_SELECT(assign_problem)(problem, work, {row_of.data(), nullptr, nullptr});
  scratch.trim();
  if (broken > 0) throw py::value_error("cost matrix is infeasible");
  return row_of;
}

py::tuple linear_sum_assignment(const py::object& cost_matrix, const py::object& maximize) {
  const bool negate = py::bool_(maximize);
  py::array matrix = as_matrix(cost_matrix);
  const int64_t rows = matrix.shape(0), columns = matrix.shape(1);
  if (std::min(rows, columns) > fastmask::kMaxAssignShortSide ||
      std::max(rows, columns) > fastmask::kMaxAssignLongSide) {
    throw py::value_error("expected a matrix of at most " + std::to_string(fastmask::kMaxAssignShortSide) + " by " +
                          std::to_string(fastmask::kMaxAssignLongSide) + ", got " + std::to_string(rows) + " by " +
                          std::to_string(columns));
  }
  const int64_t pairs = std::min(rows, columns);
  py::array_t<int64_t> row_indices(pairs), column_indices(pairs);
  if (pairs == 0) return py::make_tuple(row_indices, column_indices);
  constexpr int64_t kItem = sizeof(double);
  if (matrix.strides(0) % kItem != 0 || matrix.strides(1) % kItem != 0) matrix = matrix.attr("copy")();
  const double* cost = static_cast<const double*>(matrix.data());
  const int64_t row_stride = matrix.strides(0) / kItem, column_stride = matrix.strides(1) / kItem;
  int64_t* row_out = row_indices.mutable_data();
  int64_t* column_out = column_indices.mutable_data();
  {
    py::gil_scoped_release unlocked;
    const std::vector<int64_t> row_of = solve(cost, rows, columns, row_stride, column_stride, negate);
    std::vector<int64_t> column_of(rows, -1);
    for (int64_t j = 0; j < columns; ++j) {
      if (row_of[j] >= 0) column_of[row_of[j]] = j;
    }
    int64_t pair = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (column_of[i] < 0) continue;
      row_out[pair] = i;
      column_out[pair++] = column_of[i];
    }
  }
  return py::make_tuple(row_indices, column_indices);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Build information of fastmask's extension, and entry points that need no PyTorch.";
  module.attr("simd_levels") = FASTMASK_SIMD_LEVELS;
  module.attr("cuda_archs") = FASTMASK_CUDA_ARCHS;
  module.attr("cuda_version") = FASTMASK_CUDA_VERSION;
  module.attr("compiler") = __VERSION__;
  module.def("simd_level", &simd_level, "The SIMD level in use.");
  module.def("set_simd_level", &set_simd_level, "For this module only; see fastmask.ops._registry.set_simd_level.");
  module.def("linear_sum_assignment", &linear_sum_assignment, py::arg("cost_matrix"), py::arg("maximize") = false,
             "A replacement for SciPy's function of the same name, for anything that NumPy reads as a matrix.");
}
