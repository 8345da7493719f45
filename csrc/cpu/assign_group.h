// The matcher's group on a CPU: one thread, with a vector of objects at a time.
#pragma once

#include "cpu/simd/vec.h"
#include "matcher/auction.h"
#include "matcher/one_thread.h"

namespace fastmask::FASTMASK_SIMD {

static inline int32_t least_lane(vint v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epi32((__m512i)v);
#elif defined(__AVX2__)
  __m128i m = _mm_min_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  m = _mm_min_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
#elif defined(FASTMASK_NEON)
  return vminvq_s32((int32x4_t)v);
#else
  int32_t least = v[0];
  for (int i = 1; i < kLanes; ++i) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

static inline int32_t least_lane_unsigned(vint v) { return least_lane(v ^ splat(INT32_MIN)) ^ INT32_MIN; }

// The lanes where a == b, one bit each.
static inline uint32_t equal_lanes(vint a, vint b) {
  return FASTMASK_BY_LEVEL(_mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b),
                           _mm256_movemask_ps((__m256)_mm256_cmpeq_epi32((__m256i)a, (__m256i)b)),
                           bits_where([&](int i) { return a[i] == b[i]; }), lane_bits(a == b));
}

// The lanes where v <= limit, one bit each.
static inline uint32_t lanes_up_to(vint v, int32_t limit) {
  return FASTMASK_BY_LEVEL(_mm512_cmple_epi32_mask((__m512i)v, (__m512i)splat(limit)),
                           0xff ^ _mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)v, (__m256i)splat(limit))),
                           bits_where([&](int i) { return v[i] <= limit; }), lane_bits(v <= limit));
}

// x < y ? a : b in each lane, and the same for other comparisons.
static inline vint choose_less(vint x, vint y, vint a, vint b) {
  [[maybe_unused]] const vint plain = x < y ? a : b;
  return FASTMASK_BY_LEVEL(
      (vint)_mm512_mask_mov_epi32((__m512i)b, _mm512_cmplt_epi32_mask((__m512i)x, (__m512i)y), (__m512i)a), plain,
      plain);
}

static inline vint choose_equal(vint x, vint y, vint a, vint b) {
  [[maybe_unused]] const vint plain = x == y ? a : b;
  return FASTMASK_BY_LEVEL(
      (vint)_mm512_mask_mov_epi32((__m512i)b, _mm512_cmpeq_epi32_mask((__m512i)x, (__m512i)y), (__m512i)a), plain,
      plain);
}

static inline vint choose_less_unsigned(vint x, vint y, vint a, vint b) {
#if defined(__AVX512F__)
  return (vint)_mm512_mask_mov_epi32((__m512i)b, _mm512_cmplt_epu32_mask((__m512i)x, (__m512i)y), (__m512i)a);
#elif defined(__AVX2__)
  const __m256i at_least = _mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)x, (__m256i)y), (__m256i)x);
  return (vint)_mm256_blendv_epi8((__m256i)a, (__m256i)b, at_least);
#else
  return (vuint)x < (vuint)y ? a : b;
#endif
}

// The lowest index among the lanes where values == least; `memory` holds the indices too.
static inline int32_t lowest_index(vint values, int32_t least, vint indices, const int32_t* memory, uint32_t lanes) {
  if ((lanes & (lanes - 1)) == 0) return memory[__builtin_ctz(lanes)];
  return least_lane(choose_equal(values, splat(least), indices, splat(INT32_MAX)));
}

// The smallest element of a sequence of vectors of unsigned numbers, and its index.
struct LeastLanes {
  vint least = splat(-1), index = {}, at = lane_numbers();

  void take(vint v) {
    index = choose_less_unsigned(v, least, at, index);
    least = minimum_unsigned(least, v);
    at += kLanes;
  }

  matcher::Nearest nearest() const {
    int32_t indices[kLanes];
    store(indices, index);
    const int32_t nearest = least_lane_unsigned(least);
    return {nearest, lowest_index(least, nearest, index, indices, equal_lanes(least, splat(nearest)))};
  }
};

