// Solves one problem in fixed point: the auction, then shortest augmenting paths for the persons left without an
// object.
#pragma once

#include "matcher/auction.h"
#include "matcher/augment.h"
#include "matcher/prices.h"
#include "matcher/state.h"

namespace fastmask::matcher {

template <class Group>
FASTMASK_GROUP_FN void reset(Group& group, const State& s) {
  // Captured by value, so that the compiler knows that no store changes a pointer.
  group.elements(s.stride, [price = s.price, owner = s.owner, bid = s.best_bid, objects = s.objects](int32_t k) {
    price[k] = k < objects ? 0 : kOwned;
    owner[k] = kNobody;
    bid[k] = 0;
  });
  group.elements(s.persons, [object = s.object, phase = s.phase, evictions = s.evictions](int32_t i) {
    object[i] = kNobody;
    phase[i] = kBidding;
    evictions[i] = 0;
  });
  group.enlist(s);
  group.sync();
}

// Matches all persons at the least total cost. Returns whether the costs were halved on the way.
//
// If the persons want only a few objects, the auction would be a long price war; the sign is that more than half of
// them (square) or three quarters (rectangular) are outbid in the first round. Bids with a raise of 0 do not count, as
// their persons have another object. `priced` problems come with the dummies' costs and start from zero prices.
template <class Group>
FASTMASK_GROUP_FN bool solve(Group& group, const State& s, bool priced) {
  reset(group, s);
  int32_t round = 1;
  bool structured = false;
  place_bids(group, s, round);
  if (!priced && s.persons > 2) {
    const int32_t outbid =
        group.count(s.persons, [&](int32_t i) { return !won<Group>(s, i) && raise_of<Group>(s.bid[i]) > 0; });
    structured = s.persons == s.objects ? outbid * 2 > s.persons : outbid * 4 > s.persons * 3;
    if (structured) {
      reset(group, s);
      set_structured_prices(group, s);
      place_bids(group, s, ++round);
    }
  }
  for (;;) {
    settle_bids(group, s);
    if (!group.next_round(s) || round == kMaxRounds) break;
    place_bids(group, s, ++round);
  }
  group.solo([&] {
    for (int32_t i = 0; i < s.persons; ++i) {
      if (s.object[i] == kNobody) augment(group, s, i);
    }
  });
  group.sync();
  if (s.persons < s.objects && (structured || priced)) {
    const int32_t nobodys = group.count(s.objects, [price = s.price, dummy = s.dummy](int32_t k) {
      return static_cast<int32_t>((price[k] & kOwned) == 0 && dummy[k] + price[k] > 0);
    });
    // This reads all costs, which pays off if it shortens a few searches.
    if (nobodys > 4) lower_free_prices(group, s);
    if (nobodys > 0) group.solo([&] { settle_dummies(group, s); });
    group.sync();
  }
  return structured;
}

}  // namespace fastmask::matcher
