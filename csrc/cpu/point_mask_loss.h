// Cross-entropy (or focal) and dice losses of one matched pair, at the pair's points.
//
// Each point reads the four logits and the four target pixels around it; nothing of size H * W is stored.
#pragma once

#include <cstdint>

#include "common/points.h"
#include "cpu/mask_loss.h"

namespace fastmask {

// The map of logits with a border, and its gradient.
struct PointMaskLossWorkspace {
  float *map, *gradient;

  void lay_out(Carver& carver, int64_t h, int64_t w) {
    carver.take(map, bordered_size(h, w));
    carver.take(gradient, bordered_size(h, w));
  }
};

// points [num_points, 2]; `target` is the index of the pair's target. In the sums, MaskLossSums, the points' weights
// replace the number of pixels.
FASTMASK_KERNEL(MaskLossPair point_mask_loss_pair(const Plane& plane, const ImageTargets& targets, int64_t target,
                                                  const float* points, int64_t num_points, MaskTerm term,
                                                  const PointMaskLossWorkspace& work))

// Adds the gradient of a pair's losses to grad [h * w], point by point in order.
FASTMASK_KERNEL(void point_mask_loss_pair_backward(const Plane& plane, const ImageTargets& targets, int64_t target,
                                                   const float* points, int64_t num_points, MaskTerm term,
                                                   const MaskLossGradient& given, const PointMaskLossWorkspace& work,
                                                   float* grad))

}  // namespace fastmask
