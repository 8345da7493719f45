// The points of one image, sorted for the mask cost. All layers and queries share them, so they are prepared once.
//
// Most points lie inside one target or in the background, where a target's share of the point is one or zero. Sorted by
// row and target, they form runs, whose sums need neither multiplications nor the other targets: the cost grows with
// the points and the length of the outlines, not with the number of targets.
#pragma once

#include <cstdint>
#include <vector>

#include "common/targets.h"

namespace fastmask {

// The number of floats in a map of h x w logits with a border of zeros, so that every point of the unit square lies
// between four pixels. Rows may be written in steps of 16.
static constexpr int64_t bordered_size(int64_t h, int64_t w) { return (h + 2) * (w + 2) + 16; }

// A point's weight, 1 - its share of void pixels, counts as 0 below this, where it is a rounding error.
constexpr float kLeastWeight = 1e-6f;

constexpr int32_t kBackground = -1;
constexpr int32_t kMixed = -2;

// The four logits around a point in a map with a border of zeros: column `column` and the next one, in the run's row
// and the next one.
struct PointCorners {
  int32_t column;
  float weights[4];  // upper left, upper right, lower left, lower right
};

constexpr int64_t kLongestRun = 32;  // the most points whose terms are summed sequentially in float

struct PointRun {
  int64_t begin, end;  // points
  int32_t row;         // 0..h, with the border
  int32_t target;      // the target that owns the points, kBackground or kMixed
};

// A point with a weight below one, or one that several targets share.
struct MixedPoint {
  float weight;        // 1 - the share of void pixels
  int64_t begin, end;  // shares
};

struct PointShare {
  int32_t target;
  float share;  // bilinear share of the target's pixels
};

// Plain pointers for the kernels, whose SIMD levels must not share inline functions of the standard library.
struct PointView {
  const PointCorners* corners;
  const PointRun* runs;  // by row
  int64_t num_runs;
  const MixedPoint* mixed;  // in the order of the points of mixed runs
  const PointShare* shares;
  const double* areas;  // [targets] sum of each target's shares
  int64_t targets;
  double weight;  // sum over the points
};

struct PointSet {
  std::vector<PointCorners> corners;
  std::vector<PointRun> runs;
  std::vector<MixedPoint> mixed;
  std::vector<PointShare> shares;
  std::vector<double> areas;
  double weight = 0;

  PointView view() const {
    return {corners.data(), runs.data(),  static_cast<int64_t>(runs.size()),  mixed.data(),
            shares.data(),  areas.data(), static_cast<int64_t>(areas.size()), weight};
  }
};

// points [num_points, 2], (x, y) in 0..1; points of weight zero are left out. The map of logits has h x w pixels; the
// points are those of band `band` of `bands` of its rows. The sums `areas` and `weight` are not yet made.
PointSet make_point_set(const float* points, int64_t num_points, const ImageTargets& targets, int64_t h, int64_t w,
                        int64_t band, int64_t bands);

// The whole from its bands, of which there is at least one, with its sums for so many targets.
PointSet join_bands(PointSet* bands, int64_t count, int64_t targets);

}  // namespace fastmask
