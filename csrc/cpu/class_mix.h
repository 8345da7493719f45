// score[k] = sum_n P[n, k] s_n for a block of pixels: a matrix product whose sums stay in registers, block of classes
// by block of classes, and go from there to whoever wants them.
#pragma once

#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

#if defined(__AVX512F__)
constexpr int kMixVectors = 4;  // with blocks of 6 classes 24 of 32 registers hold sums
#else
constexpr int kMixVectors = 2;  // 12 of 16
#endif
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

// Gives consumer.take(k, sums) the scores of kMixPixels pixels for the classes from k on, block by block, in rising
// order. Each is start[k] (0 if null) plus P[n, k] times the sigmoids of the `count` listed queries, in their order;
// the sigmoids of the i-th begin at sigmoids + i * stride.
template <class Consumer>
inline void mix_classes(const ClassTable& table, const int32_t* queries, int64_t count, const float* start,
                        const float* sigmoids, int64_t stride, Consumer& consumer) {
  static_assert(kClassBlock == 6);
  int64_t k = 0;
  for (int64_t block = 0; block < class_blocks(table.classes); ++block) {
    const int64_t classes = class_block_size(table.classes, block);
    const float* p = table.blocks + table.queries * k;
    switch (classes) {
      case 1:
        mix_block<1>(p, k, queries, count, start, sigmoids, stride, consumer);
        break;
      case 2:
        mix_block<2>(p, k, queries, count, start, sigmoids, stride, consumer);
        break;
      case 3:
        mix_block<3>(p, k, queries, count, start, sigmoids, stride, consumer);
        break;
      case 4:
        mix_block<4>(p, k, queries, count, start, sigmoids, stride, consumer);
        break;
      case 5:
        mix_block<5>(p, k, queries, count, start, sigmoids, stride, consumer);
        break;
      default:
        mix_block<6>(p, k, queries, count, start, sigmoids, stride, consumer);
    }
    k += classes;
  }
}

// The class of the largest score; the lowest of equal ones.
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

// And the runner-up's score; -1 if there is one class only.
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
      for (int r = 0; r < R; ++r) {
        second[v] = maximum(second[v], minimum(sums[r][v], best));
        best = maximum(best, sums[r][v]);
      }
    }
    BestClass::take(k, sums);
  }

  // Winning score and its distance to the runner-up, or the score itself if there is none, of `count` pixels.
  void write(int64_t classes, int64_t count, float* score_out, float* margin_out) const {
    vfloat margin[kMixVectors];
    for (int v = 0; v < kMixVectors; ++v) margin[v] = classes > 1 ? score[v] - second[v] : score[v];
    memcpy(score_out, score, count * sizeof(float));
    memcpy(margin_out, margin, count * sizeof(float));
  }
};

// The two largest scores, the class in the last bits of each: four operations a score. Which of two nearly equal
// classes comes first is open.
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
        const vfloat tagged = with_tag(sums[r][v], splat(static_cast<int32_t>(k + r)), tag_mask);
        second[v] = maximum(second[v], minimum(tagged, best[v]));
        best[v] = maximum(best[v], tagged);
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

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
