// score[k] = sum_n P[n, k] s_n for a block of pixels: a matrix product that keeps the sums of one block of classes
// after another in registers and passes them to a consumer, which stores them or finds the largest.
#pragma once

#include "cpu/semantic.h"
#include "cpu/simd/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int kMixVectors = kRegisters / 8;  // with blocks of 6 classes, 24 of 32 registers hold sums, or 12 of 16
constexpr int kMixPixels = kMixVectors * kLanes;
static_assert(kStrip % kMixPixels == 0);

template <int R, class Consumer>
inline void mix_block(const float* probabilities, int64_t k, const int32_t* queries, int64_t count, const float* start,
                      const float* sigmoids, int64_t stride, Consumer& consumer) {
  vfloat sums[R][kMixVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kMixVectors; ++v) sums[r][v] = start != nullptr ? splat(start[k + r]) : vfloat{};
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* p = probabilities + queries[i] * R;
    const float* s = sigmoids + i * stride;
    vfloat pixels[kMixVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kMixVectors; ++v) pixels[v] = load(s + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vfloat probability = splat(p[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v) sums[r][v] = fma(probability, pixels[v], sums[r][v]);
    }
  }
  consumer.take(k, sums);
}

// Calls run.operator()<R>() for R = classes in 1..kClassBlock.
template <int R = kClassBlock, class Run>
inline void for_class_count(int64_t classes, const Run& run) {
  if constexpr (R > 1) {
    if (classes != R) return for_class_count<R - 1>(classes, run);
  }
  run.template operator()<R>();
}

// Calls consumer.take(k, sums) with the scores of kMixPixels pixels for the classes from k on, block by block in
// ascending order. Each is start[k] (0 if null) plus P[n, k] times the sigmoids of the `count` listed queries, in
// order; the sigmoids of the i-th query begin at sigmoids + i * stride.
template <class Consumer>
inline void mix_classes(const ClassTable& table, const int32_t* queries, int64_t count, const float* start,
                        const float* sigmoids, int64_t stride, Consumer& consumer) {
  int64_t k = 0;
  for (int64_t block = 0; block < class_blocks(table.classes); ++block) {
    const int64_t classes = class_block_size(table.classes, block);
    const float* p = table.blocks + table.queries * k;
    for_class_count(classes, [&]<int R>() { mix_block<R>(p, k, queries, count, start, sigmoids, stride, consumer); });
    k += classes;
  }
}

static inline void keep_two(vfloat x, vfloat& best, vfloat& second) {
  second = maximum_of_numbers(second, minimum_of_numbers(x, best));
  best = maximum_of_numbers(best, x);
}

// The class of the largest score, the lowest among equals.
struct BestClass {
  vfloat score[kMixVectors];
  vint label[kMixVectors];

  BestClass() {
    for (int v = 0; v < kMixVectors; ++v) {
      score[v] = splat(-1.0f);
      label[v] = vint{};
    }
  }

  template <int R>
  void take(int64_t k, const vfloat (&sums)[R][kMixVectors]) {
#pragma GCC unroll 8
    for (int v = 0; v < kMixVectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vint better = sums[r][v] > score[v];
        label[v] = better ? splat(static_cast<int32_t>(k + r)) : label[v];
        score[v] = better ? sums[r][v] : score[v];
      }
    }
  }
};

// Also the runner-up's score; -1 if there is only one class.
struct BestTwoClasses : BestClass {
  vfloat second[kMixVectors];

  BestTwoClasses() {
    for (int v = 0; v < kMixVectors; ++v) second[v] = splat(-1.0f);
  }

  template <int R>
  void take(int64_t k, const vfloat (&sums)[R][kMixVectors]) {
#pragma GCC unroll 8
    for (int v = 0; v < kMixVectors; ++v) {
      vfloat best = score[v];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) keep_two(sums[r][v], best, second[v]);
    }
    BestClass::take(k, sums);
  }

  // Writes the winning score of `count` pixels and its lead over the runner-up, or the score if there is none.
  void write(int64_t classes, int64_t count, float* score_out, float* margin_out) const {
    vfloat margin[kMixVectors];
    for (int v = 0; v < kMixVectors; ++v) margin[v] = classes > 1 ? score[v] - second[v] : score[v];
    memcpy(score_out, score, count * sizeof(float));
    memcpy(margin_out, margin, count * sizeof(float));
  }
};

// The two largest scores, with the class in the last bits of each: four operations per score. Nearly equal scores may
// come in either order.
struct RoughBestTwo {
  vint tag_mask;
  vfloat best[kMixVectors], second[kMixVectors];

  explicit RoughBestTwo(int32_t mask) : tag_mask(splat(mask)) {
    for (int v = 0; v < kMixVectors; ++v) best[v] = second[v] = splat(-1.0f);
  }

  template <int R>
  void take(int64_t k, const vfloat (&sums)[R][kMixVectors]) {
#pragma GCC unroll 8
    for (int v = 0; v < kMixVectors; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        keep_two(with_tag(sums[r][v], splat(static_cast<int32_t>(k + r)), tag_mask), best[v], second[v]);
      }
    }
  }
};

// Writes the scores of `count` pixels to out[k * stride].
struct StoreScores {
  float* out;
  int64_t stride, count;

  template <int R>
  void take(int64_t k, const vfloat (&sums)[R][kMixVectors]) {
    for (int r = 0; r < R; ++r) {
      float* row = out + (k + r) * stride;
      if (count >= kMixPixels) {
        for (int v = 0; v < kMixVectors; ++v) store(row + v * kLanes, sums[r][v]);
      } else if (count > 0) {
        memcpy(row, sums[r], count * sizeof(float));
      }
    }
  }
};

template <class T>
inline void convert_labels(const int32_t* labels, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(labels[i]);
}

// Writes `count` labels from pixel `at` on.
inline void write_labels(const SemanticMaps& maps, int64_t at, const int32_t* labels, int64_t count) {
  switch (maps.label_bytes) {
    case 1:
      convert_labels(labels, count, static_cast<uint8_t*>(maps.labels) + at);
      break;
    case 2:
      convert_labels(labels, count, static_cast<int16_t*>(maps.labels) + at);
      break;
    default:
      convert_labels(labels, count, static_cast<int32_t*>(maps.labels) + at);
  }
}

// Writes the requested results for a row of `width` pixels from pixel `at` on to the maps, kMixPixels at a time:
// mix(j, consumer) passes a consumer the scores from the j-th pixel on.
template <class Mix>
inline void write_row(const SemanticMaps& maps, int64_t classes, int64_t at, int64_t width, const Mix& mix) {
  int32_t labels[kStrip];
  for (int64_t j = 0; j < width; j += kMixPixels) {
    const int64_t count = width - j < kMixPixels ? width - j : kMixPixels;
    if (maps.scores != nullptr) {
      StoreScores scores{maps.scores + at + j, maps.rows * maps.width, count};
      mix(j, scores);
    } else if (maps.score != nullptr) {
      BestTwoClasses best;
      mix(j, best);
      memcpy(labels + j, best.label, sizeof best.label);
      best.write(classes, count, maps.score + at + j, maps.margin + at + j);
    } else {
      BestClass best;
      mix(j, best);
      memcpy(labels + j, best.label, sizeof best.label);
    }
  }
  if (maps.labels != nullptr) write_labels(maps, at, labels, width);
}

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
