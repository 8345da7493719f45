// For each pixel the query that wins it, and for each query how many pixels it wins and its own mask has.
//
// A query wins where score * probability is highest. From the lowest and the highest logit that a tile reads follow
// bounds of its probabilities there; a query whose upper bound lies below another's lower bound cannot win in the tile.
// Where one query is left, or none of a tile's pixels can lie on the threshold's other side, nothing is resampled.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tiles.h"

namespace fastmask {

struct PanopticAreas {
  int64_t won, mask, visible;
};

// The queries of an image that were kept, in rising order.
struct KeptQueries {
  int64_t count;
  const Plane* planes;     // [count]
  const float* scores;     // [count], above 0
  const int32_t* queries;  // [count]
};

struct PanopticRule {
  bool clip_to_mask;      // a winner keeps a pixel only where its own mask has it
  float mask_threshold;   // of probabilities
  float logit_threshold;  // the same, of logits
};

// Floats of scratch memory, aligned to 64 bytes.
static constexpr int64_t panoptic_scratch(const TileScratchSizes& tile, int64_t kept) {
  return tile.total() + 4 * kTileRows * kTileColumns + 4 * padded_to_vectors(kept);
}

// Writes winner [rows.count, columns.count] of one tile, rows `width` apart, and adds to areas [kept.count].
FASTMASK_KERNEL(void panoptic_tile(const KeptQueries& kept, const TilePlan& plan, const PanopticRule& rule,
                                   const TileScratchSizes& sizes, float* scratch, int32_t* winner, int64_t width,
                                   PanopticAreas* areas))

}  // namespace fastmask
