// Focal (or cross-entropy) and dice losses of one matched pair at the resolution of the targets.
//
// The h x w prediction is upsampled bilinearly to H x W (align_corners=False) a row at a time: horizontally once for
// each of its h rows, vertically for each of the H output rows. Nothing of size H * W is stored.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/mask_term.h"
#include "common/simd.h"
#include "common/taps.h"
#include "common/targets.h"

namespace fastmask {

// The sums over the counted pixels of a pair from which both losses, and their gradients, are computed.
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

// Backward's arguments for a pair.
struct MaskLossGradient {
  float mask, dice;  // the gradients of both losses
  MaskLossSums sums;
};

struct MaskLossWorkspace {
  float* source;        // [w] a row of logits
  float* stretched[2];  // [W] two neighboring rows, upsampled horizontally
  float* gradients[2];  // [W] their gradients
  uint8_t* codes;       // [W]

  void lay_out(Carver& carver, int64_t w, int64_t width) {
    carver.take(source, to_full_vectors(w));
    for (float*& row : stretched) carver.take(row, to_full_vectors(width));
    for (float*& row : gradients) carver.take(row, to_full_vectors(width));
    carver.take(codes, to_full_vectors(width));
  }
};

// `target` is the index of the pair's target.
FASTMASK_KERNEL(MaskLossPair mask_loss_pair(const Plane& plane, const Resampling& resampling,
                                            const ImageTargets& targets, int64_t target, MaskTerm term,
                                            const MaskLossWorkspace& work))

// Adds the gradient of a pair's losses to grad [h * w]. Each output pixel's interpolation is recomputed, and its
// gradient is added to the logits from which it was interpolated.
FASTMASK_KERNEL(void mask_loss_pair_backward(const Plane& plane, const Resampling& resampling,
                                             const ImageTargets& targets, int64_t target, MaskTerm term,
                                             const MaskLossGradient& given, const MaskLossWorkspace& work, float* grad))

// Writes a row of `count` gradients from element `offset` on, rounded to the logits' type.
FASTMASK_KERNEL(void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset))

}  // namespace fastmask
