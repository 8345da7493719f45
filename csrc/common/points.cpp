#include "common/points.h"

#include <algorithm>
#include <cstring>
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
  double weights[4] = {};
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

// A target that owns some of the pixels around a point: bit i for pixel i.
struct Owner {
  int32_t target;
  uint32_t pixels;
};

// The owners of the pixels around some points: those of point i are owners[begin[i]..begin[i + 1]).
struct Owners {
  std::vector<Owner> owners;
  std::vector<int64_t> begin{0};
};

Owners owners_in_segments(const std::vector<Neighbors>& points, const ImageTargets& targets) {
  Owners found;
  with_segments(targets, [&](const auto* segments) {
    for (const Neighbors& around : points) {
      const auto first = static_cast<int64_t>(found.owners.size());
      for (int i = 0; i < around.count; ++i) {
        const int64_t target = segments[around.pixels[i]];
        if (target < 0 || target >= targets.count) continue;
        auto owner = found.owners.begin() + first;
        while (owner != found.owners.end() && owner->target != target) ++owner;
        if (owner == found.owners.end()) owner = found.owners.insert(owner, {static_cast<int32_t>(target), 0});
        owner->pixels |= 1u << i;
      }
      found.begin.push_back(static_cast<int64_t>(found.owners.size()));
    }
  });
  return found;
}

// Looks at one mask after the other, each of which fits a cache, as points lie in no order.
Owners owners_in_masks(const std::vector<Neighbors>& points, const ImageTargets& targets) {
  struct OfPoint {
    int64_t point;
    Owner owner;
  };
  std::vector<OfPoint> by_target;
  Owners found;
  found.begin.assign(points.size() + 1, 0);
  std::vector<int64_t> upper_left;  // -1 for points with fewer than four neighbors
  upper_left.reserve(points.size());
  for (const Neighbors& around : points) upper_left.push_back(around.count == 4 ? around.pixels[0] : -1);
  for (int64_t target = 0; target < targets.count; ++target) {
    const uint8_t* mask = targets.masks + target * targets.height * targets.width;
    for (size_t point = 0; point < points.size(); ++point) {
      if (upper_left[point] >= 0) {
        uint16_t upper, lower;
        memcpy(&upper, mask + upper_left[point], sizeof upper);
        memcpy(&lower, mask + upper_left[point] + targets.width, sizeof lower);
        if ((upper | lower) == 0) continue;
      }
      const Neighbors& around = points[point];
      uint32_t pixels = 0;
      for (int i = 0; i < around.count; ++i) pixels |= static_cast<uint32_t>(mask[around.pixels[i]] != 0) << i;
      if (pixels == 0) continue;
      by_target.push_back({static_cast<int64_t>(point), {static_cast<int32_t>(target), pixels}});
      ++found.begin[point + 1];
    }
  }
  for (size_t point = 0; point < points.size(); ++point) found.begin[point + 1] += found.begin[point];
  found.owners.resize(by_target.size());
  std::vector<int64_t> next = found.begin;
  for (const OfPoint& of_point : by_target) found.owners[next[of_point.point]++] = of_point.owner;
  return found;
}

// Appends the shares of one point to `shares`; returns its weight.
double add_shares(const Neighbors& around, const ImageTargets& targets, const Owner* begin, const Owner* end,
                  std::vector<PointShare>& shares) {
  double weights[4];
  double void_share = 0;
  int counted = around.count;
  std::copy_n(around.weights, 4, weights);
  for (int i = 0; targets.ignore_void && i < around.count; ++i) {
    if (counts_pixel(targets, around.pixels[i])) continue;
    void_share += weights[i];
    weights[i] = 0.0;
    --counted;
  }
  const double weight = 1.0 - void_share;
  if (weight < kLeastWeight) return 0;
  for (const Owner* owner = begin; owner != end; ++owner) {
    if (owner->pixels == 15 && counted == 4) {
      shares.push_back({owner->target, 1.0f});
      continue;
    }
    double share = 0;
    for (int i = 0; i < around.count; ++i) share += (owner->pixels >> i & 1) != 0 ? weights[i] : 0.0;
    if (share > 0) shares.push_back({owner->target, static_cast<float>(share)});
  }
  return weight;
}

}  // namespace

