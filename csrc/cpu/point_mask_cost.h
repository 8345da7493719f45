// The matching cost of some queries of one image against all of its targets, at points that they share.
//
// A vector holds one point of several queries, one per lane: logits are transposed so that queries are innermost, one
// row of the map at a time. A point's four neighbors are then four loads, without a gather, and the sums of a run of
// points stay in registers.
#pragma once

#include <cstdint>

#include "common/points.h"
#include "cpu/mask_cost.h"

namespace fastmask {

struct PointMaskCostWorkspace {
  float* block;    // [kMaskCostBlock]
  double* sums;    // [targets + 1, kMaskCostSums, lanes], the last slot for all points together
  float* partial;  // the same, of the points since they were last added to `sums`
  float* lines;    // [lanes, w], a row of each query's map
  float* rows[2];  // [w + 2, lanes], two neighboring rows of the maps with their border

  void lay_out(Carver& carver, int64_t targets, int64_t w) {
    const int64_t padded = to_full_vectors(w);
    carver.take(block, kMaskCostBlock);
    carver.take(sums, (targets + 1) * kMaskCostSums * kMostLanes);
    carver.take(partial, (targets + 1) * kMaskCostSums * kMostLanes);
    carver.take(lines, padded * kMostLanes);
    for (float*& row : rows) carver.take(row, (padded + 2) * kMostLanes);
  }
};

// Writes the costs of `queries` queries, at most one per lane of the SIMD level (point_mask_cost_lanes()), as in
// mask_cost.h with points instead of pixels.
//
//   class_logits  [queries] of [classes] each
//   planes        [queries]
//   labels        [points.targets]
//   cost          [queries] rows of points.targets, one at each of `cost_rows`
FASTMASK_KERNEL(void point_mask_cost_group(const Logits* class_logits, int64_t classes, const Plane* planes,
                                           int64_t queries, const int64_t* labels, const PointView& points,
                                           const MaskCostRule& rule, const PointMaskCostWorkspace& work,
                                           float* const* cost_rows))

FASTMASK_KERNEL(int64_t point_mask_cost_lanes())

}  // namespace fastmask
