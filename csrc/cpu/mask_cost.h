// The matching cost of one query against every target of its image.
#pragma once

#include <cstdint>

#include "common/coverage.h"
#include "common/dtype.h"
#include "common/mask_term.h"
#include "common/simd.h"

namespace fastmask {

struct MaskCostWeights {
  float cost_class, cost_mask, cost_dice;
};

constexpr int64_t kMaskCostBlock = 1024;  // pixels whose per-pixel terms stay in the L1 cache

// Sums over each target's pixels: p, F+ and F-. F+ - F- in one sum would do, but where F- is large inside the target it
// cancels against the total, and on small maps its rounding shows.
constexpr int kMaskCostSums = 3;

// Floats of scratch memory that mask_cost_row needs for `targets` targets.
static constexpr int64_t mask_cost_scratch(int64_t targets) {
  return (1 + kMaskCostSums) * kMaskCostBlock + kMaskCostSums * kChunk * targets;
}

// cost[m] = cost_class * (-softmax(class_logits)[labels[m]]) + cost_mask * mask term + cost_dice * dice term,
// with the sums over the counted pixels c of the h x w grid
//   focal[m] = (sum_c F+[c] T[m,c] + sum_c F-[c] - sum_c F-[c] T[m,c]) / pixels,
//   dice[m] = 1 - (2 sum_c p[c] T[m,c] + 1) / (sum_c p[c] + sum_c T[m,c] + 1).
//
//   class_logits  [classes], last is no-object, from element class_offset on
//   mask_logits   [h * w], from element mask_offset on
//   labels        [coverage.targets]
//   cost          [coverage.targets]
FASTMASK_KERNEL(void mask_cost_row(const void* class_logits, int64_t class_offset, int64_t classes, Dtype class_dtype,
                                   const void* mask_logits, int64_t mask_offset, int64_t pixels, Dtype mask_dtype,
                                   const int64_t* labels, const CoverageView& coverage, MaskTerm term,
                                   MaskCostWeights weights, float* scratch, float* cost))

}  // namespace fastmask
