// A row of values resampled to the columns of one strip of pixels.
#pragma once

#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

class StripColumns {
 public:
  StripColumns(const Taps& columns, int64_t strip)
      : taps_(columns.taps), stride_(columns.stride), weight_(columns.weight + strip * kStrip) {
    const int32_t* index = columns.index + strip * kStrip;
    left_ = index[0];
    end_ = index[(taps_ - 1) * stride_ + kStrip - 1] + 1;
    for (int t = 0; t < taps_; ++t) {
      for (int64_t j = 0; j < kStrip; ++j) relative_[t][j] = index[t * stride_ + j] - left_;
    }
#if defined(__AVX512F__)
    // Where 16 neighbouring pixels read from two vectors, a permutation is faster than gathering.
    permute_ = true;
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      permute_ &= relative_[taps_ - 1][j + kLanes - 1] - relative_[0][j] < 2 * kLanes;
    }
#endif
  }

  // The columns [left, left + span) are read, of which the pixels [j, j + count) read [first(j), last(j + count - 1)],
  // counted from left.
  int64_t left() const { return left_; }
  int64_t span() const { return end_ - left_; }
  int64_t first(int64_t j) const { return relative_[0][j]; }
  int64_t last(int64_t j) const { return relative_[taps_ - 1][j]; }

  // The pixels [j, j + kLanes), from the values of the columns from left on; 2 * kLanes values beyond span can be read.
  vfloat apply(const float* values, int64_t j) const {
    vfloat x;
#if defined(__AVX512F__)
    if (permute_) {
      const int32_t base = relative_[0][j];
      const __m512 low = (__m512)load(values + base), high = (__m512)load(values + base + kLanes);
      for (int t = 0; t < taps_; ++t) {
        const vint from = load(relative_[t] + j) - splat(base);
        const vfloat value = (vfloat)_mm512_permutex2var_ps(low, (__m512i)from, high);
        x = t == 0 ? value * load(weight_ + j) : fma(value, load(weight_ + t * stride_ + j), x);
      }
      return x;
    }
#endif
    x = gather(values, load(relative_[0] + j)) * load(weight_ + j);
    for (int t = 1; t < taps_; ++t) {
      x = fma(gather(values, load(relative_[t] + j)), load(weight_ + t * stride_ + j), x);
    }
    return x;
  }

 private:
  int taps_;
  int64_t stride_;
  const float* weight_;  // [taps, stride_] from the strip's first column on
  int64_t left_, end_;
  int32_t relative_[kMaxTaps][kStrip];
#if defined(__AVX512F__)
  bool permute_;
#endif
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
