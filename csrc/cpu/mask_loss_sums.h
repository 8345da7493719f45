// Computes a matched pair's losses, and the slopes of its dice loss, from its sums.
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

// The dice loss by the probability of a pixel inside the target, and of one outside: with U = sum p + sum t + 1 and
// I = 2 sum p t + 1, d dice / dp = (I - 2 t U) / U^2.
struct DiceSlopes {
  float inside, outside;
};

static inline DiceSlopes dice_slopes(const MaskLossSums& sums) {
  const double both = static_cast<double>(sums.prediction) + sums.target + 1.0;
  const double twice_overlap = 2.0 * sums.intersection + 1.0, squared = both * both;
  return {static_cast<float>((twice_overlap - 2.0 * both) / squared), static_cast<float>(twice_overlap / squared)};
}

}  // namespace fastmask::FASTMASK_SIMD
