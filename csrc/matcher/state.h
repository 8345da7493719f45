// The state on which every step of the matcher works: one problem in fixed point, its prices and its matching so far.
//
// The short side of a problem are the persons i, all of whom are matched; the long side are the objects k. Costs are
// integers q[i][k] in 0..kRange, prices p[k] >= 0, and person i wants the object with the least q[i][k] + p[k]. Both
// are stored doubled, and the lowest bit of a price says whether its object is owned, so that the least sum of a row
// prefers free objects among equals at no extra cost.
//
// A "group" runs the steps: one CPU thread with SIMD, one CUDA block, or a serial stand-in for the block. All
// arithmetic is on integers, and every choice among equals takes the lowest index, so all groups compute the same
// result.
#pragma once

#include <cstdint>

#include "common/carver.h"

#if defined(__CUDACC__)
#define FASTMASK_GROUP_FN __device__ inline
#else
#define FASTMASK_GROUP_FN inline
#endif

namespace fastmask::matcher {

// Bounds, in doubled units, with C = kRange from zero prices, or kPricedRange from prices up to C: a price is at most C
// (2 C), a sum q + p at most 2 C (3 C), a path to the nearest free object at most C (2 C), and a path to any object at
// most 3 C (5 C), below 2^31. kPadding exceeds every path at the end of a step.
constexpr int32_t kRange = (1 << 29) - 2;
constexpr int32_t kPricedRange = (1 << 28) - 2;
constexpr int32_t kPadding = 3 << 29;
constexpr int32_t kOwned = 1;            // the lowest bit of a price
constexpr int32_t kScanned = INT32_MIN;  // below every distance as a signed number, beyond all as an unsigned one
constexpr int32_t kNobody = -1;

constexpr int32_t kWarp = 32;  // lanes of a CUDA warp

enum Phase : int32_t { kAssigned, kBidding, kWaiting };

struct State {
  int32_t persons, objects;
  int32_t stride;  // of a row of costs: objects, rounded up to the group's vectors
  int32_t* costs;  // [persons, stride], doubled; kPadding beyond the objects
  int32_t* dummy;  // [stride], doubled: the costs of dummy persons; kPadding beyond the objects

  int32_t* price;   // [stride], doubled, | kOwned
  int32_t* owner;   // [stride], the person or kNobody
  int32_t* object;  // [persons], the object or kNobody

  int32_t* phase;      // [persons]
  int32_t* evictions;  // [persons]
  int32_t* choice;     // [persons], the object bid for
  int64_t* bid;        // [persons]
  int64_t* best_bid;   // [stride]
  int32_t* list;       // [2 persons], for groups that keep a list of the bidders

  int32_t* distance;          // [stride]
  int32_t* predecessor;       // [stride]
  int32_t* scanned;           // [objects], in the order of the scan
  int32_t* scanned_distance;  // [objects]

  // All arrays but the costs: those that the auction and the shortest augmenting paths read and write at every step.
  FASTMASK_HOST_DEVICE void lay_out(Carver& carver) {
    carver.take(dummy, stride);
    carver.take(price, stride);
    carver.take(owner, stride);
    carver.take(object, persons);
    carver.take(phase, persons);
    carver.take(evictions, persons);
    carver.take(choice, persons);
    carver.take(bid, persons);
    carver.take(best_bid, stride);
    carver.take(list, 2 * static_cast<int64_t>(persons));
    carver.take(distance, stride);
    carver.take(predecessor, stride);
    carver.take(scanned, objects);
    carver.take(scanned_distance, objects);
  }
};

// The least sum q + p of a row, its index, and the second least sum.
struct Best {
  int32_t first, index, second;
};

// The least distance among the objects not yet scanned, and the object's index.
struct Nearest {
  int32_t distance, index;
};

}  // namespace fastmask::matcher
