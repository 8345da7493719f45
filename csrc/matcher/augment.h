// Shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987): Dijkstra's algorithm over the reduced costs
// q[i][k] + p[k] - (q + p of the object that i owns), from a person without an object to the nearest free object. Then
// the prices of the scanned objects rise by (length of the path - their own distance), and the path is switched.
#pragma once

#include "matcher/state.h"

namespace fastmask::matcher {

// Grows the tree of shortest paths from `nearest` on until the nearest object is free; returns it. `count` objects were
// scanned, in order in s.scanned.
template <class Group>
FASTMASK_GROUP_FN Nearest grow(Group& group, const State& s, Nearest nearest, int32_t& count) {
  count = 0;
  while ((nearest.distance & kOwned) != 0) {
    const int32_t k = nearest.index;
    const int32_t length = nearest.distance & ~kOwned;
    const int32_t i = s.owner[k];
    const int32_t* row = s.costs + static_cast<int64_t>(i) * s.stride;
    const int32_t shift = row[k] + (s.price[k] & ~kOwned) - length;
    group.one([&] {
      s.scanned[count] = k;
      s.scanned_distance[count] = length;
      group.mark_scanned(s.distance, k);
    });
    ++count;
    group.fence();
    nearest = group.relax(row, s.price, shift, i, s.distance, s.predecessor, s.stride);
  }
  return nearest;
}

// Gives object k to the person that reached it, that person's object to the one before, and so on up to `root`.
template <class Group>
FASTMASK_GROUP_FN int32_t switch_path(const State& s, int32_t k, int32_t root) {
  for (;;) {
    const int32_t i = s.predecessor[k];
    if (i == root && root == kNobody) return k;
    const int32_t next = s.object[i];
    s.owner[k] = i;
    s.object[i] = k;
    s.price[k] |= kOwned;
    if (i == root) return k;
    k = next;
  }
}

template <class Group>
FASTMASK_GROUP_FN void augment(Group& group, const State& s, int32_t person) {
  int32_t count;
  const int32_t* row = s.costs + static_cast<int64_t>(person) * s.stride;
  Nearest nearest = group.start(row, s.price, person, s.distance, s.predecessor, s.stride);
  nearest = grow(group, s, nearest, count);
  for (int32_t n = group.lane(); n < count; n += group.lanes()) {
    s.price[s.scanned[n]] += nearest.distance - s.scanned_distance[n];
  }
  group.fence();
  group.one([&] { switch_path<Group>(s, nearest.index, person); });
  group.fence();
}

}  // namespace fastmask::matcher
