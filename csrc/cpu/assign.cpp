#include "cpu/assign.h"

#include "cpu/assign_costs.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

using matcher::Costs;

// The matcher's group on one CPU thread, and how it reads a problem's costs.
class AssignGroup : public CpuGroup {
 public:
  double ranges(const Costs& c, double* least, double* greatest) {
    finite_ = c.type == Dtype::kFloat32 ? ranges_of<float>(c, least, greatest) : ranges_of<double>(c, least, greatest);
    if (!finite_) finite_ranges(c, least, greatest);
    return widest_range(c.persons, least, greatest);
  }

  void quantize(const Costs& c, const double* offsets, double scale, int32_t* costs, int32_t stride) const {
    quantize_with(c, offsets, Plain{scale}, costs, stride);
  }

  void quantize_reduced(const Costs& c, const double* offsets, const double* price, double limit, double scale,
                        int32_t* costs, int32_t stride) const {
    quantize_with(c, offsets, Reduced{scale, limit * scale, price}, costs, stride);
  }

  void least_sums(const Costs& c, const double* price, double* sum) const {
    if (!finite_) {
      finite_least_sums(c, price, sum);
    } else if (c.type == Dtype::kFloat32) {
      least_sums_of<float>(c, price, sum);
    } else {
      least_sums_of<double>(c, price, sum);
    }
  }

 private:
  template <class T>
  static bool ranges_of(const Costs& c, double* least, double* greatest) {
    return c.person_stride == 1 ? ranges_by_column<T>(c, least, greatest) : ranges_by_row<T>(c, least, greatest);
  }

  template <class Quantizer>
  void quantize_with(const Costs& c, const double* offsets, const Quantizer& quantizer, int32_t* costs,
                     int32_t stride) const {
    if (c.type == Dtype::kFloat32) {
      quantize_of<float>(c, offsets, quantizer, costs, stride);
    } else {
      quantize_of<double>(c, offsets, quantizer, costs, stride);
    }
    if (finite_) return;
    for (int32_t i = 0; i < c.persons; ++i) {
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = matcher::cost_at<AssignGroup>(c, i, k);
        if (!matcher::is_finite<AssignGroup>(cost)) costs[static_cast<int64_t>(i) * stride + k] = matcher::kRange;
      }
    }
  }

  template <class T, class Quantizer>
  static void quantize_of(const Costs& c, const double* offsets, const Quantizer& quantizer, int32_t* costs,
                          int32_t stride) {
    if (c.person_stride == 1) {
      quantize_by_column<T>(c, offsets, quantizer, costs, stride);
    } else {
      quantize_by_row<T>(c, offsets, quantizer, costs, stride);
    }
  }

  template <class T>
  static void least_sums_of(const Costs& c, const double* price, double* sum) {
    if (c.person_stride == 1) {
      least_sums_by_column<T>(c, price, sum);
    } else {
      least_sums_by_row<T>(c, price, sum);
    }
  }

  bool finite_ = true;
};

// Copies the costs to [persons, objects].
template <class T>
void compact(const Costs& c, T* copy) {
  for (int32_t i = 0; i < c.persons; ++i) {
    for (int32_t k = 0; k < c.objects; ++k) {
      copy[static_cast<int64_t>(i) * c.objects + k] = static_cast<T>(matcher::cost_at<AssignGroup>(c, i, k));
    }
  }
}

}  // namespace

int32_t assign_problem(const AssignProblem& problem, const AssignWorkspace& work, const AssignResult& result) {
  Costs c = matcher::costs_of<AssignGroup>(problem);
  const bool wide = c.type == Dtype::kFloat64;
  const bool half = !wide && c.type != Dtype::kFloat32;
  if (half || (c.person_stride != 1 && c.object_stride != 1)) {
    if (wide) {
      compact(c, work.copy);
    } else {
      compact(c, reinterpret_cast<float*>(work.copy));
    }
    c = {work.copy, wide ? Dtype::kFloat64 : Dtype::kFloat32, c.persons, c.objects, c.objects, 1};
  }
  AssignGroup group;
  return matcher::assign_and_write(group, problem, c, work.problem, result);
}

}  // namespace fastmask::FASTMASK_SIMD