PointSet make_point_set(const float* points, int64_t num_points, const ImageTargets& targets, int64_t h, int64_t w,
                        int64_t band, int64_t bands) {
  // With the border, there are points in h + 1 rows.
  const int64_t first_row = (h + 1) * band / bands, last_row = (h + 1) * (band + 1) / bands;
  std::vector<int64_t> chosen;
  std::vector<Neighbors> neighbors;
  chosen.reserve(num_points / bands);
  neighbors.reserve(num_points / bands);
  for (int64_t i = 0; i < num_points; ++i) {
    const float x = points[2 * i], y = points[2 * i + 1];
    const int64_t row = Position(y, h).first;
    if (row < first_row || row >= last_row) continue;
    chosen.push_back(i);
    neighbors.emplace_back(x, y, targets.height, targets.width);
  }
  const Owners found =
      targets.segments != nullptr ? owners_in_segments(neighbors, targets) : owners_in_masks(neighbors, targets);

  struct OfPoint {
    double weight;
    int64_t begin, end;  // shares
  };
  // By which the points of a row are sorted.
  struct Key {
    int32_t owner, column;
    uint32_t index;
    bool operator<(const Key& other) const {
      if (owner != other.owner) return owner < other.owner;
      return column != other.column ? column < other.column : index < other.index;
    }
  };
  std::vector<OfPoint> of_points;
  std::vector<PointShare> shares;
  std::vector<std::vector<Key>> rows(last_row - first_row);
  of_points.reserve(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) {
    const auto begin = static_cast<int64_t>(shares.size());
    const double weight = add_shares(neighbors[i], targets, found.owners.data() + found.begin[i],
                                     found.owners.data() + found.begin[i + 1], shares);
    const auto end = static_cast<int64_t>(shares.size());
    of_points.push_back({weight, begin, end});
    if (weight == 0) continue;
    int32_t owner = kMixed;
    if (weight == 1.0 && begin == end) owner = kBackground;
    if (weight == 1.0 && end == begin + 1 && shares[begin].share == 1.0f) owner = shares[begin].target;
    const float x = points[2 * chosen[i]], y = points[2 * chosen[i] + 1];
    rows[Position(y, h).first - first_row].push_back(
        {owner, static_cast<int32_t>(Position(x, w).first), static_cast<uint32_t>(i)});
  }

  PointSet set;
  set.corners.reserve(chosen.size());
  for (int64_t row = first_row; row < last_row; ++row) {
    std::vector<Key>& of_row = rows[row - first_row];
    std::sort(of_row.begin(), of_row.end());
    for (const Key& key : of_row) {
      const auto i = static_cast<int64_t>(set.corners.size());
      const double right = Position(points[2 * chosen[key.index]], w).weight;
      const double lower = Position(points[2 * chosen[key.index] + 1], h).weight;
      set.corners.push_back(
          {key.column,
           {static_cast<float>((1.0 - lower) * (1.0 - right)), static_cast<float>((1.0 - lower) * right),
            static_cast<float>(lower * (1.0 - right)), static_cast<float>(lower * right)}});
      if (set.runs.empty() || set.runs.back().row != row || set.runs.back().target != key.owner ||
          i - set.runs.back().begin == kLongestRun) {
        set.runs.push_back({i, i, static_cast<int32_t>(row), key.owner});
      }
      set.runs.back().end = i + 1;
      if (key.owner != kMixed) continue;
      const OfPoint& point = of_points[key.index];
      const auto begin = static_cast<int64_t>(set.shares.size());
      set.shares.insert(set.shares.end(), shares.begin() + point.begin, shares.begin() + point.end);
      set.mixed.push_back({static_cast<float>(point.weight), begin, static_cast<int64_t>(set.shares.size())});
    }
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
