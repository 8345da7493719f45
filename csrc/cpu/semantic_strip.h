// Resampling to one strip of pixels: of a row of values, and of mask logits to sigmoids.
#pragma once

#include "cpu/semantic.h"
#include "cpu/simd/functions.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

class StripColumns {
 public:
  StripColumns(const Taps& columns, int64_t strip)
      : taps_(columns.taps),
        stride_(columns.stride),
        weight_(columns.weight + strip * kStrip),
        left_(strip_span(columns, strip).left) {
    const int32_t* index = columns.index + strip * kStrip;
    for (int t = 0; t < taps_; ++t) {
      for (int64_t j = 0; j < kStrip; ++j) relative_[t][j] = index[t * stride_ + j] - static_cast<int32_t>(left_);
    }
#if defined(__AVX512F__)
    // If 16 neighboring pixels read from two vectors, a permutation is faster than a gather.
    permute_ = true;
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      permute_ &= relative_[taps_ - 1][j + kLanes - 1] - relative_[0][j] < 2 * kLanes;
    }
#endif
  }

  // The first column that the strip reads. Relative to it, the pixels [i, j] read the columns [first(i), last(j)].
  int64_t left() const { return left_; }
  int64_t first(int64_t j) const { return relative_[0][j]; }
  int64_t last(int64_t j) const { return relative_[taps_ - 1][j]; }

  // The pixels [j, j + kLanes), from the values of the columns from left on, which 2 * kLanes readable floats follow.
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

// Elements of a row of kStrip.
inline vfloat pick(const float* row, vint column) {
#if defined(__AVX512F__)
  static_assert(kStrip == 4 * kLanes);
  const vfloat low = (vfloat)_mm512_permutex2var_ps((__m512)load(row), (__m512i)column, (__m512)load(row + kLanes));
  const vfloat high =
      (vfloat)_mm512_permutex2var_ps((__m512)load(row + 2 * kLanes), (__m512i)column, (__m512)load(row + 3 * kLanes));
  return column < 2 * kLanes ? low : high;
#else
  return gather(row, column);
#endif
}

constexpr int64_t kRowsTogether = 8;

// A row of logits is stretched to the strip's width when a query is first requested at a row of pixels that reads it;
// the rows that one row of pixels reads are kept for the rows of pixels below.
class MaskStrip {
 public:
  MaskStrip(const PackedLogits& packed, const Taps& rows, const Taps& columns, int64_t strip,
            const MaskStripWorkspace& work)
      : packed_(packed), rows_(rows), columns_(columns, strip), strip_(strip), work_(work) {
    for (int t = 0; t < rows.taps; ++t) {
      for (int64_t n = 0; n < packed.queries; ++n) work.held[t][n] = -1;
    }
  }

  // The end of the pixel rows from y on that read the same rows of logits, at most kRowsTogether of them.
  int64_t same_rows(int64_t y, int64_t end) const {
    int64_t next = y + 1;
    while (next < end && next < y + kRowsTogether && reads_same(y, next)) ++next;
    return next;
  }

  // Moves to a row of pixels and those that read the same rows of logits.
  void go_to(int64_t y) {
    const int32_t first = row_of(0, y), last = row_of(rows_.taps - 1, y);
    for (int t = 0; t < rows_.taps; ++t) {
      const int32_t row = row_of(t, y);
      row_[t] = row;
      slot_[t] = last - first < rows_.taps ? row % rows_.taps : t;
    }
  }

  // The largest sigmoid that each query can have at the current rows of pixels, [to_full_vectors(queries)].
  void bounds(float* out) const {
    const int64_t padded = to_full_vectors(packed_.queries);
    for (int64_t n = 0; n < padded; n += kLanes) {
      vfloat x = load(cells(0) + n);
      for (int t = 1; t < rows_.taps; ++t) x = maximum(x, load(cells(t) + n));
      // Allows for rounding: weights may add up to more than 1, and the sigmoid is monotonic only up to its error.
      const vfloat slack = (x < 0.0f ? -x : x) * 0x1p-20f;
      store(out + n, logistic(x + slack) * (1.0f + 0x1p-20f));
    }
  }

  // sigmoid(x_n) of the listed queries at row y, to out[i * kStrip].
  void sigmoids(const int32_t* queries, int64_t count, int64_t y, float* out) {
    with_taps([&](auto taps) {
      vfloat weights[taps];
      for (int t = 0; t < taps; ++t) weights[t] = splat(rows_.weight[t * rows_.stride + y]);
      for (int64_t i = 0; i < count; ++i) {
        const float* rows[taps];
        for (int t = 0; t < taps; ++t) rows[t] = stretched(queries[i], t);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kStrip; j += kLanes) {
          vfloat x = load(rows[0] + j) * weights[0];
          for (int t = 1; t < taps; ++t) x = fma(load(rows[t] + j), weights[t], x);
          store(out + i * kStrip + j, logistic(x));
        }
      }
    });
  }

  // The same for all queries at a vector of single pixels, at rows y and columns of the strip, to out[n * stride].
  void sigmoids_at(vint y, vint column, float* out, int64_t stride) {
    with_taps([&](auto taps) {
      vfloat weights[taps];
      for (int t = 0; t < taps; ++t) weights[t] = gather(rows_.weight + t * rows_.stride, y);
      for (int64_t n = 0; n < packed_.queries; ++n) {
        vfloat x = pick(stretched(n, 0), column) * weights[0];
        for (int t = 1; t < taps; ++t) x = fma(pick(stretched(n, t), column), weights[t], x);
        store(out + n * stride, logistic(x));
      }
    });
  }

 private:
  int32_t row_of(int t, int64_t y) const { return rows_.index[t * rows_.stride + y]; }

  bool reads_same(int64_t y, int64_t other) const {
    for (int t = 0; t < rows_.taps; ++t) {
      if (row_of(t, y) != row_of(t, other)) return false;
    }
    return true;
  }

  template <int kTaps>
  struct Count {
    constexpr operator int() const { return kTaps; }
  };

  // Calls f with the number of rows that a pixel reads as a constant.
  template <class F>
  void with_taps(F f) {
    switch (rows_.taps) {
      case 1:
        return f(Count<1>());
      case 2:
        return f(Count<2>());
      case 3:
        return f(Count<3>());
      default:
        return f(Count<4>());
    }
  }

  const float* cells(int t) const {
    return packed_.cells + ((row_[t] - packed_.top) * packed_.strips + strip_) * to_full_vectors(packed_.queries);
  }

  // Row row_[t] of query n.
  const float* stretched(int64_t n, int t) {
    float* out = work_.stretched[slot_[t]] + n * kStrip;
    int32_t& held = work_.held[slot_[t]][n];
    if (held != row_[t]) {
      held = row_[t];
      stretch(n, row_[t], out);
    }
    return out;
  }

  void stretch(int64_t n, int64_t row, float* out) const {
    const int64_t at = (strip_ * packed_.rows + row - packed_.top) * packed_.queries + n;
    const float* logits = packed_.logits + at * packed_.stride;
    for (int64_t j = 0; j < kStrip; j += kLanes) store(out + j, columns_.apply(logits, j));
  }

  const PackedLogits& packed_;
  const Taps& rows_;
  const StripColumns columns_;
  const int64_t strip_;
  const MaskStripWorkspace& work_;
  int32_t row_[kMaxTaps];
  int slot_[kMaxTaps];
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
