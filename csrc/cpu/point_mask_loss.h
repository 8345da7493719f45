// Cross-entropy (or focal) and dice losses of one matched pair, at the pair's points.
//
// Each point reads the four logits and the four target pixels around it; nothing of size H * W is stored.
#pragma once

#include <cstdint>

#include "common/points.h"
#include "cpu/mask_loss.h"

namespace fastmask {

struct PointMaskLossWorkspace {
  float* map;  // the logits with a border
  // If slopes are wanted, of each point: the slope of its mask loss before normalization, p (1 - p) times its share
  // inside and outside the target, and where it is between the four logits, of which the upper left one is at `cells`.
  float *mask_slopes, *inside, *outside, *right, *lower;
  int32_t* cells;
  float* slopes;  // [2] of each logit, with a border: of the mask loss and of the dice loss

  void lay_out(Carver& carver, int64_t h, int64_t w, int64_t num_points, bool with_slopes) {
    carver.take(map, bordered_size(h, w));
    if (!with_slopes) return;
    const int64_t padded = to_full_vectors(num_points);
    for (float** array : {&mask_slopes, &inside, &outside, &right, &lower}) carver.take(*array, padded);
    carver.take(cells, padded);
    carver.take(slopes, 2 * bordered_size(h, w));
  }
};

// points [num_points, 2]; `target` is the index of the pair's target. In the sums, MaskLossSums, the points' weights
// replace the number of pixels. Unless `slopes` is null, it receives the derivatives of both losses by the logits,
// [2, h, w], summed point by point in order.
FASTMASK_KERNEL(MaskLossPair point_mask_loss_pair(const Plane& plane, const ImageTargets& targets, int64_t target,
                                                  const float* points, int64_t num_points, MaskTerm term,
                                                  const PointMaskLossWorkspace& work, float* slopes))

}  // namespace fastmask
