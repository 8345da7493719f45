// The matching cost of some queries of one image against all of its targets, at points that they share.
//
// A vector holds the same point of as many queries: logits are turned from rows of queries into columns, a row of the
// map at a time, so that a point's four neighbors are four loads, without a gather, and the sums of a run of points
// stay in registers.
#pragma once

#include <cstdint>

#include "common/points.h"
#include "cpu/mask_cost.h"

namespace fastmask {

constexpr int64_t kPointCostGroup = 16;  // most queries of a group

// Floats of scratch memory that point_mask_cost_group needs.
static constexpr int64_t point_mask_cost_scratch(int64_t targets, int64_t w) {
  const int64_t padded = (w + 15) / 16 * 16;
  return kMaskCostBlock + kPointCostGroup * (3 * padded + 4 + 9 * (targets + 1));
}

// cost[m] of `queries` queries (at most one a lane of the SIMD level, point_mask_cost_lanes()), each as in mask_cost.h
// with the points in place of the pixels.
//
//   class_offsets, mask_offsets  [queries] the first element of each query's class logits [classes] and plane [h * w]
//   labels                       [points.targets]
//   cost                         [queries] rows of points.targets, one at each of `cost_rows`
FASTMASK_KERNEL(void point_mask_cost_group(const void* class_logits, const int64_t* class_offsets, int64_t classes,
                                           Dtype class_dtype, const void* mask_logits, const int64_t* mask_offsets,
                                           int64_t h, int64_t w, Dtype mask_dtype, int64_t queries,
                                           const int64_t* labels, const PointView& points, MaskTerm term,
                                           MaskCostWeights weights, float* scratch, float* const* cost_rows))

FASTMASK_KERNEL(int64_t point_mask_cost_lanes())

}  // namespace fastmask
