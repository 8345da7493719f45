// Computes a query's costs from the sums of its mask terms.
#pragma once

#include "cpu/mask_cost.h"
#include "cpu/simd/functions.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

// softmax[k] = exp(x[k] - maximum) / sum; NaN for all classes if any logit is NaN.
struct Softmax {
  float maximum;
  double sum;
};

// Reads the logits in blocks of kMaskCostBlock.
static inline Softmax softmax_of(Logits logits, int64_t classes, float* block) {
  float maximum = -__builtin_inff();
  bool nan = false;
  for (int64_t begin = 0; begin < classes; begin += kMaskCostBlock) {
    const int64_t count = classes - begin < kMaskCostBlock ? classes - begin : kMaskCostBlock;
    load_logits(after(logits, begin), count, block);
    for (int64_t i = 0; i < count; ++i) {
      nan |= block[i] != block[i];
      maximum = block[i] > maximum ? block[i] : maximum;
    }
  }
  double sum = 0;
  for (int64_t begin = 0; begin < classes; begin += kMaskCostBlock) {
    const int64_t count = classes - begin < kMaskCostBlock ? classes - begin : kMaskCostBlock;
    load_logits(after(logits, begin), count, block);
    for (int64_t i = count; i % kMostLanes != 0; ++i) block[i] = -__builtin_inff();
    vfloat lanes = {};
    for (int64_t i = 0; i < count; i += kLanes) lanes += exp_neg(maximum - load(block + i));
    sum += sum_lanes(lanes);
  }
  return {nan ? __builtin_nanf("") : maximum, sum};
}

static inline double probability_of(const Softmax& softmax, Logits logit) {
  float padded[kMostLanes];
  load_logits(logit, 1, padded);
  return exp_neg(splat(softmax.maximum - padded[0]))[0] / softmax.sum;
}

// Sums over all counted pixels or points; `counted` is their number or total weight.
struct CostTotals {
  double probability, negative;  // sums of p and F-
  double counted;
};

// Sums over the pixels or points of one target.
struct TargetSums {
  double probability, foreground, background;  // sums of p, F+ and F-
};

// Writes the costs of the targets; sums_of(m) returns the TargetSums of target m.
template <class Area, class SumsOf>
static inline void write_costs(Logits class_logits, int64_t classes, const int64_t* labels, int64_t targets,
                               const Area* areas, const CostTotals& totals, const MaskCostRule& rule, float* block,
                               const SumsOf& sums_of, float* cost) {
  const Softmax softmax = softmax_of(class_logits, classes, block);
  const double counted = totals.counted > 1.0 ? totals.counted : 1.0;
  for (int64_t m = 0; m < targets; ++m) {
    const TargetSums sums = sums_of(m);
    const double mask_cost = (sums.foreground + (totals.negative - sums.background)) / counted;
    const double dice_cost = 1.0 - (2.0 * sums.probability + 1.0) / (totals.probability + areas[m] + 1.0);
    const double probability = probability_of(softmax, after(class_logits, labels[m]));
    cost[m] =
        static_cast<float>(-rule.cost_class * probability + rule.cost_mask * mask_cost + rule.cost_dice * dice_cost);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
