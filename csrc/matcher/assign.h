// Solves one assignment problem: finds the best matching for its costs, and the duals that prove it.
//
// Costs become fixed point numbers with the quantum 1 / scale, q = floor((c - least of the row) scale), so the best
// matching for q is at most persons * quantum from the best for c. The duals u (of persons) and p (prices) give the
// gap:
//   gap = sum over the pairs of (c + p - u) + sum over the free objects of p, with u[i] = min over k of c[i][k] + p[k].
// A gap within `tolerance` of the sum of |c| over the pairs is accepted, unless the duals are too large for float64 to
// decide. Otherwise the problem is solved again with the reduced costs c + p - u: no pair whose reduced cost exceeds
// the gap can belong to the best matching, so the range is the gap, and the quantum about 2^20 times finer. A problem
// that is still undecided is then solved in float64.
#pragma once

#include "matcher/costs.h"
#include "matcher/exact.h"
#include "matcher/solve.h"
#include "matcher/state.h"

namespace fastmask::matcher {

constexpr int kMaxRefinements = 3;

// Relative to the sum of |c| over the matched pairs. float32 costs are accurate to 6e-8, half precision to less.
constexpr double kTolerance32 = 1e-6;
constexpr double kTolerance64 = 1e-12;

struct Duals {
  double* person;   // [to_full_vectors(persons)]
  double* scratch;  // [to_full_vectors(persons)]
  Exact exact;      // its price is the object's

