// For each pixel the query that wins it, and for each query the number of pixels that it wins and that its mask has.
//
// A query wins where score * probability is highest. The lowest and the highest logit that a tile reads bound a query's
// probabilities there; a query whose upper bound is below another's lower bound cannot win in the tile. If one query is
// left, or no pixel of the tile can be on the other side of the threshold, nothing is resampled.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "common/tiles.h"

namespace fastmask {

struct PanopticAreas {
  int64_t won, mask, visible;
};

// The kept queries of an image, in ascending order.
struct KeptQueries {
  int64_t count;
  const Plane* planes;     // [count]
  const float* scores;     // [count], above 0
  const int32_t* queries;  // [count]
};

struct PanopticRule {
  bool clip_to_mask;      // a winner keeps a pixel only if its own mask contains it
  float mask_threshold;   // as a probability
  float logit_threshold;  // the same as a logit
};

// The winner of each pixel of a tile so far: 2 * i + 1 if kept query i keeps the pixel, 2 * i if it does not; and the
// winner's score * probability as a fraction.
struct PanopticWinners {
  float *numerator, *denominator;  // [kTileRows * kTileColumns]
  int32_t* winner;                 // [kTileRows * kTileColumns]
};

// Bounds for each kept query in a tile.
struct PanopticOutlook {
  float *low, *high;     // of its logits
  float *lower, *upper;  // of score * probability; lower is 0 where a NaN is read
};

struct PanopticWorkspace {
  TileWorkspace tile;
  PanopticWinners winners;
  PanopticOutlook outlook;

  void lay_out(Carver& carver, const TilePlans& plans, int64_t kept) {
    tile.lay_out(carver, plans);
    for (float** values : {&winners.numerator, &winners.denominator}) carver.take(*values, kTileRows * kTileColumns);
    carver.take(winners.winner, kTileRows * kTileColumns);
    for (float** bounds : {&outlook.low, &outlook.high, &outlook.lower, &outlook.upper}) {
      carver.take(*bounds, to_full_vectors(kept));
    }
  }
};

// Writes winner [rows.count, columns.count] of one tile, rows `width` apart, and adds to areas [kept.count].
FASTMASK_KERNEL(void panoptic_tile(const KeptQueries& kept, const TilePlan& plan, const PanopticRule& rule,
                                   const PanopticWorkspace& work, int32_t* winner, int64_t width, PanopticAreas* areas))

}  // namespace fastmask
