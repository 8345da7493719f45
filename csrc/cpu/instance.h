// The binary mask x > 0 of one query, its area and extent, and the sum of sigmoid(x) inside it.
//
// If no logit that a tile reads is above 0, no pixel is either, so the tile is not resampled.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tiles.h"

namespace fastmask {

// One byte per pixel, or one bit with the first pixel in the lowest bit; rows are row_bytes apart.
struct MaskRows {
  uint8_t* data;
  int64_t row_bytes;
  bool packed;
};

struct InstanceSums {
  double foreground = 0;  // sum of sigmoid(x) over the mask
  int64_t area = 0;
  int64_t left = INT64_MAX, top = INT64_MAX, right = 0, bottom = 0;  // right and bottom exclusive
};

struct InstanceWorkspace {
  TileWorkspace tile;
  BandBounds bounds;

  void lay_out(Carver& carver, const TilePlans& plans, int64_t w) {
    tile.lay_out(carver, plans);
    bounds.lay_out(carver, w);
  }
};

// Writes one band of `mask`, which begins at the first pixel of the result and adds to `sums`.
// `plans` are those of the band's tiles.
FASTMASK_KERNEL(void instance_band(const Plane& plane, const TilePlan* plans, int64_t columns,
                                   const InstanceWorkspace& work, const MaskRows& mask, InstanceSums& sums))

}  // namespace fastmask
