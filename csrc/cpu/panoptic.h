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
  const int32_t* nans;     // [count], how many of its logits are NaN
};

struct PanopticRule {
  bool clip_to_mask;      // a winner keeps a pixel only if its own mask contains it
  float mask_threshold;   // as a probability
  float logit_threshold;  // the same as a logit
};

// The winner of each pixel of a tile so far: 2 * n + 1 if query n keeps the pixel, 2 * n if it does not; and the
// winner's score * probability as a fraction.
struct PanopticWinners {
  float *numerator, *denominator;  // [kTileRows * kTileColumns]
  int32_t* winner;                 // [kTileRows * kTileColumns]
};

// Bounds for each kept query in a tile.
struct PanopticOutlook {
  float *low, *high;     // of its logits, or of its probabilities if there are two steps
  float *lower, *upper;  // of score * probability; lower is 0 if a logit of the query is NaN
};

struct PanopticWorkspace {
  TileWorkspace tile;
  PanopticWinners winners;
  BandBounds bounds;
  PanopticOutlook outlook;  // [columns of tiles, kept, rounded up]

  void lay_out(Carver& carver, const TilePlans& plans, int64_t kept, int64_t w) {
    tile.lay_out(carver, plans);
    bounds.lay_out(carver, w);
    for (float** values : {&winners.numerator, &winners.denominator}) carver.take(*values, kTileRows * kTileColumns);
    carver.take(winners.winner, kTileRows * kTileColumns);
    for (float** values : {&outlook.low, &outlook.high, &outlook.lower, &outlook.upper}) {
      carver.take(*values, plans.columns() * to_full_vectors(kept));
    }
  }
};

// Writes winner [rows.count, W] of one band, whose tiles have the `plans`, and adds to areas [kept.count].
FASTMASK_KERNEL(void panoptic_band(const KeptQueries& kept, const TilePlan* plans, int64_t columns,
                                   const PanopticRule& rule, const PanopticWorkspace& work, int32_t* winner,
                                   int64_t width, PanopticAreas* areas))

}  // namespace fastmask
