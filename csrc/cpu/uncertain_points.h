// Random points of one matched pair, most of them where its query's mask is the least certain.
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

constexpr int64_t kPointBatch = 32;  // points of 16 counters: what is drawn at a time

struct UncertainPointsWorkspace {
  float* map;       // of logits, with a border
  float* stream;    // [drawn, 2] points
  int32_t* keys;    // [drawn]
  int32_t* passed;  // [drawn] those that a pass over the keys keeps

  void lay_out(Carver& carver, int64_t h, int64_t w, PointCounts counts) {
    const int64_t drawn = round_up(counts.candidates + counts.points - counts.uncertain, kPointBatch);
    carver.take(map, bordered_size(h, w));
    carver.take(stream, 2 * drawn);
    carver.take(keys, drawn);
    carver.take(passed, drawn);
  }
};

// points [counts.points, 2]: of the first `candidates` points of row `row` of the random stream the `uncertain` with
// the least |logit|, in their order, of equals the earlier, NaN before all; then the next points of the stream.
FASTMASK_KERNEL(void uncertain_points_pair(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                                           const UncertainPointsWorkspace& work, float* points))

}  // namespace fastmask
