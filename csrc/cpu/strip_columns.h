// A row of values resampled to the columns of one strip of pixels.
#pragma once

#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// The columns that a strip of pixels reads.
struct StripSpan {
  int64_t left, count;

  StripSpan(const Taps& columns, int64_t strip) {
    const int32_t* index = columns.index + strip * kStrip;
    left = index[0];
    count = index[(columns.taps - 1) * columns.stride + kStrip - 1] + 1 - left;
  }
};

class StripColumns {
 public:
  StripColumns(const Taps& columns, int64_t strip)
      : taps_(columns.taps),
        stride_(columns.stride),
        weight_(columns.weight + strip * kStrip),
        left_(StripSpan(columns, strip).left) {
    const int32_t* index = columns.index + strip * kStrip;
    for (int t = 0; t < taps_; ++t) {
      for (int64_t j = 0; j < kStrip; ++j) relative_[t][j] = index[t * stride_ + j] - static_cast<int32_t>(left_);
    }
#if defined(__AVX512F__)
    // Where 16 neighboring pixels read from two vectors, a permutation is faster than gathering.
    permute_ = true;
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      permute_ &= relative_[taps_ - 1][j + kLanes - 1] - relative_[0][j] < 2 * kLanes;
    }
#endif
  }

  // The first column that the strip reads. Counted from it, the pixels [i, j] read the columns [first(i), last(j)].
  int64_t left() const { return left_; }
  int64_t first(int64_t j) const { return relative_[0][j]; }
  int64_t last(int64_t j) const { return relative_[taps_ - 1][j]; }

  // The pixels [j, j + kLanes), from the values of the columns from left on, and 2 * kLanes more that can be read.
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
  int64_t left_;
  int32_t relative_[kMaxTaps][kStrip];
#if defined(__AVX512F__)
  bool permute_;
#endif
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
