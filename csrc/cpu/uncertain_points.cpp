#include "cpu/uncertain_points.h"

#include "cpu/simd/gather.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/philox.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int64_t kProbe = 2048;  // the first candidates, from which a bound of the wanted keys is estimated
// The bound includes more keys than expected, by five standard deviations of their number among kProbe at most.
constexpr int64_t kSurplus = 113;

struct Point {
  float x, y;
};

// The middle of one of 2^16 equal parts of [0, 1].
inline vfloat middle(vuint part) { return __builtin_convertvector((vint)part, vfloat) * 0x1p-16f + 0x1p-17f; }

// The point of a word of the random stream: see fastmask.reference.random_points.
inline vfloat x_of(vint word) { return middle((vuint)word >> 16); }
inline vfloat y_of(vint word) { return middle((vuint)word & 0xffff); }

// Points first..first + 63 of the stream, kLanes at a time.
template <typename Consumer>
inline void draw(uint64_t seed, uint32_t row, int64_t first, Consumer consume) {
  constexpr int kVectors = 16 / kLanes;
  Words words[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    words[i] = philox<7>(seed, (vuint)lane_numbers() + static_cast<uint32_t>(first / 4 + i * kLanes), vuint{} + row);
  }
  for (int word = 0; word < 4; ++word) {
    for (int i = 0; i < kVectors; ++i) consume(first + word * 16 + i * kLanes, (vint)words[i].word[word]);
  }
}

// An integer that is ordered like |x|, with NaN first.
inline vint certainty(vfloat x) {
  const vint magnitude = bits(x) & splat(0x7fffffff);
  return magnitude > splat(0x7f800000) ? vint{} : wrapping_sum(magnitude, splat(1));
}

// The bits of the first `count` lanes; none if it is negative, all if it is large.
inline uint32_t first_lanes(int64_t count) {
  return count >= kLanes ? kAllLanes : count > 0 ? (uint32_t{1} << count) - 1 : 0;
}

// The keys have room for a vector after them, here and below.
int64_t count_below(const int32_t* keys, int64_t count, int32_t bound) {
  const int64_t whole = count / kLanes * kLanes;
  vint below = {};
  for (int64_t i = 0; i < whole; i += kLanes) below -= load(keys + i) < bound;
  const uint32_t last = lane_bits(load(keys + whole) < bound) & first_lanes(count - whole);
  return sum_lanes<int64_t>(below) + __builtin_popcount(last);
}

// The largest key below 2^(bit + 1), with the bits of `key`, such that fewer than `wanted` keys are smaller. The bits
// from `bit` down to `last` are found, the others are those of `key`.
int32_t find_bits(const int32_t* keys, int64_t count, int64_t wanted, int32_t key, int bit, int last) {
  for (; bit >= last; --bit) {
    if (count_below(keys, count, key | 1 << bit) < wanted) key |= 1 << bit;
  }
  return key;
}

// The `wanted`-th smallest key; `rest` has room for all keys.
int32_t find_key(const int32_t* keys, int64_t count, int64_t wanted, int32_t* rest) {
  constexpr int kLow = 20;
  const int32_t key = find_bits(keys, count, wanted, 0, 30, kLow);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vint of_points = load(keys + i);
    const Packing packing(lane_bits(of_points >> kLow == key >> kLow) & first_lanes(count - i));
    store(rest + kept, packing(of_points));
    kept += packing.count();
  }
  return find_bits(rest, kept, wanted - count_below(keys, count, key), key, kLow - 1, 0);
}

// Candidates that may be among the wanted ones.
struct Candidates {
  int32_t* words;
  int32_t* keys;
  int64_t count = 0;

  void add(vint new_words, vint new_keys, uint32_t lanes) {
    const Packing packing(lanes);
    store(words + count, packing(new_words));
    store(keys + count, packing(new_keys));
    count += packing.count();
  }
};