class CpuGroup : public matcher::OneThread<CpuGroup> {
 public:
  template <class F>
  void elements(int64_t count, F f) const {
    for (int64_t k = 0; k < count; ++k) f(static_cast<int32_t>(k));
  }
  template <class F>
  matcher::Candidate least(int32_t n, F f) const {
    matcher::Candidate best = matcher::kNoCandidate;
    for (int32_t k = 0; k < n; ++k) {
      const matcher::Candidate candidate = f(k);
      if (matcher::before<CpuGroup>(candidate, best)) best = candidate;
    }
    return best;
  }

  void enlist(const matcher::State& s) {
    bidders_ = s.persons;
    rejoined_ = s.persons;
    for (int32_t i = 0; i < s.persons; ++i) s.list[i] = i;
  }
  template <class F>
  void bidders(const matcher::State& s, F f) const {
    for (int32_t n = 0; n < bidders_; ++n) f(s.list[n]);
  }
  template <class F>
  void bidders_alone(const matcher::State& s, F f) const {
    bidders(s, f);
  }
  void outbid(const matcher::State& s, int32_t person) {
    matcher::evict<CpuGroup>(s, person);
    s.list[rejoined_++] = person;
  }
  bool next_round(const matcher::State& s) {
    bidders_ = 0;
    for (int32_t n = 0; n < rejoined_; ++n) {
      const int32_t i = s.list[n];
      if (s.phase[i] == matcher::kBidding) s.list[bidders_++] = i;
    }
    rejoined_ = bidders_;
    return bidders_ > 0;
  }

  matcher::Best scan(const int32_t* row, const int32_t* price, int32_t stride) const {
    vint first = splat(INT32_MAX), second = splat(INT32_MAX), index = {};
    vint at = lane_numbers();
    for (int32_t k = 0; k < stride; k += kLanes) {
      const vint sum = wrapping_sum(load(row + k), load(price + k));
      index = choose_less(sum, first, at, index);
      second = minimum(second, FASTMASK_SIMD::maximum(first, sum));
      first = minimum(first, sum);
      at += kLanes;
    }
    int32_t indices[kLanes];
    store(indices, index);
    matcher::Best best;
    best.first = least_lane(first);
    const uint32_t lanes = equal_lanes(first, splat(best.first));
    best.index = lowest_index(first, best.first, index, indices, lanes);
    // The lane of the best object contributes its second, every other lane its first, unless two lanes hold the best.
    best.second = least_lane(choose_equal(first, splat(best.first), second, first));
    if ((lanes & (lanes - 1)) != 0) best.second = best.first;
    return best;
  }

  // The first k from `from` on, cyclically, with row[k] + price[k] == sum.
  int32_t first_equal(const int32_t* row, const int32_t* price, int32_t stride, int32_t sum, int32_t from) const {
    const int32_t begin = from & -kLanes;
    uint32_t wanted = ~0u << (from - begin);
    for (int32_t k = begin; k < stride; k += kLanes, wanted = ~0u) {
      const uint32_t lanes = equal_lanes(wrapping_sum(load(row + k), load(price + k)), splat(sum)) & wanted;
      if (lanes != 0) return k + __builtin_ctz(lanes);
    }
    for (int32_t k = 0;; k += kLanes) {
      const uint32_t lanes = equal_lanes(wrapping_sum(load(row + k), load(price + k)), splat(sum));
      if (lanes != 0) return k + __builtin_ctz(lanes);
    }
  }

  matcher::Nearest start(const int32_t* row, const int32_t* price, int32_t person, int32_t* distance,
                         int32_t* predecessor, int32_t stride) const {
    LeastLanes least;
    for (int32_t k = 0; k < stride; k += kLanes) {
      const vint sum = wrapping_sum(load(row + k), load(price + k));
      store(distance + k, sum);
      store(predecessor + k, splat(person));
      least.take(sum);
    }
    return least.nearest();
  }

