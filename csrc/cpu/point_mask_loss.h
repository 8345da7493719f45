// Cross-entropy (or focal) and dice losses of one matched pair, at the pair's points.
//
// Each point reads the four logits and the four target pixels around it; nothing of size H * W is stored.
#pragma once

#include <cstdint>

#include "common/points.h"
#include "cpu/mask_loss.h"

namespace fastmask {

struct PointMaskLossWorkspace {
  float* map;     // the logits with a border
  float* slopes;  // [4] for each of its pixels: kMaskLossSlopes slopes and a zero

  void lay_out(Carver& carver, int64_t h, int64_t w, bool with_slopes) {
    carver.take(map, bordered_size(h, w));
    if (with_slopes) carver.take(slopes, 4 * bordered_size(h, w));
  }
};

// points [num_points, 2]; `target` is the index of the pair's target. In the sums, MaskLossSums, the points' weights
// replace the number of pixels. Unless `slopes` is null, it receives the derivatives of both losses by the logits,
// [2, h, w], summed point by point in order.
FASTMASK_KERNEL(MaskLossPair point_mask_loss_pair(const Plane& plane, const ImageTargets& targets, int64_t target,
                                                  const float* points, int64_t num_points, MaskTerm term,
                                                  const PointMaskLossWorkspace& work, float* slopes))

}  // namespace fastmask