// Draws the candidates. Once a bound is estimated from some, those with larger keys are left out. There is none, and
// `bound` is the largest number, if it would include all of these.
Candidates draw_candidates(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                           const UncertainPointsWorkspace& work, int64_t surplus, int32_t& bound) {
  const int32_t stride = static_cast<int32_t>(plane.w) + 2;
  const int64_t rank = counts.uncertain * kProbe / counts.candidates + surplus;
  Candidates kept{work.words, work.keys};
  bound = INT32_MAX;
  for (int64_t first = 0; first < counts.candidates; first += kPointBatch) {
    if (first == kProbe && rank < kProbe) {
      constexpr int kLast = 16;  // lower bits are set, which makes the bound a little larger
      bound = find_bits(work.keys, kProbe, rank, 0, 30, kLast) | ((1 << kLast) - 1);
    }
    draw(seed, row, first, [&](int64_t at, vint words) {
      const auto columns = positions(x_of(words), plane.w), rows = positions(y_of(words), plane.h);
      const vint keys = certainty(sample(work.map, stride, columns, rows));
      kept.add(words, keys, lane_bits(keys <= bound) & first_lanes(counts.candidates - at));
    });
  }
  return kept;
}

// Writes the `wanted` candidates with the smallest keys to `points`, in order; of equal keys, the first.
void write_least(Candidates candidates, int32_t key, int64_t wanted, Point* points) {
  int64_t equal = wanted - count_below(candidates.keys, candidates.count, key);
  Candidates chosen{candidates.words, candidates.keys};
  for (int64_t i = 0; i < candidates.count; i += kLanes) {
    const vint keys = load(candidates.keys + i);
    const uint32_t inside = first_lanes(candidates.count - i);
    uint32_t ties = lane_bits(keys == key) & inside;
    while (__builtin_popcount(ties) > equal) ties ^= uint32_t{1} << (31 - __builtin_clz(ties));
    equal -= __builtin_popcount(ties);
    chosen.add(load(candidates.words + i), keys, (lane_bits(keys < key) & inside) | ties);
  }
  for (int64_t i = 0; i < wanted; i += kLanes) {
    const vint words = load(chosen.words + i);
    if (i + kLanes <= wanted) {
      store_pairs(&points[i].x, x_of(words), y_of(words));
    } else {
      Point last[kLanes];
      store_pairs(&last[0].x, x_of(words), y_of(words));
      memcpy(points + i, last, sizeof(Point) * (wanted - i));
    }
  }
}

// Writes the points of the stream after the candidates.
void draw_others(uint64_t seed, uint32_t row, int64_t begin, int64_t end, Point* points) {
  for (int64_t first = begin / kPointBatch * kPointBatch; first < end; first += kPointBatch) {
    Point batch[kPointBatch];
    draw(seed, row, first,
         [&](int64_t at, vint words) { store_pairs(&batch[at - first].x, x_of(words), y_of(words)); });
    const int64_t from = first < begin ? begin : first, to = end < first + kPointBatch ? end : first + kPointBatch;
    memcpy(points + from - begin, batch + from - first, sizeof(Point) * (to - from));
  }
}

void write_uncertain(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                     const UncertainPointsWorkspace& work, int64_t surplus, Point* points) {
  load_bordered(plane, work.map);
  int32_t bound;
  Candidates candidates = draw_candidates(plane, seed, row, counts, work, surplus, bound);
  int32_t key = find_key(candidates.keys, candidates.count, counts.uncertain, work.passed);
  if (key > bound) {  // too few are left: once in millions of pairs
    candidates = draw_candidates(plane, seed, row, counts, work, kProbe, bound);
    key = find_key(candidates.keys, candidates.count, counts.uncertain, work.passed);
  }
  write_least(candidates, key, counts.uncertain, points);
}

}  // namespace

void uncertain_points_pair(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                           const UncertainPointsWorkspace& work, float* points) {
  Point* const out = reinterpret_cast<Point*>(points);
  if (counts.uncertain > 0) write_uncertain(plane, seed, row, counts, work, kSurplus, out);
  draw_others(seed, row, counts.candidates, counts.candidates + counts.points - counts.uncertain,
              out + counts.uncertain);
}

}  // namespace fastmask::FASTMASK_SIMD
