// Resampled mask logits of one strip of pixels, as sigmoids.
#pragma once

#include "cpu/semantic.h"
#include "cpu/strip_columns.h"
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
      : planes_(planes), rows_(rows), columns_(columns, strip), strip_(strip), strips_(columns.stride / kStrip) {
    const int64_t queries = planes.queries, padded = to_full_vectors(queries);
    for (int t = 0; t < rows.taps; ++t) {
      stretched_[t] = scratch.take(queries * kStrip);
      held_[t] = scratch.take<int32_t>(padded);
      for (int64_t n = 0; n < padded; ++n) held_[t][n] = -1;
    }
    const int64_t readable = to_full_vectors(columns_.span()) + 2 * kLanes;
    source_ = scratch.take(readable);
    memset(source_, 0, sizeof(float) * readable);
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
    for (int64_t n = 0; n < padded; n += kLanes) {
      vfloat x = load(cells + (row_[0] * strips_ + strip_) * padded + n);
      for (int t = 1; t < rows_.taps; ++t) x = maximum(x, load(cells + (row_[t] * strips_ + strip_) * padded + n));
      // Interpolation rounds: weights may exceed 1 in sum, and the sigmoid is monotonous up to its own error only.
      const vfloat slack = (x < 0.0f ? -x : x) * 0x1p-20f;
      store(out + n, logistic(x + slack) * (1.0f + 0x1p-20f));
    }
  }

  // sigmoid(x_n) at row y of the listed queries, to out[i * kStrip].
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

  // The same for single pixels, a vector of them at rows y and columns of the strip, of all queries, to out[n *
  // stride].
  void sigmoids_at(vint y, vint column, float* out, int64_t stride) {
    with_taps([&](auto taps) {
      vfloat weights[taps];
      for (int t = 0; t < taps; ++t) weights[t] = gather(rows_.weight + t * rows_.stride, y);
      for (int64_t n = 0; n < planes_.queries; ++n) {
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

  // Row row_[t] of query n.
  const float* stretched(int64_t n, int t) {
    float* out = stretched_[slot_[t]] + n * kStrip;
    int32_t& held = held_[slot_[t]][n];
    if (held != row_[t]) {
      held = row_[t];
      stretch(n, row_[t], out);
    }
    return out;
  }

  __attribute__((noinline)) void stretch(int64_t n, int64_t row, float* out) {
    load_bounded(planes_, n, row, columns_.left(), columns_.span(), source_);
    for (int64_t j = 0; j < kStrip; j += kLanes) store(out + j, columns_.apply(source_, j));
  }

  const MaskPlanes& planes_;
  const Taps& rows_;
  const StripColumns columns_;
  const int64_t strip_, strips_;
  float* stretched_[kMaxTaps];  // [queries, kStrip] of each slot
  int32_t* held_[kMaxTaps];     // the row of logits that each query's row in a slot was made of
  float* source_;               // one row of logits
  int32_t row_[kMaxTaps];
  int slot_[kMaxTaps];
};

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD
