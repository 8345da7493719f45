#include "cpu/uncertain_points.h"

#include "ops/matched_pairs.h"

namespace fastmask {
namespace {

Tensor uncertain_points(Tensor mask_logits, Tensor assignment, Tensor seed, int64_t num_points, int64_t num_candidates,
                        int64_t num_uncertain) {
  const MaskLogits logits(mask_logits);
  check_tensor(assignment.dim() == 3, assignment, "assignment", "(L, B, M)");
  const int64_t max_targets = assignment.size(2);
  const Tensor queries = checked_assignment(assignment, logits, max_targets);
  check_tensor(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, seed, "seed", "one int64");
  constexpr int64_t kMost = int64_t{1} << 29;  // limited by 32-bit counters
  STD_TORCH_CHECK(0 <= num_uncertain && num_uncertain <= num_points && num_uncertain <= num_candidates &&
                      num_points < kMost && num_candidates < kMost,
                  "num_uncertain must lie in 0..num_points and 0..num_candidates, and those below ", kMost, ", got ",
                  num_uncertain, ", ", num_points, " and ", num_candidates);
  check_point_pixels(logits);
  const PointCounts counts{num_points, num_candidates, num_uncertain};

  Tensor points =
      empty_result(mask_logits, {logits.layers(), logits.batch(), max_targets, num_points, 2}, ScalarType::Float);
  if (points.numel() == 0) return points;  // an empty tensor may have a null address
  float* data = data_of<float>(points);
  const auto* query_data = data_of<const int64_t>(queries);
  const auto seed_value = static_cast<uint64_t>(*data_of<const int64_t>(seed));
  const auto pair_kernel = FASTMASK_SELECT(uncertain_points_pair);
  parallel_for(0, queries.numel(), 1, [&](int64_t begin, int64_t end, Scratch& scratch) {
    const auto work = scratch.lay_out<UncertainPointsWorkspace>(logits.h(), logits.w(), counts);
    for (int64_t i = begin; i < end; ++i) {
      float* of_pair = data + i * num_points * 2;
      if (query_data[i] < 0) {
        std::fill(of_pair, of_pair + num_points * 2, 0.0f);
        continue;
      }
      const Plane plane = logits.plane(i / max_targets * logits.queries() + query_data[i]);
      pair_kernel(plane, seed_value, static_cast<uint32_t>(i), counts, work, of_pair);
    }
  });
  return points;
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CPU, library) { library.impl("uncertain_points", TORCH_BOX(&fastmask::uncertain_points)); }
