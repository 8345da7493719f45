// Functions that the single-threaded groups share.
#pragma once

#include "matcher/assign.h"

namespace fastmask::matcher {

// Group is the derived class, so that each SIMD level has its own copy.
template <class Group>
class OneThread {
 public:
  void sync() const {}
  void fence() const {}
  int32_t lane() const { return 0; }
  int32_t lanes() const { return 1; }
  void maximum(int64_t* at, int64_t value) const { *at = value > *at ? value : *at; }

  template <class F>
  void one(F f) const {
    f();
  }
  template <class F>
  void solo(F f) const {
    f();
  }
  template <class F>
  int32_t count(int32_t n, F f) const {
    int32_t total = 0;
    for (int32_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  // Adds in the order of a warp: 32 strided sums, then these in order.
  template <class F>
  double sum(int32_t n, F f) const {
    double lanes[kWarp] = {};
    for (int32_t i = 0; i < n; ++i) lanes[i % kWarp] += f(i);
    double total = 0;
    for (const double lane : lanes) total += lane;
    return total;
  }

  // Sums of costs stay finite if none exceeds 2^1000.
  double exact_scale(const Costs& c) const {
    for (int32_t i = 0; i < c.persons; ++i) {
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = magnitude_of<Group>(cost_at<Group>(c, i, k));
        if (is_finite<Group>(cost) && cost > 0x1p1000) return 0x1p-24;
      }
    }
    return 1;
  }

 protected:
  // The least and greatest finite cost of each person, 0 if there is none.
  static void finite_ranges(const Costs& c, double* least, double* greatest) {
    for (int32_t i = 0; i < c.persons; ++i) {
      bool any = false;
      least[i] = greatest[i] = 0;
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = cost_at<Group>(c, i, k);
        if (!is_finite<Group>(cost)) continue;
        least[i] = any && least[i] < cost ? least[i] : cost;
        greatest[i] = any && greatest[i] > cost ? greatest[i] : cost;
        any = true;
      }
    }
  }

  static double widest_range(int32_t persons, double* least, const double* greatest) {
    double range = 0;
    for (int32_t i = 0; i < persons; ++i) {
      least[i] += 0.0;  // turns -0 into 0, as the order decides which of the two is found
      range = greatest[i] - least[i] > range ? greatest[i] - least[i] : range;
    }
    return range;
  }

  // sum[i] = min over k of c[i][k] + price[k], where that is finite.
  static void finite_least_sums(const Costs& c, const double* price, double* sum) {
    for (int32_t i = 0; i < c.persons; ++i) {
      sum[i] = __builtin_inf();
      for (int32_t k = 0; k < c.objects; ++k) {
        const double cost = cost_at<Group>(c, i, k) + price[k];
        if (is_finite<Group>(cost) && cost < sum[i]) sum[i] = cost;
      }
      sum[i] += 0.0;
    }
  }
};

}  // namespace fastmask::matcher
