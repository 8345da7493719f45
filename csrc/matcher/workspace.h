// Where the arrays of one problem lie in memory.
#pragma once

#include "matcher/assign.h"

namespace fastmask::matcher {

// Hands out pieces of memory, each on a 64-byte boundary; from a null pointer it only counts. A template, so that each
// SIMD level has its own copy.
template <class Group>
class Carver {
 public:
  FASTMASK_WORKSPACE_FN explicit Carver(char* memory) : memory_(memory) {}

  template <class T>
  FASTMASK_WORKSPACE_FN void take(T*& piece, int64_t count) {
    piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  FASTMASK_WORKSPACE_FN int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// What the auction and the shortest augmenting paths read and write at every step, without the costs.
template <class Group>
FASTMASK_WORKSPACE_FN void carve_state(Carver<Group>& memory, State& s) {
  memory.take(s.dummy, s.stride);
  memory.take(s.price, s.stride);
  memory.take(s.owner, s.stride);
  memory.take(s.object, s.persons);
  memory.take(s.phase, s.persons);
  memory.take(s.evictions, s.persons);
  memory.take(s.choice, s.persons);
  memory.take(s.bid, s.persons);
  memory.take(s.best_bid, s.stride);
  memory.take(s.list, 2 * static_cast<int64_t>(s.persons));
  memory.take(s.distance, s.stride);
  memory.take(s.predecessor, s.stride);
  memory.take(s.scanned, s.objects);
  memory.take(s.scanned_distance, s.objects);
}

template <class Group>
FASTMASK_WORKSPACE_FN void carve_duals(Carver<Group>& memory, const State& s, Duals& d) {
  const int64_t persons = (s.persons + 15) / 16 * 16;
  memory.take(d.person, persons);
  memory.take(d.scratch, persons);
  memory.take(d.exact.price, s.stride);
}

// What float64 needs if it comes to that.
template <class Group>
FASTMASK_WORKSPACE_FN void carve_exact(Carver<Group>& memory, const State& s, Duals& d) {
  memory.take(d.exact.distance, s.stride);
  memory.take(d.exact.broken_price, s.stride);
  memory.take(d.exact.broken_distance, s.stride);
  memory.take(d.exact.done, s.stride);
}

}  // namespace fastmask::matcher
