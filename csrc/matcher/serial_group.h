// A CUDA block on one thread, for tests. Between barriers, its warps and lanes run one after another in an order that
// `seed` scrambles. The block's results must not depend on that order, and so must equal those of this group.
#pragma once

#include <vector>

#include "matcher/lanes.h"
#include "matcher/one_thread.h"

namespace fastmask::matcher {

class SerialGroup : public OneThread<SerialGroup> {
 public:
  explicit SerialGroup(uint32_t seed) : random_(seed * 2654435761u + 1) {}

  template <class F>
  void elements(int64_t count, F f) {
    for (const int32_t k : scrambled(static_cast<int32_t>(count))) f(k);
  }
  template <class F>
  Candidate least(int32_t n, F f) const {
    return butterfly<Candidate>([&](int32_t lane) {
      Candidate best = kNoCandidate;
      for (int32_t k = lane; k < n; k += kWarp) best = combine<SerialGroup>(best, f(k));
      return best;
    });
  }

  void enlist(const State&) const {}
  void outbid(const State&, int32_t) const {}
  template <class F>
  void bidders(const State& s, F f) {
    for (const int32_t i : scrambled(s.persons)) {
      if (s.phase[i] == kBidding) f(i);
    }
  }
  template <class F>
  void bidders_alone(const State& s, F f) {
    bidders(s, f);
  }
  bool next_round(const State& s) const {
    bool any = false;
    for (int32_t i = 0; i < s.persons; ++i) any = rejoins<SerialGroup>(s, i) || any;
    return any;
  }

  Best scan(const int32_t* row, const int32_t* price, int32_t stride) const {
    return butterfly<Best>([&](int32_t lane) { return lane_scan<SerialGroup>(row, price, stride, lane); });
  }
  int32_t first_equal(const int32_t* row, const int32_t* price, int32_t stride, int32_t sum, int32_t from) const {
    uint32_t least = UINT32_MAX;
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      const uint32_t own = lane_first_equal<SerialGroup>(row, price, stride, sum, from, lane);
      least = own < least ? own : least;
    }
    return static_cast<int32_t>((static_cast<uint32_t>(from) + least) % static_cast<uint32_t>(stride));
  }
  Nearest start(const int32_t* row, const int32_t* price, int32_t person, int32_t* distance, int32_t* predecessor,
                int32_t stride) const {
    return butterfly<Nearest>(
        [&](int32_t lane) { return lane_start<SerialGroup>(row, price, person, distance, predecessor, stride, lane); });
  }
  Nearest start_dummy(const int32_t* row, const int32_t* price, int32_t* distance, int32_t* predecessor, int32_t stride,
                      bool& nobodys) const {
    nobodys = false;
    return butterfly<Nearest>([&](int32_t lane) {
      return lane_start_dummy<SerialGroup>(row, price, distance, predecessor, stride, lane, nobodys);
    });
  }
  Nearest relax(const int32_t* row, const int32_t* price, int32_t shift, int32_t person, int32_t* distance,
                int32_t* predecessor, int32_t stride) const {
    return butterfly<Nearest>([&](int32_t lane) {
      return lane_relax<SerialGroup>(row, price, shift, person, distance, predecessor, stride, lane);
    });
  }
  void mark_scanned(int32_t* distance, int32_t k) const { distance[k] = kScanned; }
  void lower(int32_t* price, const int32_t* distance, int32_t amount, int32_t stride) const {
    for (int32_t k = 0; k < stride; ++k) price[k] -= distance[k] == kScanned ? 0 : amount;
  }
  void halve_and_sum(int32_t* costs, int32_t rows, int32_t stride, int32_t shift, int32_t* sum) {
    elements(stride, [&](int32_t k) { sum[k] = lane_halve_and_sum<SerialGroup>(costs + k, rows, stride, shift); });
  }
  void best_offers(const int32_t* costs, const int32_t* sum, int32_t rows, int32_t stride, int32_t* offer) {
    elements(stride, [&](int32_t k) { offer[k] = lane_best_offer<SerialGroup>(costs + k, sum, rows, stride); });
  }
  int32_t count_up_to(const int32_t* values, int32_t n, int32_t limit) const {
    return count(n, [&](int32_t k) { return values[k] <= limit; });
  }

  double ranges(const Costs& c, double* least, double* greatest) const {
    finite_ranges(c, least, greatest);
    return widest_range(c.persons, least, greatest);
  }
  void quantize(const Costs& c, const double* offsets, double scale, int32_t* costs, int32_t stride) const {
    for (int32_t i = 0; i < c.persons; ++i) {
      for (int32_t k = 0; k < stride; ++k) {
        costs[static_cast<int64_t>(i) * stride + k] =
            k < c.objects ? fixed_point<SerialGroup>(cost_at<SerialGroup>(c, i, k), offsets[i], scale) : kPadding;
      }
    }
  }
  void quantize_reduced(const Costs& c, const double* offsets, const double* price, double limit, double scale,
                        int32_t* costs, int32_t stride) const {
    for (int32_t i = 0; i < c.persons; ++i) {
      for (int32_t k = 0; k < stride; ++k) {
        costs[static_cast<int64_t>(i) * stride + k] =
            k < c.objects ? fixed_point_left<SerialGroup>(cost_at<SerialGroup>(c, i, k), price[k], offsets[i], scale,
                                                          limit * scale)
                          : kPadding;
      }
    }
  }
  void least_sums(const Costs& c, const double* price, double* sum) const { finite_least_sums(c, price, sum); }

 private:
  // A permutation of 0..count-1.
  std::vector<int32_t> scrambled(int32_t count) {
    std::vector<int32_t> order(count);
    for (int32_t i = 0; i < count; ++i) order[i] = i;
    for (int32_t i = count - 1; i > 0; --i) {
      random_ = random_ * 1664525u + 1013904223u;
      const int32_t j = static_cast<int32_t>((random_ >> 8) % static_cast<uint32_t>(i + 1));
      const int32_t swapped = order[i];
      order[i] = order[j];
      order[j] = swapped;
    }
    return order;
  }

  // Combines the lanes of a warp as __shfl_xor_sync does; all lanes end with the same result.
  template <class T, class F>
  static T butterfly(F lane_value) {
    T values[kWarp], next[kWarp];
    for (int32_t lane = 0; lane < kWarp; ++lane) values[lane] = lane_value(lane);
    for (int32_t step = kWarp / 2; step > 0; step /= 2) {
      for (int32_t lane = 0; lane < kWarp; ++lane) next[lane] = combine<SerialGroup>(values[lane], values[lane ^ step]);
      for (int32_t lane = 0; lane < kWarp; ++lane) values[lane] = next[lane];
    }
    return values[0];
  }

  uint32_t random_;
};

}  // namespace fastmask::matcher
