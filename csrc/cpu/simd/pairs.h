// Pairs in memory, such as the coordinates of points, as two vectors.
#pragma once

#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {

// first[i] = p[2 i], second[i] = p[2 i + 1].
static inline void load_pairs(const float* p, vfloat& first, vfloat& second) {
  const vfloat low = load(p), high = load(p + kLanes);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Shuffles within halves of a vector need no vectors of indices.
  const vfloat outer = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(low, high);
  const vfloat inner = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(low, high);
  first = shuffle<0, 2, 8, 10, 4, 6, 12, 14>(outer, inner);
  second = shuffle<1, 3, 9, 11, 5, 7, 13, 15>(outer, inner);
#else
  [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    first = shuffle<(2 * kLane)...>(low, high);
    second = shuffle<(2 * kLane + 1)...>(low, high);
  }(std::make_integer_sequence<int, kLanes>{});
#endif
}

static inline void store_pairs(float* p, vfloat first, vfloat second) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const vfloat outer = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(first, second);
  const vfloat inner = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(first, second);
  store(p, shuffle<0, 1, 2, 3, 8, 9, 10, 11>(outer, inner));
  store(p + kLanes, shuffle<4, 5, 6, 7, 12, 13, 14, 15>(outer, inner));
#else
  [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    store(p, shuffle<(kLane / 2 + kLane % 2 * kLanes)...>(first, second));
    store(p + kLanes, shuffle<(kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...>(first, second));
  }(std::make_integer_sequence<int, kLanes>{});
#endif
}

}  // namespace fastmask::FASTMASK_SIMD
