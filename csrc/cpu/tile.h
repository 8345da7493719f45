// Bounds of a query's logits in a tile, and the resampled tile. Only functions of this level's namespace.
#pragma once

#include <cstdint>

#include "common/tiles.h"
#include "cpu/simd/functions.h"
#include "cpu/simd/load_logits.h"

namespace fastmask::FASTMASK_SIMD {

// table[index] in each lane; the table has `count` floats, and at least 32 can be read.
static inline vfloat look_up(const float* table, [[maybe_unused]] int64_t count, vint index) {
#if defined(__AVX512F__)
  if (count <= 2 * kLanes) {
    return (vfloat)_mm512_permutex2var_ps((__m512)load(table), (__m512i)index, (__m512)load(table + kLanes));
  }
#endif
  return gather(table, index);
}

// x clamped to +-bound; NaN stays NaN.
static inline vfloat clamp(vfloat x, float bound) { return at_least(at_most(x, bound), -bound); }

// sigmoid(x), NaN for NaN; constant below -87.
static inline vfloat probability(vfloat x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  return 1.0f / (1.0f + exp_neg(x));
}

// Writes the lowest and the highest logit of each of a plane's columns in the rows that a band of tiles reads; NaN
// counts as neither. Whole rows are read in order: tile by tile, most of the time would go to waiting for memory.
static inline void find_band_bounds(const Plane& plane, const TilePlan& plan, const BandBounds& bounds) {
  const AxisTile& rows = plan.probabilities ? plan.inner_rows : plan.rows;
  const int64_t w = plane.w, last = w > kLanes ? w - kLanes : 0;
  for (int64_t i = 0; i < rows.inputs; ++i) {
    const Logits row = row_of(plane, rows.input[i]);
    const float* x = bounds.row;
    if (row.dtype == Dtype::kFloat32 && w >= kLanes) {
      x = static_cast<const float*>(row.data) + row.offset;
    } else {
      load_logits(row, w, bounds.row);
    }
    for (int64_t j = 0; j < w; j += kLanes) {
      const int64_t at = j < last ? j : last;
      const vfloat v = load(x + at);
      store(bounds.low + at, minimum(v, i == 0 ? splat(kLogitBound) : load(bounds.low + at)));
      store(bounds.high + at, maximum(v, i == 0 ? splat(-kLogitBound) : load(bounds.high + at)));
    }
  }
}

struct Range {
  float low, high;
};

// The range of the logits that a tile of the band reads, clamped.
static inline Range range_of_tile(const TilePlan& plan, const BandBounds& bounds) {
  const AxisTile& columns = plan.probabilities ? plan.inner_columns : plan.columns;
  const float *lows = bounds.low + columns.input[0], *highs = bounds.high + columns.input[0];
  const int64_t count = columns.inputs;
  Range range{kLogitBound, -kLogitBound};
  if (count >= kLanes) {
    vfloat low = load(lows), high = load(highs);
    for (int64_t j = kLanes; j < count; j += kLanes) {
      const int64_t at = j < count - kLanes ? j : count - kLanes;
      low = minimum(low, load(lows + at));
      high = maximum(high, load(highs + at));
    }
    range = {combine_lanes(low, [](vfloat a, vfloat b) { return minimum(a, b); }),
             combine_lanes(high, [](vfloat a, vfloat b) { return maximum(a, b); })};
  } else {
    for (int64_t j = 0; j < count; ++j) {
      range.low = lows[j] < range.low ? lows[j] : range.low;
      range.high = highs[j] > range.high ? highs[j] : range.high;
    }
  }
  return {range.low > -kLogitBound ? range.low : -kLogitBound, range.high < kLogitBound ? range.high : kLogitBound};
}

// out[i] for one row of inputs, up to a full vector.
static inline void resample_row(const float* inputs, const AxisTile& columns, float* out) {
  for (int64_t j = 0; j < columns.stride; j += kLanes) {
    vfloat sum = look_up(inputs, columns.inputs, load(columns.slot + j)) * load(columns.weight + j);
    for (int t = 1; t < columns.taps; ++t) {
      const int64_t at = t * columns.stride + j;
      sum = fma(look_up(inputs, columns.inputs, load(columns.slot + at)), load(columns.weight + at), sum);
    }
    store(out + j, sum);
  }
}

// Output row i of a tile whose input rows have been resampled along the columns, `stride` floats apart.
static inline void resample_column(const float* inputs, int64_t stride, const AxisTile& rows, int64_t i, float* out) {
  const float* first = inputs + rows.slot[i] * stride;
  const float* second = inputs + rows.slot[(rows.taps > 1 ? rows.stride : 0) + i] * stride;
  const vfloat weight = splat(rows.weight[i]);
  const vfloat second_weight = splat(rows.taps > 1 ? rows.weight[rows.stride + i] : 0.0f);
  for (int64_t j = 0; j < stride; j += kLanes) {
    store(out + j, fma(load(second + j), second_weight, load(first + j) * weight));
  }
  for (int t = 2; t < rows.taps; ++t) {
    const float* other = inputs + rows.slot[t * rows.stride + i] * stride;
    const vfloat other_weight = splat(rows.weight[t * rows.stride + i]);
    for (int64_t j = 0; j < stride; j += kLanes) store(out + j, fma(load(other + j), other_weight, load(out + j)));
  }
}

static inline void load_piece(const Plane& plane, int64_t row, const AxisTile& columns, float* piece) {
  load_logits(after(row_of(plane, row), columns.input[0]), columns.inputs, piece);
  for (int64_t j = 0; j < columns.inputs; j += kLanes) store(piece + j, clamp(load(piece + j), kLogitBound));
}

// Writes the logits of a tile's pixels, or probabilities if the plan says so, to work.values: [rows.count,
// columns.stride], NaN beyond columns.count.
static inline void resample_tile(const Plane& plane, const TilePlan& plan, const TileWorkspace& work) {
  const AxisTile& rows = plan.rows;
  const AxisTile& columns = plan.columns;
  if (!plan.probabilities) {
    for (int64_t i = 0; i < rows.inputs; ++i) {
      load_piece(plane, rows.input[i], columns, work.piece);
      resample_row(work.piece, columns, work.rows + i * columns.stride);
    }
  } else {
    const AxisTile& inner_rows = plan.inner_rows;
    const AxisTile& inner_columns = plan.inner_columns;
    for (int64_t i = 0; i < inner_rows.inputs; ++i) {
      load_piece(plane, inner_rows.input[i], inner_columns, work.piece);
      resample_row(work.piece, inner_columns, work.inner + i * inner_columns.stride);
    }
    for (int64_t i = 0; i < rows.inputs; ++i) {
      resample_column(work.inner, inner_columns.stride, inner_rows, i, work.piece);
      for (int64_t j = 0; j < inner_columns.stride; j += kLanes) {
        store(work.piece + j, probability(load(work.piece + j)));
      }
      resample_row(work.piece, columns, work.rows + i * columns.stride);
    }
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    resample_column(work.rows, columns.stride, rows, i, work.values + i * columns.stride);
  }
}

}  // namespace fastmask::FASTMASK_SIMD
