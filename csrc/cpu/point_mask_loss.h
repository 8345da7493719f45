// Cross-entropy (or focal) and dice losses of one matched pair, at points of its own.
//
// Each point takes four logits around it, and four pixels of the targets: nothing of size H * W is built.
#pragma once

#include <cstdint>

#include "common/bordered.h"
#include "cpu/mask_loss.h"

namespace fastmask {

// Floats of scratch memory of the two kernels: the logits, and their gradient.
static constexpr int64_t point_mask_loss_scratch(int64_t h, int64_t w) { return 2 * bordered_size(h, w); }

// mask_logits [h * w] from element `offset` on, points [num_points, 2]; `target` is the index of the pair's target.
// The sums are those of MaskLossSums with the points' weights in place of the number of pixels.
FASTMASK_KERNEL(MaskLossPair point_mask_loss_pair(const void* mask_logits, int64_t offset, Dtype dtype, int64_t h,
                                                  int64_t w, const ImageTargets& targets, int64_t target,
                                                  const float* points, int64_t num_points, MaskTerm term,
                                                  float* scratch))

// Adds the gradient of grad_mask * mask + grad_dice * dice to grad [h * w] float, the points in their order.
FASTMASK_KERNEL(void point_mask_loss_pair_backward(const void* mask_logits, int64_t offset, Dtype dtype, int64_t h,
                                                   int64_t w, const ImageTargets& targets, int64_t target,
                                                   const float* points, int64_t num_points, MaskTerm term,
                                                   const MaskLossSums& sums, float grad_mask, float grad_dice,
                                                   float* scratch, float* grad))

}  // namespace fastmask
