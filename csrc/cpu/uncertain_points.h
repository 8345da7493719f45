// Random points of one matched pair, most of them where its query's mask is the least certain.
#pragma once

#include <cstdint>

#include "common/bordered.h"
#include "common/dtype.h"
#include "common/simd.h"

namespace fastmask {

// How many points to draw: `uncertain` of `candidates`, and the rest of `points` anywhere.
struct PointCounts {
  int64_t points, candidates, uncertain;
};

constexpr int64_t kPointBatch = 32;  // points of 16 counters: what is drawn at a time

// Floats of scratch memory that uncertain_points_pair needs.
static constexpr int64_t uncertain_points_scratch(int64_t h, int64_t w, PointCounts counts) {
  const int64_t drawn = counts.candidates + counts.points - counts.uncertain;
  return bordered_size(h, w) + 4 * (drawn + kPointBatch);
}

// points [counts.points, 2]: of the first `candidates` points of row `row` of the random stream the `uncertain` with
// the least |logit|, in their order, of equals the earlier, NaN before all; then the next points of the stream.
//
//   mask_logits  [h * w] from element `offset` on
FASTMASK_KERNEL(void uncertain_points_pair(const void* mask_logits, int64_t offset, Dtype dtype, int64_t h, int64_t w,
                                           uint64_t seed, uint32_t row, PointCounts counts, float* scratch,
                                           float* points))

}  // namespace fastmask
