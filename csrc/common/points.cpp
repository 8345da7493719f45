#include "common/points.h"

#include <algorithm>
#include <utility>

namespace fastmask {
namespace {

// The position of a coordinate in 0..1 on an axis of `size` pixels with a border pixel at each end: the first of the
// two pixels around it, 0..size, and the weight of the second. A coordinate off the map, or NaN, is on a border pixel.
struct Position {
  int64_t first;
  double weight;

  Position(float coordinate, int64_t size) {
    const double end = static_cast<double>(size) + 1.0;
    const double wanted = static_cast<double>(coordinate) * static_cast<double>(size) + 0.5;
    const double from_border = wanted > 0.0 ? std::min(wanted, end) : 0.0;
    first = std::min(static_cast<int64_t>(from_border), size);
    weight = from_border - static_cast<double>(first);
  }
};

// The pixels around a point in the targets' map. Pixels beyond the map are left out; they are neither target nor void.
struct Neighbors {
  int64_t pixels[4];
  double weights[4];
  int count = 0;

  Neighbors(float x, float y, int64_t height, int64_t width) {
    const Position columns(x, width), rows(y, height);
    for (int i = 0; i < 4; ++i) {
      const int64_t row = rows.first - 1 + i / 2, column = columns.first - 1 + i % 2;
      if (row < 0 || row >= height || column < 0 || column >= width) continue;
      const double row_weight = i / 2 == 1 ? rows.weight : 1.0 - rows.weight;
      const double column_weight = i % 2 == 1 ? columns.weight : 1.0 - columns.weight;
      pixels[count] = row * width + column;
      weights[count++] = row_weight * column_weight;
    }
  }
};

// Appends the shares of one point to `shares`; returns its weight.
double add_shares(const Neighbors& around, const ImageTargets& targets, std::vector<PointShare>& shares) {
  double weights[4];
  double void_share = 0;
  int counted = 0;
  for (int i = 0; i < around.count; ++i) {
    const bool counts = counts_pixel(targets, around.pixels[i]);
    weights[i] = counts ? around.weights[i] : 0.0;
    void_share += around.weights[i] - weights[i];
    counted += counts;
  }
  const double weight = 1.0 - void_share;
  if (weight < kLeastWeight) return 0;
  if (targets.segments != nullptr) {
    int64_t owners[4];
    for (int i = 0; i < around.count; ++i) owners[i] = segment_at(targets, around.pixels[i]);
    for (int i = 0; i < around.count; ++i) {
      if (owners[i] < 0 || owners[i] >= targets.count) continue;
      const int64_t owner = owners[i];
      double share = 0;
      int pixels = 0;
      for (int k = i; k < around.count; ++k) {
        if (owners[k] != owner) continue;
        share += weights[k];
        owners[k] = -1;
        ++pixels;
      }
      if (share > 0) shares.push_back({static_cast<int32_t>(owner), pixels == 4 ? 1.0f : static_cast<float>(share)});
    }
  } else {
    const int64_t plane = targets.height * targets.width;
    for (int64_t target = 0; target < targets.count; ++target) {
      const uint8_t* mask = targets.masks + target * plane;
      double share = 0;
      int pixels = 0;
      for (int i = 0; i < around.count; ++i) {
        if (mask[around.pixels[i]] == 0) continue;
        share += weights[i];
        ++pixels;
      }
      const bool whole = pixels == 4 && counted == 4;
      if (share > 0) shares.push_back({static_cast<int32_t>(target), whole ? 1.0f : static_cast<float>(share)});
    }
  }
  return weight;
}

}  // namespace

PointSet make_point_set(const float* points, int64_t num_points, const ImageTargets& targets, int64_t h, int64_t w,
                        int64_t band, int64_t bands) {
  struct Sortable {
    int32_t row, owner, column;
    float weight;
    int64_t point;
    int64_t begin, end;  // shares
  };
  // With the border, there are points in h + 1 rows.
  const int64_t first_row = (h + 1) * band / bands, last_row = (h + 1) * (band + 1) / bands;
  PointSet set;
  std::vector<Sortable> sorted;
  sorted.reserve(num_points / bands);
  std::vector<PointShare> shares;
  for (int64_t i = 0; i < num_points; ++i) {
    const float x = points[2 * i], y = points[2 * i + 1];
    const int64_t row = Position(y, h).first;
    if (row < first_row || row >= last_row) continue;
    const auto begin = static_cast<int64_t>(shares.size());
    const double weight = add_shares(Neighbors(x, y, targets.height, targets.width), targets, shares);
    const auto end = static_cast<int64_t>(shares.size());
    if (weight == 0) continue;
    int32_t owner = kMixed;
    if (weight == 1.0 && begin == end) owner = kBackground;
    if (weight == 1.0 && end == begin + 1 && shares[begin].share == 1.0f) owner = shares[begin].target;
    sorted.push_back({static_cast<int32_t>(row), owner, static_cast<int32_t>(Position(x, w).first),
                      static_cast<float>(weight), i, begin, end});
  }
  std::sort(sorted.begin(), sorted.end(), [](const Sortable& a, const Sortable& b) {
    if (a.row != b.row) return a.row < b.row;
    if (a.owner != b.owner) return a.owner < b.owner;
    return a.column != b.column ? a.column < b.column : a.point < b.point;
  });

  set.corners.reserve(sorted.size());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const Sortable& point = sorted[i];
    const double right = Position(points[2 * point.point], w).weight;
    const double lower = Position(points[2 * point.point + 1], h).weight;
    set.corners.push_back(
        {point.column,
         {static_cast<float>((1.0 - lower) * (1.0 - right)), static_cast<float>((1.0 - lower) * right),
          static_cast<float>(lower * (1.0 - right)), static_cast<float>(lower * right)}});
    if (set.runs.empty() || set.runs.back().row != point.row || set.runs.back().target != point.owner ||
        static_cast<int64_t>(i) - set.runs.back().begin == kLongestRun) {
      set.runs.push_back({static_cast<int64_t>(i), static_cast<int64_t>(i), point.row, point.owner});
    }
    set.runs.back().end = static_cast<int64_t>(i) + 1;
    if (point.owner != kMixed) continue;
    const auto begin = static_cast<int64_t>(set.shares.size());
    set.shares.insert(set.shares.end(), shares.begin() + point.begin, shares.begin() + point.end);
    set.mixed.push_back({point.weight, begin, static_cast<int64_t>(set.shares.size())});
  }
  return set;
}

