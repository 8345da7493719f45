// What one of 32 lanes does in each step over a row, and how the results of two lanes combine. A CUDA warp runs the
// lanes at once, the serial group one after another.
#pragma once

#include "matcher/assign.h"

namespace fastmask::matcher {

template <class Group>
FASTMASK_GROUP_FN Best combine(const Best& a, const Best& b) {
  const bool first = a.first < b.first || (a.first == b.first && a.index < b.index);
  const int32_t loser = first ? b.first : a.first;
  const int32_t second = a.second < b.second ? a.second : b.second;
  return {first ? a.first : b.first, first ? a.index : b.index, loser < second ? loser : second};
}

template <class Group>
FASTMASK_GROUP_FN Nearest combine(const Nearest& a, const Nearest& b) {
  const uint32_t x = static_cast<uint32_t>(a.distance), y = static_cast<uint32_t>(b.distance);
  return x < y || (x == y && a.index < b.index) ? a : b;
}

template <class Group>
FASTMASK_GROUP_FN Candidate combine(const Candidate& a, const Candidate& b) {
  return before<Group>(a, b) ? a : b;
}

// Whether a person bids in the next round. Each person checks whether its object has another owner: if the winner
// changed the phase instead, the person's thread might be reading it.
template <class Group>
FASTMASK_GROUP_FN bool rejoins(const State& s, int32_t person) {
  if (s.phase[person] == kAssigned && s.owner[s.object[person]] != person) evict<Group>(s, person);
  return s.phase[person] == kBidding;
}

template <class Group>
FASTMASK_GROUP_FN Best lane_scan(const int32_t* row, const int32_t* price, int32_t stride, int32_t lane) {
  Best best = {INT32_MAX, INT32_MAX, INT32_MAX};
  for (int32_t k = lane; k < stride; k += kWarp) {
    const int32_t sum = row[k] + price[k];
    if (sum < best.first) {
      best = {sum, k, best.first};
    } else if (sum < best.second) {
      best.second = sum;
    }
  }
  return best;
}

// The cyclic distance from `from` to the first k with row[k] + price[k] == sum.
template <class Group>
FASTMASK_GROUP_FN uint32_t lane_first_equal(const int32_t* row, const int32_t* price, int32_t stride, int32_t sum,
                                            int32_t from, int32_t lane) {
  uint32_t least = UINT32_MAX;
  for (int32_t k = lane; k < stride; k += kWarp) {
    const uint32_t distance = static_cast<uint32_t>(k < from ? k - from + stride : k - from);
    if (row[k] + price[k] == sum && distance < least) least = distance;
  }
  return least;
}

template <class Group>
FASTMASK_GROUP_FN Nearest lane_start(const int32_t* row, const int32_t* price, int32_t person, int32_t* distance,
                                     int32_t* predecessor, int32_t stride, int32_t lane) {
  Nearest nearest = {-1, INT32_MAX};
  for (int32_t k = lane; k < stride; k += kWarp) {
    const int32_t sum = row[k] + price[k];
    distance[k] = sum;
    predecessor[k] = person;
    if (static_cast<uint32_t>(sum) < static_cast<uint32_t>(nearest.distance)) nearest = {sum, k};
  }
  return nearest;
}

template <class Group>
FASTMASK_GROUP_FN Nearest lane_start_dummy(const int32_t* row, const int32_t* price, int32_t* distance,
                                           int32_t* predecessor, int32_t stride, int32_t lane, bool& nobodys) {
  Nearest nearest = {-1, INT32_MAX};
  for (int32_t k = lane; k < stride; k += kWarp) {
    const int32_t sum = row[k] + price[k];
    nobodys = nobodys || (sum > 0 && (sum & kOwned) == 0);
    const int32_t now = sum == 0 ? kScanned : sum;
    distance[k] = now;
    predecessor[k] = kNobody;
    if (static_cast<uint32_t>(now) < static_cast<uint32_t>(nearest.distance)) nearest = {now, k};
  }
  return nearest;
}

template <class Group>
FASTMASK_GROUP_FN Nearest lane_relax(const int32_t* row, const int32_t* price, int32_t shift, int32_t person,
                                     int32_t* distance, int32_t* predecessor, int32_t stride, int32_t lane) {
  Nearest nearest = {-1, INT32_MAX};
  for (int32_t k = lane; k < stride; k += kWarp) {
    const int32_t candidate = row[k] + (price[k] - shift);
    int32_t now = distance[k];
    if (candidate < now) {
      now = candidate;
      distance[k] = candidate;
      predecessor[k] = person;
    }
    if (static_cast<uint32_t>(now) < static_cast<uint32_t>(nearest.distance)) nearest = {now, k};
  }
  return nearest;
}

template <class Group>
FASTMASK_GROUP_FN int32_t fixed_point(double cost, double offset, double scale) {
  return is_finite<Group>(cost) ? 2 * static_cast<int32_t>((cost - offset) * scale) : kRange;
}

template <class Group>
FASTMASK_GROUP_FN int32_t fixed_point_left(double cost, double price, double offset, double scale, double limit) {
  if (!is_finite<Group>(cost)) return kRange;
  const double left = ((cost + price) - offset) * scale + 1;
  return 2 * static_cast<int32_t>(left < 0 ? 0 : left < limit ? left : limit);
}

// Halves a column of costs, and returns the sum of its costs / 2^shift.
template <class Group>
FASTMASK_GROUP_FN int32_t lane_halve_and_sum(int32_t* column, int32_t rows, int32_t stride, int32_t shift) {
  int32_t sum = 0;
  for (int32_t i = 0; i < rows; ++i) {
    int32_t& cost = column[static_cast<int64_t>(i) * stride];
    if (cost < kPadding) cost = (cost >> 1) & ~1;
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(cost >> shift));
  }
  return sum;
}

// The most that a row offers for this column: max over the rows of sum - cost.
template <class Group>
FASTMASK_GROUP_FN int32_t lane_best_offer(const int32_t* column, const int32_t* sum, int32_t rows, int32_t stride) {
  int32_t best = INT32_MIN;
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t offer = sum[i] - column[static_cast<int64_t>(i) * stride];
    best = offer > best ? offer : best;
  }
  return best;
}

}  // namespace fastmask::matcher
