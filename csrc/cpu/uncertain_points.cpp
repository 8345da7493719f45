#include "cpu/uncertain_points.h"

#include "cpu/simd/gather.h"
#include "cpu/simd/philox.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int kBins = 1 << 11;  // values of a digit of a key; each pass counts the values of one digit

struct Point {
  float x, y;
};

template <int... kLane>
inline void store_points(Point* out, vfloat x, vfloat y, std::integer_sequence<int, kLane...>) {
  const vfloat low = shuffle<(kLane / 2 + kLane % 2 * kLanes)...>(x, y);
  const vfloat high = shuffle<(kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...>(x, y);
  memcpy(out, &low, sizeof low);
  memcpy(out + kLanes / 2, &high, sizeof high);
}

// Points first..first + 31 of the stream: see fastmask.reference.random_points.
template <typename Consumer>
inline void draw(uint64_t seed, uint32_t row, int64_t first, Consumer consume) {
  for (int lane = 0; lane < 16; lane += kLanes) {
    const Words words = philox(seed, (vuint)lane_numbers() + static_cast<uint32_t>(first / 2 + lane), vuint{} + row);
    consume(first + lane, uniform(words.word[0]), uniform(words.word[1]));
    consume(first + 16 + lane, uniform(words.word[2]), uniform(words.word[3]));
  }
}

// An integer that is ordered like |x|, with NaN first.
inline vint certainty(vfloat x) {
  const vint magnitude = bits(x) & splat(0x7fffffff);
  return magnitude > splat(0x7f800000) ? vint{} : wrapping_sum(magnitude, splat(1));
}

// Writes the values whose keys are in low..high to `out`, in order; returns their number. `out` may be `values` or
// `keys`, and has room for all values.
template <typename Value>
int64_t keep_between(const int32_t* keys, const Value* values, int64_t count, int32_t low, int32_t high, Value* out) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  constexpr int kVector = 64 / sizeof(Value);
  for (; i + kVector <= count; i += kVector) {
    const __mmask16 lanes = (1u << kVector) - 1;
    const __m512i key = _mm512_maskz_loadu_epi32(lanes, keys + i);
    const __mmask16 chosen =
        _mm512_mask_cmp_epi32_mask(_mm512_mask_cmp_epi32_mask(lanes, key, _mm512_set1_epi32(low), _MM_CMPINT_NLT), key,
                                   _mm512_set1_epi32(high), _MM_CMPINT_LE);
    const __m512i value = _mm512_loadu_si512(values + i);
    if constexpr (kVector == 16) {
      _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi32(chosen, value));
    } else {
      _mm512_storeu_si512(out + kept, _mm512_maskz_compress_epi64(static_cast<__mmask8>(chosen), value));
    }
    kept += __builtin_popcount(chosen);
  }
#endif
  for (; i < count; ++i) {
    const bool chosen = keys[i] >= low && keys[i] <= high;
    out[kept] = values[i];
    kept += chosen;
  }
  return kept;
}

// Finds the digit of the `wanted`-th smallest key; `wanted` becomes its rank among the keys with that digit.
int32_t find_digit(const int32_t* keys, int64_t count, int shift, int64_t& wanted) {
  // Four counts per bin: neighbors often fall into one bin, and would wait for each other's addition.
  int32_t bins[4][kBins] = {};
  for (int64_t i = 0; i < count; ++i) ++bins[i % 4][(keys[i] >> shift) & (kBins - 1)];
  int32_t digit = 0;
  for (;; ++digit) {
    const int64_t found = bins[0][digit] + bins[1][digit] + bins[2][digit] + bins[3][digit];
    if (wanted <= found) return digit;
    wanted -= found;
  }
}

// The largest of the `wanted` smallest keys; how many keys equal it, and how many of those are wanted.
struct Threshold {
  int32_t key;
  int64_t equal, wanted;
};

// Finds the threshold digit by digit, the highest first; `rest` has room for all keys.
Threshold least(const int32_t* keys, int64_t count, int64_t wanted, int32_t* rest) {
  int32_t key = find_digit(keys, count, 20, wanted) << 20;
  count = keep_between(keys, keys, count, key, key + ((1 << 20) - 1), rest);
  for (int shift = 10; shift >= 0; shift -= 10) {
    const int32_t digit = find_digit(rest, count, shift, wanted) & ((1 << 10) - 1);
    key |= digit << shift;
    count = keep_between(rest, rest, count, key, key + ((1 << shift) - 1), rest);
  }
  return {key, count, wanted};
}

// Moves the `wanted` points with the smallest keys to the front, in order.
void keep_least(Point* points, const int32_t* keys, int64_t count, int64_t wanted, int32_t* rest) {
  const Threshold threshold = least(keys, count, wanted, rest);
  if (threshold.equal == threshold.wanted) {
    keep_between(keys, points, count, 0, threshold.key, points);
    return;
  }
  int64_t kept = 0, equal = 0;
  for (int64_t i = 0; i < count; ++i) {
    points[kept] = points[i];
    const bool tie = keys[i] == threshold.key;
    kept += keys[i] < threshold.key || (tie && equal < threshold.wanted);
    equal += tie;
  }
}

}  // namespace

void uncertain_points_pair(const Plane& plane, uint64_t seed, uint32_t row, PointCounts counts,
                           const UncertainPointsWorkspace& work, float* points) {
  const int64_t drawn = counts.candidates + counts.points - counts.uncertain;
  Point* const stream = reinterpret_cast<Point*>(work.stream);
  load_bordered(plane, work.map);
  const int32_t stride = static_cast<int32_t>(plane.w) + 2;
  for (int64_t first = 0; first < drawn; first += kPointBatch) {
    const bool sampled = first < counts.candidates && counts.uncertain > 0;
    draw(seed, row, first, [&](int64_t at, vfloat x, vfloat y) {
      store_points(stream + at, x, y, std::make_integer_sequence<int, kLanes>{});
      if (!sampled) return;
      store(work.keys + at, certainty(sample(work.map, stride, positions(x, plane.w), positions(y, plane.h))));
    });
  }
  memcpy(points + 2 * counts.uncertain, stream + counts.candidates, sizeof(Point) * (drawn - counts.candidates));
  if (counts.uncertain == 0) return;
  keep_least(stream, work.keys, counts.candidates, counts.uncertain, work.passed);
  memcpy(points, stream, sizeof(Point) * counts.uncertain);
}

}  // namespace fastmask::FASTMASK_SIMD
