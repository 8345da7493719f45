// Focal (or cross-entropy) and dice losses of one matched pair at the resolution of the targets.
//
// The h x w prediction is upsampled bilinearly to H x W (align_corners=False) a row at a time: horizontally once for
// each of its h rows, vertically for each of the H output rows. Nothing of size H * W is stored.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/interpolation.h"
#include "common/mask_term.h"
#include "common/simd.h"
#include "common/targets.h"

namespace fastmask {

// What backward needs of a pair, and what both losses are made of; sums over the counted pixels.
struct MaskLossSums {
  float intersection;  // sum p t
  float prediction;    // sum p
  float target;        // sum t
  float pixels;        // counted pixels
};

struct MaskLossPair {
  float mask;  // mean over the counted pixels of the focal loss or cross-entropy
  float dice;  // 1 - (2 sum p t + 1) / (sum p + sum t + 1)
  MaskLossSums sums;
};

// Floats of scratch memory of the two kernels.
static constexpr int64_t mask_loss_scratch(int64_t width, int64_t w) { return 3 * padded_row(width) + padded_row(w); }
static constexpr int64_t mask_loss_backward_scratch(int64_t width, int64_t w) {
  return 5 * padded_row(width) + padded_row(w);
}

// mask_logits [h * w] from element `offset` on; `target` is the index of the pair's target.
FASTMASK_KERNEL(MaskLossPair mask_loss_pair(const void* mask_logits, int64_t offset, Dtype dtype,
                                            const Resampling& resampling, const ImageTargets& targets, int64_t target,
                                            MaskTerm term, float* scratch))

// Adds the gradient of grad_mask * mask + grad_dice * dice to grad [h * w] float. Each output pixel's interpolation is
// recomputed, and its gradient gathered into the logits it was made of.
FASTMASK_KERNEL(void mask_loss_pair_backward(const void* mask_logits, int64_t offset, Dtype dtype,
                                             const Resampling& resampling, const ImageTargets& targets, int64_t target,
                                             MaskTerm term, const MaskLossSums& sums, float grad_mask, float grad_dice,
                                             float* scratch, float* grad))

// Writes a row of `count` gradients from element `offset` on, rounded to the logits' type.
FASTMASK_KERNEL(void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset))

}  // namespace fastmask
