// Random points of one matched pair, most of them where its query's mask is least certain.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/points.h"
#include "common/simd.h"

namespace fastmask {

// How many points to draw: `uncertain` of `candidates`, and the rest of `points` anywhere.
struct PointCounts {
  int64_t points, candidates, uncertain;
};

constexpr int64_t kPointBatch = 64;  // points drawn at a time, from 16 counters

struct UncertainPointsWorkspace {
  float* map;       // of logits, with a border
  int32_t* words;   // [candidates], of those that are kept, and room for a vector
  int32_t* keys;    // the same
  int32_t* passed;  // the same, of the keys that a pass keeps

  void lay_out(Carver& carver, int64_t h, int64_t w, PointCounts counts) {
    const int64_t candidates = counts.candidates + kMostLanes;
    carver.take(map, bordered_size(h, w));
    carver.take(words, candidates);
    carver.take(keys, candidates);
    carver.take(passed, candidates);
  }
};

// points [counts.points, 2]: among the first `candidates` points of row `row` of the random stream, the `uncertain`
// points with the smallest |logit|, in order (NaN counts as smallest; among equals the earlier points are taken);
// followed by the next points of the stream.
FASTMASK_KERNEL(void uncertain_points_pair(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                                           const UncertainPointsWorkspace& work, float* points))

}  // namespace fastmask
