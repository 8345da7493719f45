// The auction at epsilon 0 (Bertsekas, Annals of Operations Research 14, 1988), in Jacobi rounds.
//
// All persons without an object bid at once: person i offers to raise the price of its best object by second - best,
// which makes the best and second best equal for it. Among the bids for an object the largest raise wins, then the
// lowest person; the owner is evicted. A raise of 0 would only swap owners, and a person that was evicted kMaxEvictions
// times would continue a price war: both wait for the shortest augmenting paths. Among equally good objects person i
// takes the first from the i-th on, cyclically: if all took the lowest, each round would serve only one of them.
#pragma once

#include "matcher/state.h"

namespace fastmask::matcher {

constexpr int32_t kMaxEvictions = 2;

constexpr int32_t kMaxPersons = 65535;
constexpr int32_t kMaxRounds = 65535;  // persons who still bid then wait for the shortest augmenting paths

// Bids are compared by round, so that none need be cleared, then by raise, then by lowest person. Their bits: 16 for
// the round, 31 for the raise, 16 for the person.
template <class Group>
FASTMASK_GROUP_FN int64_t pack_bid(int32_t round, int32_t raise, int32_t person) {
  return (static_cast<int64_t>(round) << 47) | (static_cast<int64_t>(raise) << 16) | (kMaxPersons - person);
}

template <class Group>
FASTMASK_GROUP_FN int32_t raise_of(int64_t bid) {
  return static_cast<int32_t>((bid >> 16) & INT32_MAX);
}

template <class Group>
FASTMASK_GROUP_FN void place_bids(Group& group, const State& s, int32_t round) {
  group.bidders(s, [&](int32_t i) {
    const int32_t* row = s.costs + static_cast<int64_t>(i) * s.stride;
    Best best = group.scan(row, s.price, s.stride);
    if (best.first == best.second) best.index = group.first_equal(row, s.price, s.stride, best.first, i);
    const int32_t raise = best.second >= kPadding ? 0 : (best.second & ~kOwned) - (best.first & ~kOwned);
    group.one([&] {
      if (raise == 0 && (best.first & kOwned) != 0) {
        s.phase[i] = kWaiting;
        return;
      }
      s.choice[i] = best.index;
      s.bid[i] = pack_bid<Group>(round, raise, i);
      group.maximum(s.best_bid + best.index, s.bid[i]);
    });
  });
  group.sync();
}

template <class Group>
FASTMASK_GROUP_FN bool won(const State& s, int32_t i) {
  return s.phase[i] == kBidding && s.best_bid[s.choice[i]] == s.bid[i];
}

// Handles a person whose object went to another.
template <class Group>
FASTMASK_GROUP_FN void evict(const State& s, int32_t person) {
  s.object[person] = kNobody;
  s.phase[person] = ++s.evictions[person] > kMaxEvictions ? kWaiting : kBidding;
}

// The winners take their objects, and report the previous owners to the group, which evicts them at once or in
// next_round(): an evicted person visited in the same pass still has an older bid than the one that evicted it.
template <class Group>
FASTMASK_GROUP_FN void settle_bids(Group& group, const State& s) {
  group.bidders_alone(s, [&](int32_t i) {
    if (!won<Group>(s, i)) return;
    const int32_t k = s.choice[i];
    const int32_t evicted = s.owner[k];
    s.price[k] = (s.price[k] + raise_of<Group>(s.bid[i])) | kOwned;
    s.owner[k] = i;
    s.object[i] = k;
    s.phase[i] = kAssigned;
    if (evicted != kNobody) group.outbid(s, evicted);
  });
  group.sync();
}

}  // namespace fastmask::matcher
