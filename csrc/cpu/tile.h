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

// The lowest and the highest logit that a tile reads, clamped; NaN counts as neither, but is noted.
struct Bounds {
  float low, high;
  bool nan;
};

static inline Bounds bounds(const Plane& plane, const TilePlan& plan, float* buffer) {
  const AxisTile& rows = plan.probabilities ? plan.inner_rows : plan.rows;
  const AxisTile& columns = plan.probabilities ? plan.inner_columns : plan.columns;
  vfloat low = splat(kLogitBound), high = splat(-kLogitBound);
  vint nan = {};
  const int64_t count = columns.inputs;
  for (int64_t i = 0; i < rows.inputs; ++i) {
    const Logits row = after(row_of(plane, rows.input[i]), columns.input[0]);
    const float* x = buffer;
    if (row.dtype == Dtype::kFloat32 && count >= kLanes) {
      x = static_cast<const float*>(row.data) + row.offset;
    } else {
      load_logits(row, count, buffer);
      for (int64_t j = count; j < kLanes; ++j) buffer[j] = buffer[0];
    }
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t last = count - kLanes;
      const vfloat v = load(x + (j <= last || last < 0 ? j : last));
      low = minimum(v, low);
      high = maximum(v, high);
      nan |= v != v;
    }
  }
  Bounds result{low[0], high[0], false};
  for (int i = 0; i < kLanes; ++i) {
    result.low = low[i] < result.low ? low[i] : result.low;
    result.high = high[i] > result.high ? high[i] : result.high;
    result.nan |= nan[i] != 0;
  }
  result.low = result.low < -kLogitBound ? -kLogitBound : result.low;
  result.high = result.high > kLogitBound ? kLogitBound : result.high;
  return result;
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