PointSet join_bands(PointSet* bands, int64_t count, int64_t targets) {
  PointSet whole = std::move(bands[0]);
  for (const PointSet* band = bands + 1; band != bands + count; ++band) {
    const auto points = static_cast<int64_t>(whole.corners.size()), shares = static_cast<int64_t>(whole.shares.size());
    whole.corners.insert(whole.corners.end(), band->corners.begin(), band->corners.end());
    for (const PointRun& run : band->runs) {
      whole.runs.push_back({run.begin + points, run.end + points, run.row, run.target});
    }
    for (const MixedPoint& point : band->mixed) {
      whole.mixed.push_back({point.weight, point.begin + shares, point.end + shares});
    }
    whole.shares.insert(whole.shares.end(), band->shares.begin(), band->shares.end());
  }
  whole.areas.assign(targets, 0.0);
  for (const PointRun& run : whole.runs) {
    if (run.target == kMixed) continue;
    const auto points = static_cast<double>(run.end - run.begin);
    whole.weight += points;
    if (run.target != kBackground) whole.areas[run.target] += points;
  }
  for (const MixedPoint& point : whole.mixed) whole.weight += point.weight;
  for (const PointShare& share : whole.shares) whole.areas[share.target] += share.share;
  return whole;
}

}  // namespace fastmask
