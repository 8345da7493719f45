// Focal (or cross-entropy) and dice losses of one matched pair at the resolution of the targets.
//
// The h x w prediction is upsampled bilinearly to H x W (align_corners=False): horizontally once for each of its h
// rows, vertically for each of the H output rows. Nothing of size H * W is stored. The gradient needs no second pass:
// forward sums the slopes of both losses at the resolution of the logits.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/mask_term.h"
#include "common/simd.h"
#include "common/taps.h"
#include "common/targets.h"

namespace fastmask {

// The sums over the counted pixels of a pair from which both losses are computed.
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

// The rows of output pixels that are computed together if they lie between the same two rows of logits.
constexpr int64_t kMaskLossRows = 4;

// The slopes that forward sums at the resolution of the logits.
constexpr int kMaskLossSlopes = 3;

struct MaskLossWorkspace {
  float* source;        // [w] a row of logits, with room around it
  float* stretched[2];  // [W] two neighboring rows, stretched
  float* slopes[2];     // [kMaskLossSlopes, W] their slopes
  float* maps;          // [kMaskLossSlopes, h, w] the slopes at the resolution of the logits
  int8_t* codes;        // [W]
  int8_t* reordered;    // [kMaskLossRows, W]

  // `stretched_size` is the number of floats of a stretched row.
  void lay_out(Carver& carver, int64_t h, int64_t w, int64_t width, int64_t stretched_size, bool with_slopes) {
    carver.take(source, to_full_vectors(w) + 3 * kMostLanes);
    source += kMostLanes;
    for (float*& row : stretched) carver.take(row, stretched_size);
    carver.take(codes, to_full_vectors(width));
    carver.take(reordered, kMaskLossRows * stretched_size);
    if (!with_slopes) return;
    for (float*& row : slopes) {
      carver.take(row, kMostLanes + kMaskLossSlopes * stretched_size);
      row += kMostLanes;
    }
    carver.take(maps, kMaskLossSlopes * h * to_full_vectors(w));
  }
};

// The losses of a pair; `target` is the index of its target. Unless `slopes` is null, also the derivatives of both
// losses by the logits, [2, h, w].
FASTMASK_KERNEL(MaskLossPair mask_loss_pair(const Plane& plane, const Resampling& resampling,
                                            const ImageTargets& targets, int64_t target, MaskTerm term,
                                            const MaskLossWorkspace& work, float* slopes))

// grad[i] += mask * slopes[i] + dice * slopes[pixels + i]
FASTMASK_KERNEL(void add_slopes(const float* slopes, int64_t pixels, float mask, float dice, float* grad))

// Writes a row of `count` gradients from element `offset` on, rounded to the logits' type.
FASTMASK_KERNEL(void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset))

}  // namespace fastmask
