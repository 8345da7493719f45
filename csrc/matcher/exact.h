// Shortest augmenting paths in float64, for problems that fixed point cannot decide or whose costs are not all finite.
//
// A cost is a pair, (1, 0) if it is NaN or infinite and (0, cost) otherwise. Pairs are added like vectors and compared
// lexicographically, so the least total has the fewest costs that are not finite, and then the least finite sum.
#pragma once

#include "matcher/costs.h"
#include "matcher/state.h"

namespace fastmask::matcher {

struct Pair {
  int32_t broken;
  double finite;
};

// An object in the search, which takes the nearest first, then free before owned, then the lowest index.
struct Candidate {
  Pair length;
  int32_t rank;  // the object's index, + kOwnedRank if it is owned
};

constexpr int32_t kOwnedRank = 1 << 20;
constexpr Candidate kNoCandidate = {{INT32_MAX, 0}, INT32_MAX};

struct Exact {
  double* price;             // [objects]
  double* distance;          // [objects]
  int32_t* broken_price;     // [objects]
  int32_t* broken_distance;  // [objects]
  int32_t* done;             // [objects]

  // All arrays but the prices, which already have their memory.
  FASTMASK_HOST_DEVICE void lay_out(Carver& carver, const State& s) {
    carver.take(distance, s.stride);
    carver.take(broken_price, s.stride);
    carver.take(broken_distance, s.stride);
    carver.take(done, s.stride);
  }
};

template <class Group>
FASTMASK_GROUP_FN bool less(const Pair& a, const Pair& b) {
  return a.broken != b.broken ? a.broken < b.broken : a.finite < b.finite;
}

template <class Group>
FASTMASK_GROUP_FN bool before(const Candidate& a, const Candidate& b) {
  if (less<Group>(a.length, b.length)) return true;
  return !less<Group>(b.length, a.length) && a.rank < b.rank;
}

// cost[i][k] + price[k]
template <class Group>
FASTMASK_GROUP_FN Pair priced_cost(const Costs& c, const Exact& e, double scale, int32_t i, int32_t k) {
  const double cost = cost_at<Group>(c, i, k);
  const bool finite = is_finite<Group>(cost);
  return {e.broken_price[k] + !finite, e.price[k] + (finite ? cost * scale : 0.0)};
}

template <class Group>
FASTMASK_GROUP_FN void augment_exact(Group& group, const Costs& c, const State& s, const Exact& e, double scale,
                                     int32_t person) {
  Pair shift = {0, 0.0};
  int32_t from = person, count = 0;
  Candidate nearest;
  for (;;) {
    nearest = group.least(c.objects, [&](int32_t k) -> Candidate {
      Pair length = priced_cost<Group>(c, e, scale, from, k);
      length = {length.broken - shift.broken, length.finite - shift.finite};
      const Pair old = {e.broken_distance[k], e.distance[k]};
      if (count == 0) {
        e.done[k] = 0;
      } else if (e.done[k] != 0) {
        return kNoCandidate;
      }
      if (count == 0 || less<Group>(length, old)) {
        e.broken_distance[k] = length.broken;
        e.distance[k] = length.finite;
        s.predecessor[k] = from;
      } else {
        length = old;
      }
      return {length, k + (s.owner[k] == kNobody ? 0 : kOwnedRank)};
    });
    if (nearest.rank < kOwnedRank) break;
    const int32_t k = nearest.rank - kOwnedRank;
    from = s.owner[k];
    const Pair matched = priced_cost<Group>(c, e, scale, from, k);
    shift = {matched.broken - nearest.length.broken, matched.finite - nearest.length.finite};
    group.one([&] {
      e.done[k] = 1;
      s.scanned[count] = k;
    });
    ++count;
    group.fence();
  }
  for (int32_t n = group.lane(); n < count; n += group.lanes()) {
    const int32_t k = s.scanned[n];
    e.broken_price[k] += nearest.length.broken - e.broken_distance[k];
    e.price[k] += nearest.length.finite - e.distance[k];
  }
  group.fence();
  group.one([&] {
    int32_t k = nearest.rank;
    for (int32_t i = kNobody; i != person;) {
      i = s.predecessor[k];
      const int32_t next = s.object[i];
      s.owner[k] = i;
      s.object[i] = k;
      k = next;
    }
  });
  group.fence();
}

// Matches all persons. Costs are multiplied by `scale`, a power of two, so that sums of them stay finite.
template <class Group>
FASTMASK_GROUP_FN void solve_exact(Group& group, const Costs& c, const State& s, const Exact& e, double scale) {
  group.sync();
  group.elements(c.objects, [&](int32_t k) {
    e.price[k] = 0;
    e.broken_price[k] = 0;
    s.owner[k] = kNobody;
  });
  group.elements(c.persons, [&](int32_t i) { s.object[i] = kNobody; });
  group.sync();
  group.solo([&] {
    for (int32_t i = 0; i < c.persons; ++i) augment_exact(group, c, s, e, scale, i);
  });
  group.sync();
}

}  // namespace fastmask::matcher