  matcher::Nearest start_dummy(const int32_t* row, const int32_t* price, int32_t* distance, int32_t* predecessor,
                               int32_t stride, bool& nobodys) const {
    vint goal = {};
    LeastLanes least;
    for (int32_t k = 0; k < stride; k += kLanes) {
      const vint sum = wrapping_sum(load(row + k), load(price + k));
      goal |= (sum > 0) & ((sum & 1) - 1);
      const vint now = sum == 0 ? splat(matcher::kScanned) : sum;
      store(distance + k, now);
      store(predecessor + k, splat(matcher::kNobody));
      least.take(now);
    }
    nobodys = least_lane(goal) < 0;
    return least.nearest();
  }

  matcher::Nearest relax(const int32_t* row, const int32_t* price, int32_t shift, int32_t person, int32_t* distance,
                         int32_t* predecessor, int32_t stride) const {
    LeastLanes least;
    for (int32_t k = 0; k < stride; k += kLanes) {
      const vint old = load(distance + k);
      const vint candidate = wrapping_sum(load(row + k), load(price + k) - splat(shift));
      const vint now = minimum(old, candidate);
      store(distance + k, now);
#if defined(__AVX512F__)
      const __mmask16 closer = _mm512_cmplt_epi32_mask((__m512i)candidate, (__m512i)old);
      _mm512_mask_storeu_epi32(predecessor + k, closer, (__m512i)splat(person));
#else
      store(predecessor + k, choose_less(candidate, old, splat(person), load(predecessor + k)));
#endif
      least.take(now);
    }
    return least.nearest();
  }

  // Stores the whole vector, which the next relax() loads: a vector load cannot be served from a scalar store in
  // flight.
  void mark_scanned(int32_t* distance, int32_t k) const {
    int32_t* at = distance + (k & -kLanes);
    store(at, choose_equal(lane_numbers(), splat(k & (kLanes - 1)), splat(matcher::kScanned), load(at)));
  }

  void lower(int32_t* price, const int32_t* distance, int32_t amount, int32_t stride) const {
    for (int32_t k = 0; k < stride; k += kLanes) {
      const vint fall = load(distance + k) == splat(matcher::kScanned) ? vint{} : splat(amount);
      store(price + k, load(price + k) - fall);
    }
  }

  void halve_and_sum(int32_t* costs, int32_t rows, int32_t stride, int32_t shift, int32_t* sum) const {
    for (int32_t k = 0; k < stride; k += kLanes) {
      vint total = {};
      for (int32_t i = 0; i < rows; ++i) {
        int32_t* at = costs + static_cast<int64_t>(i) * stride + k;
        const vint cost = load(at);
        const vint half = choose_less(cost, splat(matcher::kPadding), (cost >> 1) & -2, cost);
        store(at, half);
        total = wrapping_sum(total, half >> shift);
      }
      store(sum + k, total);
    }
  }

  void best_offers(const int32_t* costs, const int32_t* sum, int32_t rows, int32_t stride, int32_t* offer) const {
    for (int32_t k = 0; k < stride; k += kLanes) {
      vint best = splat(INT32_MIN);
      for (int32_t i = 0; i < rows; ++i) {
        best = FASTMASK_SIMD::maximum(best, splat(sum[i]) - load(costs + static_cast<int64_t>(i) * stride + k));
      }
      store(offer + k, best);
    }
  }

  int32_t count_up_to(const int32_t* values, int32_t count, int32_t limit) const {
    int32_t total = 0, k = 0;
    for (; k + kLanes <= count; k += kLanes) total += __builtin_popcount(lanes_up_to(load(values + k), limit));
    if (k < count) total += __builtin_popcount(lanes_up_to(load(values + k), limit) & ((1u << (count - k)) - 1));
    return total;
  }

 private:
  int32_t bidders_ = 0;   // persons in the list who bid in this round
  int32_t rejoined_ = 0;  // persons in the list who were evicted in this round
};

}  // namespace fastmask::FASTMASK_SIMD
