#include "cpu/assign.h"

#include "cpu/assign_costs.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

using matcher::Costs;
using matcher::CostType;

// How a problem's costs are read.
class AssignGroup : public CpuGroup {
 public:
  double ranges(const Costs& c, double* least, double* greatest) {
    finite_ =
        c.type == CostType::kFloat32 ? ranges_of<float>(c, least, greatest) : ranges_of<double>(c, least, greatest);
    if (!finite_) finite_ranges(c, least, greatest);
    double range = 0;
    for (int32_t i = 0; i < c.persons; ++i) {
      least[i] += 0.0;  // -0 becomes 0: which of the two is found depends on the order
      range = greatest[i] - least[i] > range ? greatest[i] - least[i] : range;
    }
    return range;
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
      for (int32_t i = 0; i < c.persons; ++i) {
        sum[i] = __builtin_inf();
        for (int32_t k = 0; k < c.objects; ++k) {
          const double cost = matcher::cost_at<AssignGroup>(c, i, k) + price[k];
          if (matcher::is_finite<AssignGroup>(cost)) sum[i] = cost < sum[i] ? cost : sum[i];
        }
      }
    } else if (c.type == CostType::kFloat32) {
      least_sums_of<float>(c, price, sum);
    } else {
      least_sums_of<double>(c, price, sum);
    }
  }

  // Sums of costs stay finite if none exceeds 2^1000.
  double exact_scale(const Costs& c) const {
    for (int32_t i = 0; i < c.persons; ++i) {
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = matcher::cost_at<AssignGroup>(c, i, k);
        if (matcher::is_finite<AssignGroup>(cost) && (cost > 0x1p1000 || cost < -0x1p1000)) return 0x1p-24;
      }
    }
    return 1;
  }

 private:
  template <class T>
  static bool ranges_of(const Costs& c, double* least, double* greatest) {
    return c.person_stride == 1 ? ranges_by_column<T>(c, least, greatest) : ranges_by_row<T>(c, least, greatest);
  }

  static void finite_ranges(const Costs& c, double* least, double* greatest) {
    for (int32_t i = 0; i < c.persons; ++i) {
      bool any = false;
      least[i] = greatest[i] = 0;
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = matcher::cost_at<AssignGroup>(c, i, k);
        if (!matcher::is_finite<AssignGroup>(cost)) continue;
        least[i] = any && least[i] < cost ? least[i] : cost;
        greatest[i] = any && greatest[i] > cost ? greatest[i] : cost;
        any = true;
      }
    }
  }

  template <class Quantizer>
  void quantize_with(const Costs& c, const double* offsets, const Quantizer& quantizer, int32_t* costs,
                     int32_t stride) const {
    if (c.type == CostType::kFloat32) {
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

// Copies costs that are of half precision, or not contiguous along either side, to [persons, objects].
template <class T>
void compact(const Costs& c, T* copy) {
  for (int32_t i = 0; i < c.persons; ++i) {
    for (int32_t k = 0; k < c.objects; ++k) {
      copy[static_cast<int64_t>(i) * c.objects + k] = static_cast<T>(matcher::cost_at<AssignGroup>(c, i, k));
    }
  }
}

struct Memory {
  matcher::ProblemMemory problem;
  double* copy;
};

Memory carve(char* workspace, int64_t queries, int64_t targets, int64_t* bytes) {
  const AssignProblem sizes{
      nullptr, CostType::kFloat32, 0, 0, static_cast<int32_t>(queries), static_cast<int32_t>(targets)};
  Memory memory{matcher::size_of<AssignGroup>(sizes, 16), nullptr};
  matcher::Carver<AssignGroup> carver(workspace);
  matcher::carve_all(carver, memory.problem);
  carver.take(memory.copy, queries * targets);
  if (bytes != nullptr) *bytes = carver.used();
  return memory;
}

}  // namespace

int64_t assign_workspace(int64_t queries, int64_t targets) {
  int64_t bytes;
  carve(nullptr, queries, targets, &bytes);
  return bytes;
}

int32_t assign_problem(const AssignProblem& problem, char* workspace, const AssignResult& result) {
  const Memory memory = carve(workspace, problem.queries, problem.targets, nullptr);
  Costs c = matcher::costs_of<AssignGroup>(problem);
  const bool wide = c.type == CostType::kFloat64;
  const bool half = !wide && c.type != CostType::kFloat32;
  if (half || (c.person_stride != 1 && c.object_stride != 1)) {
    if (wide) {
      compact(c, memory.copy);
    } else {
      compact(c, reinterpret_cast<float*>(memory.copy));
    }
    c = {memory.copy, wide ? CostType::kFloat64 : CostType::kFloat32, c.persons, c.objects, c.objects, 1};
  }
  AssignGroup group;
  return matcher::assign_and_write(group, problem, c, memory.problem, result);
}

}  // namespace fastmask::FASTMASK_SIMD
