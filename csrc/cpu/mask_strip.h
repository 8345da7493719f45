// Resampled mask logits of one strip of pixels, as sigmoids.
#pragma once

#include "cpu/semantic.h"
#include "cpu/vec.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// Reads `count` logits within +-kLogitBound, NaN as the lower bound, and 0 up to a multiple of 16. Returns how many are
// NaN.
inline int64_t load_bounded(const MaskPlanes& planes, int64_t n, int64_t row, int64_t column, int64_t count,
                            float* out) {
  load_logits(planes.logits, planes.dtype, planes.offset + n * planes.query_stride + row * planes.row_stride + column,
              count, out);
  int64_t nans = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat x = load(out + i);
    nans += __builtin_popcount(lane_bits(x != x));
    const vfloat above = x > -kLogitBound ? x : splat(-kLogitBound);
    store(out + i, minimum(above, splat(kLogitBound)));
  }
  return nans;
}

// Cuts scratch memory into pieces.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}

  template <class T = float>
  T* take(int64_t count) {
    static_assert(sizeof(T) == sizeof(float));
    T* piece = reinterpret_cast<T*>(next_);
    next_ += count;
    return piece;
  }

 private:
  float* next_;
};

constexpr int64_t kTileRows = 8;

// A row of logits is stretched to the strip's width when a query is first asked for at a row of pixels that reads it;
// the rows that one row of pixels reads are kept, so that the rows of pixels below find them.
class MaskStrip {
 public:
  MaskStrip(const MaskPlanes& planes, const Taps& rows, const Taps& columns, int64_t strip, Scratch& scratch)
      : planes_(planes), rows_(rows), columns_(columns), strip_(strip) {
    const int64_t queries = planes.queries, padded = to_full_vectors(queries);
    for (int t = 0; t < rows.taps; ++t) {
      stretched_[t] = scratch.take(queries * kStrip);
      held_[t] = scratch.take<int32_t>(padded);
      for (int64_t n = 0; n < padded; ++n) held_[t][n] = -1;
    }
    const int32_t* first = columns.index + strip * kStrip;
    const int32_t* last = first + (columns.taps - 1) * columns.stride + kStrip - 1;
    left_ = *first;
    span_ = *last + 1 - left_;
    source_ = scratch.take(to_full_vectors(span_) + 2 * kStrip);
    memset(source_, 0, sizeof(float) * (to_full_vectors(span_) + 2 * kStrip));
    for (int t = 0; t < columns.taps; ++t) {
      for (int64_t j = 0; j < kStrip; ++j) relative_[t][j] = first[t * columns.stride + j] - left_;
    }
#if defined(__AVX512F__)
    // Where 16 neighbouring pixels read from two vectors of logits, a permutation is faster than gathering.
    permute_ = true;
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      permute_ &= relative_[columns.taps - 1][j + kLanes - 1] - relative_[0][j] < 2 * kLanes;
    }
#endif
  }

  // The end of the rows of pixels from y on that read the same rows of logits, at most kTileRows of them.
  int64_t same_rows(int64_t y, int64_t end) const {
    int64_t next = y + 1;
    while (next < end && next < y + kTileRows && reads_same(y, next)) ++next;
    return next;
  }

  // Goes to a row of pixels and those that read the same rows of logits.
  void go_to(int64_t y) {
    const int32_t first = row_of(0, y), last = row_of(rows_.taps - 1, y);
    for (int t = 0; t < rows_.taps; ++t) {
      const int32_t row = row_of(t, y);
      row_[t] = row;
      slot_[t] = last - first < rows_.taps ? row % rows_.taps : t;
    }
  }

  // The largest sigmoid that each query can have at the rows of pixels gone to, [to_full_vectors(queries)].
  void bounds(const float* cells, float* out) const {
    const int64_t padded = to_full_vectors(planes_.queries);
    const int64_t strips = columns_.stride / kStrip;
    for (int64_t n = 0; n < padded; n += kLanes) {
      vfloat x = load(cells + (row_[0] * strips + strip_) * padded + n);
      for (int t = 1; t < rows_.taps; ++t) x = maximum(x, load(cells + (row_[t] * strips + strip_) * padded + n));
      // Interpolation rounds: weights may exceed 1 in sum, and the sigmoid is monotonous up to its own error only.
      const vfloat slack = (x < 0.0f ? -x : x) * 0x1p-20f;
      store(out + n, logistic(x + slack) * (1.0f + 0x1p-20f));
    }
  }

  // sigmoid(x_n) at row y of the listed queries, to out[i * kStrip].
  void sigmoids(const int32_t* queries, int64_t count, int64_t y, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = queries[i];
      for (int t = 0; t < rows_.taps; ++t) stretch(n, t);
      switch (rows_.taps) {
        case 1:
          row_sigmoids<1>(n, y, out + i * kStrip);
          break;
        case 2:
          row_sigmoids<2>(n, y, out + i * kStrip);
          break;
        case 3:
          row_sigmoids<3>(n, y, out + i * kStrip);
          break;
        default:
          row_sigmoids<4>(n, y, out + i * kStrip);
      }
    }
  }

  // The same for single pixels, a vector of them in rows and columns of the strip, of all queries, to out[n * stride].
  void sigmoids_at(vint y, vint column, float* out, int64_t stride) {
    vfloat weights[kMaxTaps];
    for (int t = 0; t < rows_.taps; ++t) weights[t] = gather(rows_.weight + t * rows_.stride, y);
    for (int64_t n = 0; n < planes_.queries; ++n) {
      for (int t = 0; t < rows_.taps; ++t) stretch(n, t);
      vfloat x = gather(stretched_[slot_[0]] + n * kStrip, column) * weights[0];
      for (int t = 1; t < rows_.taps; ++t) x = fma(gather(stretched_[slot_[t]] + n * kStrip, column), weights[t], x);
      store(out + n * stride, logistic(x));
    }
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
  void row_sigmoids(int64_t n, int64_t y, float* out) const {
    const float* rows[kTaps];
    vfloat weights[kTaps];
    for (int t = 0; t < kTaps; ++t) {
      rows[t] = stretched_[slot_[t]] + n * kStrip;
      weights[t] = splat(rows_.weight[t * rows_.stride + y]);
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      vfloat x = load(rows[0] + j) * weights[0];
      for (int t = 1; t < kTaps; ++t) x = fma(load(rows[t] + j), weights[t], x);
      store(out + j, logistic(x));
    }
  }

  // Makes row row_[t] of query n.
  void stretch(int64_t n, int t) {
    int32_t& held = held_[slot_[t]][n];
    if (held == row_[t]) return;
    held = row_[t];
    float* out = stretched_[slot_[t]] + n * kStrip;
    load_bounded(planes_, n, row_[t], left_, span_, source_);
    for (int64_t j = 0; j < kStrip; j += kLanes) {
      const float* weight = columns_.weight + strip_ * kStrip + j;
      vfloat x;
#if defined(__AVX512F__)
      if (permute_) {
        const int32_t base = relative_[0][j];
        const __m512 low = (__m512)load(source_ + base), high = (__m512)load(source_ + base + kLanes);
        for (int u = 0; u < columns_.taps; ++u) {
          const vint from = load(relative_[u] + j) - splat(base);
          const vfloat value = (vfloat)_mm512_permutex2var_ps(low, (__m512i)from, high);
          x = u == 0 ? value * load(weight) : fma(value, load(weight + u * columns_.stride), x);
        }
        store(out + j, x);
        continue;
      }
#endif
      x = gather(source_, load(relative_[0] + j)) * load(weight);
      for (int u = 1; u < columns_.taps; ++u) {
        x = fma(gather(source_, load(relative_[u] + j)), load(weight + u * columns_.stride), x);
      }
      store(out + j, x);
    }
  }

  const MaskPlanes& planes_;
  const Taps& rows_;
  const Taps& columns_;
  const int64_t strip_;
  float* stretched_[kMaxTaps];  // [queries, kStrip] of each slot
  int32_t* held_[kMaxTaps];     // the row of logits that each query's row in a slot was made of
  float* source_;
  int32_t left_, span_;
  int32_t relative_[kMaxTaps][kStrip];  // what each pixel reads of source_
  int32_t row_[kMaxTaps];
  int slot_[kMaxTaps];
#if defined(__AVX512F__)
  bool permute_;
#endif
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
