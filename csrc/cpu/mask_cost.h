// The matching cost of one query against every target of its image.
#pragma once

#include <cstdint>

#include "common/coverage.h"
#include "common/logits.h"
#include "common/mask_term.h"
#include "common/simd.h"

namespace fastmask {

struct MaskCostRule {
  MaskTerm term;
  float cost_class, cost_mask, cost_dice;
};

constexpr int64_t kMaskCostBlock = kCoverageChunks * kChunk;  // pixels whose terms fit the L1 cache

// Sums over each target's pixels: p, F+ and F-. A single sum of F+ - F- would suffice, but if F- is large inside the
// target it cancels against the total, and its rounding is visible on small maps.
constexpr int kMaskCostSums = 3;

struct MaskCostWorkspace {
  float* block;  // [1 + kMaskCostSums, kMaskCostBlock], logits and their terms
  float* sums;   // [targets, kMaskCostSums, kChunk]

  void lay_out(Carver& carver, int64_t targets) {
    carver.take(block, (1 + kMaskCostSums) * kMaskCostBlock);
    carver.take(sums, targets * kMaskCostSums * kChunk);
  }
};

// cost[m] = cost_class * (-softmax(class_logits)[labels[m]]) + cost_mask * mask term + cost_dice * dice term,
// with the sums over the counted pixels c of the h x w grid
//   focal[m] = (sum_c F+[c] T[m,c] + sum_c F-[c] - sum_c F-[c] T[m,c]) / pixels,
//   dice[m] = 1 - (2 sum_c p[c] T[m,c] + 1) / (sum_c p[c] + sum_c T[m,c] + 1).
//
//   class_logits  [classes], last is no-object
//   mask_logits   [pixels], the h * w of the grid
//   labels        [coverage.targets]
//   cost          [coverage.targets]
FASTMASK_KERNEL(void mask_cost_row(Logits class_logits, int64_t classes, Logits mask_logits, int64_t pixels,
                                   const int64_t* labels, const CoverageView& coverage, const MaskCostRule& rule,
                                   const MaskCostWorkspace& work, float* cost))

}  // namespace fastmask
