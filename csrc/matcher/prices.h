// Starting prices for problems in which all persons want the same few objects, and their repair afterwards.
#pragma once

#include "matcher/augment.h"
#include "matcher/state.h"

namespace fastmask::matcher {

// p[k] = max(0, T - mean over the persons of q[i][k]), with T near the (persons + 1)-th smallest mean, or the largest
// if there are fewer: the advantage of cheap objects over those that remain free. Halves the costs first, to avoid
// overflow.
template <class Group>
FASTMASK_GROUP_FN void set_structured_prices(Group& group, const State& s) {
  // A cost is below 2^28, so that persons times costs / 2^shift fits 32 bits.
  int32_t shift = 0;
  while ((s.persons >> (shift + 3)) != 0) ++shift;
  int32_t* sum = s.distance;
  group.halve_and_sum(s.costs, s.persons, s.stride, shift, sum);
  group.sync();
  // Bisects for the threshold that more than `rank` sums are below; to 1/2^16, as any threshold gives valid prices.
  const int32_t rank = s.persons < s.objects ? s.persons : s.objects - 1;
  int32_t low = 0, high = INT32_MAX;
  while (high - low > 1 << 15) {
    const int32_t middle = low + (high - low) / 2;
    if (group.count_up_to(sum, s.objects, middle) > rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  // float32 rounds alike on all processors; a division for each object would take as long as the sums.
  const float mean = static_cast<float>(1 << shift) / static_cast<float>(s.persons);
  int32_t* price = s.price;
  group.elements(s.objects, [=](int32_t k) {
    const int32_t advance = sum[k] < high ? high - sum[k] : 0;
    price[k] = static_cast<int32_t>(static_cast<float>(advance) * mean) & ~kOwned;
  });
  group.sync();
}

// Lowers the price of each free object until the first person, or a dummy (see settle_dummies), would want it: to
// p[k] = max(max over the persons of u[i] - q[i][k], -dummy[k]), where u[i] is the sum that person i pays now.
template <class Group>
FASTMASK_GROUP_FN void lower_free_prices(Group& group, const State& s) {
  int32_t* sum = s.choice;
  int32_t* offer = s.distance;
  group.elements(s.persons, [&](int32_t i) {
    const int32_t k = s.object[i];
    sum[i] = s.costs[static_cast<int64_t>(i) * s.stride + k] + (s.price[k] & ~kOwned);
  });
  group.sync();
  group.best_offers(s.costs, sum, s.persons, s.stride, offer);
  group.sync();
  group.elements(s.objects, [price = s.price, dummy = s.dummy, offer](int32_t k) {
    if ((price[k] & kOwned) != 0) return;
    const int32_t least = offer[k] > -dummy[k] ? offer[k] : -dummy[k];
    price[k] = least < price[k] ? least : price[k];
  });
  group.sync();
}

// If prices did not start from zero, a free object may keep a positive price, and the matching need not be the best
// even though no person prefers another object. So let each of the (objects - persons) extra objects be owned by a
// dummy person, who pays dummy[k] for object k: a dummy owns a free object if dummy[k] + p[k] = 0, the minimum. While
// some free object is owned by nobody, a shortest path from a dummy to the nearest such object is applied. All prices
// fall by the length of the path, which keeps the dummies at 0.
template <class Group>
FASTMASK_GROUP_FN void settle_dummies(Group& group, const State& s) {
  for (;;) {
    bool nobodys;
    Nearest nearest = group.start_dummy(s.dummy, s.price, s.distance, s.predecessor, s.stride, nobodys);
    if (!nobodys) return;
    int32_t count;
    nearest = grow(group, s, nearest, count);
    group.lower(s.price, s.distance, nearest.distance, s.stride);
    group.fence();
    for (int32_t n = group.lane(); n < count; n += group.lanes()) {
      s.price[s.scanned[n]] -= s.scanned_distance[n];
    }
    group.fence();
    group.one([&] {
      const int32_t released = switch_path<Group>(s, nearest.index, kNobody);
      s.owner[released] = kNobody;
      s.price[released] &= ~kOwned;
    });
    group.fence();
  }
}

}  // namespace fastmask::matcher