  FASTMASK_HOST_DEVICE void lay_out(Carver& carver, const State& s) {
    carver.take(person, to_full_vectors(s.persons));
    carver.take(scratch, to_full_vectors(s.persons));
    carver.take(exact.price, s.stride);
  }
};

struct Certificate {
  double gap, magnitude;
  double rounding;  // a bound on the rounding errors of the duals so far, about 50 times too large
};

// Whether the gap proves the matching. With a pair that is not finite, it never does.
template <class Group>
FASTMASK_GROUP_FN bool proves(const Certificate& found, double tolerance) {
  return is_finite<Group>(found.magnitude) && found.gap <= tolerance * found.magnitude &&
         found.rounding <= tolerance * found.magnitude;
}

template <class Group>
FASTMASK_GROUP_FN Certificate certificate(Group& group, const Costs& c, const State& s, const Duals& d, double gap) {
  const double magnitude =
      group.sum(c.persons, [&](int32_t i) { return magnitude_of<Group>(cost_at<Group>(c, i, s.object[i])); });
  const double duals =
      group.sum(c.persons, [&](int32_t i) { return magnitude_of<Group>(d.person[i]) + d.exact.price[s.object[i]]; });
  return {gap, magnitude, 0x1p-46 * duals};
}

// The gap of the first pass: what rounding down took from the pairs, c - least - q's quanta, free of large prices.
template <class Group>
FASTMASK_GROUP_FN double first_gap(Group& group, const Costs& c, const State& s, const double* least, double quantum) {
  return group.sum(c.persons, [&](int32_t i) {
    const int32_t k = s.object[i];
    return (cost_at<Group>(c, i, k) - least[i]) - quantum * (s.costs[static_cast<int64_t>(i) * s.stride + k] / 2);
  });
}

template <class Group>
FASTMASK_GROUP_FN double gap_of(Group& group, const Costs& c, const State& s, const Duals& d) {
  return group.sum(c.persons, [&](int32_t i) {
    return cost_at<Group>(c, i, s.object[i]) + d.exact.price[s.object[i]] - d.person[i];
  });
}

// The duals in the unit of the costs: u and p of this pass are added to those that the pass started from. `lift` is the
// number of quanta by which its costs were raised.
template <class Group>
FASTMASK_GROUP_FN void add_duals(Group& group, const Costs& c, const State& s, const Duals& d, double quantum,
                                 int32_t lift) {
  group.elements(c.persons, [&](int32_t i) {
    const int32_t k = s.object[i];
    const int32_t sum = s.costs[static_cast<int64_t>(i) * s.stride + k] + (s.price[k] & ~kOwned);
    d.person[i] += quantum * (sum / 2 - lift);
  });
  group.elements(c.objects, [&](int32_t k) {
    const double price = d.exact.price[k] + quantum * ((s.price[k] & ~kOwned) / 2);
    d.exact.price[k] = s.owner[k] != kNobody && price > 0 ? price : 0;
  });
  group.sync();
}

template <class Group>
FASTMASK_GROUP_FN void pose(Group& group, const Costs& c, const State& s, const Duals& d, double scale) {
  group.quantize(c, d.person, scale, s.costs, s.stride);
  group.elements(s.stride, [&](int32_t k) { s.dummy[k] = k < c.objects ? 0 : kPadding; });
  group.elements(c.objects, [&](int32_t k) { d.exact.price[k] = 0; });
  group.sync();
}

// Restates the problem with the reduced costs c + p - u, and the prices as the costs of the dummies. Prices are rounded
// down to the quantum, so that a free object ends with a price of exactly 0; costs one quantum higher compensate.
template <class Group>
FASTMASK_GROUP_FN void pose_again(Group& group, const Costs& c, const State& s, const Duals& d, double limit,
                                  double scale) {
  double* const price = d.exact.price;
  group.sync();
  group.elements(s.stride, [&](int32_t k) {
    if (k >= c.objects) {
      s.dummy[k] = kPadding;
      return;
    }
    const int32_t quanta = static_cast<int32_t>((price[k] < limit ? price[k] : limit) * scale);
    s.dummy[k] = 2 * quanta;
    if (price[k] < limit) price[k] = quanta / scale;
  });
  group.sync();
  group.quantize_reduced(c, d.person, price, limit, scale, s.costs, s.stride);
  group.sync();
}

template <class Group>
FASTMASK_GROUP_FN int32_t broken_pairs(Group& group, const Costs& c, const State& s) {
  return group.count(c.persons, [&](int32_t i) { return !is_finite<Group>(cost_at<Group>(c, i, s.object[i])); });
}

// Solves in fixed point; returns whether the matching was proved. The first duals are the row minima for persons, and
// zero for objects. All passes share one loop, as the solver is too large to be compiled twice.
template <class Group>
FASTMASK_GROUP_FN bool assign_fixed(Group& group, const Costs& c, const State& s, const Duals& d, double range,
                                    double tolerance) {
  Certificate found = {0, 0, 0};
  for (int pass = 0; pass <= kMaxRefinements; ++pass) {
    const bool first = pass == 0;
    const double limit = first ? range : 2 * found.gap;
    const double scale = scale_for<Group>(limit, first ? 28 : 27);
    if (first) {
      pose(group, c, s, d, scale);
    } else {
      pose_again(group, c, s, d, limit, scale);
    }
    const double quantum = (solve(group, s, !first) ? 2.0 : 1.0) / scale;
    double gap = first ? first_gap(group, c, s, d.person, quantum) : 0;
    group.sync();
    add_duals(group, c, s, d, quantum, first ? 0 : 1);
    if (!first) gap = gap_of(group, c, s, d);
    // Quanta were rounded down, so they are at most the costs: the duals are feasible without checking all pairs again.
    const double before = found.rounding;
    found = certificate(group, c, s, d, gap);
    found.rounding = first && gap == 0 ? 0 : found.rounding + before;
    if (proves<Group>(found, tolerance)) return true;
    if (first && broken_pairs(group, c, s) > 0) return false;
    if (!(found.gap > 0 && found.rounding <= tolerance * found.magnitude)) return false;
  }
  return false;
}

// Returns how many pairs of the matching have a cost that is not finite.
template <class Group>
FASTMASK_GROUP_FN int32_t assign(Group& group, const Costs& c, const State& s, const Duals& d, double tolerance) {
  const double range = group.ranges(c, d.person, d.scratch);
  if (is_finite<Group>(range) && assign_fixed(group, c, s, d, range, tolerance)) return 0;
  double* const price = d.exact.price;
  const double scale = group.exact_scale(c);
  solve_exact(group, c, s, d.exact, scale);
  group.elements(c.objects, [&](int32_t k) { price[k] /= scale; });
  group.sync();
  group.least_sums(c, price, d.person);
  group.sync();
  return broken_pairs(group, c, s);
}

}  // namespace fastmask::matcher
