// Computes a matched pair's losses from its sums.
#pragma once

#include "cpu/mask_loss.h"

namespace fastmask::FASTMASK_SIMD {

// `loss` and `counted` are sums over the counted pixels, or weighted sums over points.
static inline MaskLossPair losses_of(double loss, double intersection, double prediction, double target,
                                     double counted) {
  return {static_cast<float>(loss / (counted > 1.0 ? counted : 1.0)),
          static_cast<float>(1.0 - (2.0 * intersection + 1.0) / (prediction + target + 1.0)),
          {static_cast<float>(intersection), static_cast<float>(prediction), static_cast<float>(target),
           static_cast<float>(counted)}};
}

// With U = sum p + sum t + 1 and I = 2 sum p t + 1.
struct DiceSums {
  double both, twice_overlap;  // U, I

  explicit DiceSums(const MaskLossSums& sums)
      : both(static_cast<double>(sums.prediction) + sums.target + 1.0), twice_overlap(2.0 * sums.intersection + 1.0) {}
};

}  // namespace fastmask::FASTMASK_SIMD
