#include "cpu/deformable_attention.h"

#include "cpu/masked_attention_tiles.h"
#include "cpu/simd/gather.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

using Workspace = DeformableWorkspace;

inline void load_row(const DeformableRows<const void>& rows, int64_t index, int64_t count, float* out) {
  load_logits({rows.data, rows.dtype, rows.offset + index * rows.stride}, count, out);
}

inline void store_row(const float* in, const DeformableRows<void>& rows, int64_t index, int64_t count) {
  store_logits(in, count, rows.data, rows.dtype, rows.offset + index * rows.stride);
}

// Finds the four pixels around each point of a query, and their weights. A point that is a pixel or more outside, or at
// NaN, has none.
void find_pixels(const DeformableLevels& levels, const DeformableHead& head, int64_t query, const Workspace& work) {
  const float* locations = head.locations + 2 * query * head.stride;
  for (int64_t i = 0; i < levels.points; ++i) {
    work.x[i] = locations[2 * i];
    work.y[i] = locations[2 * i + 1];
  }
  memcpy(work.attention, head.weights + query * head.stride, sizeof(float) * levels.points);
  for (int64_t i = levels.points; i % kLanes != 0; ++i) work.x[i] = work.y[i] = work.attention[i] = -1.0f;
  const vint beyond = splat(static_cast<int32_t>(levels.pixels));
  for (int64_t i = 0; i < levels.points; i += kLanes) {
    const vfloat width = load(levels.width + i), height = load(levels.height + i);
    const Positions column = positions(load(work.x + i), width), row = positions(load(work.y + i), height);
    const vint columns = __builtin_convertvector(width, vint), rows = __builtin_convertvector(height, vint);
    // `positions` moves what is outside to the border pixels, of which it takes nothing else.
    const vint inside = ((column.first > 0) | (column.weight > 0.0f)) & ((row.first > 0) | (row.weight > 0.0f)) &
                        ((column.first < columns) | (column.weight < 1.0f)) &
                        ((row.first < rows) | (row.weight < 1.0f));
    const vint left = inside & (column.first > 0), right = inside & (column.first < columns);
    const vint upper = row.first > 0, lower = row.first < rows;
    const vint first = load(levels.start + i) + (row.first - 1) * columns + column.first - 1;
    store(work.pixel[0] + i, (upper & left) ? first : beyond);
    store(work.pixel[1] + i, (upper & right) ? first + 1 : beyond);
    store(work.pixel[2] + i, (lower & left) ? first + columns : beyond);
    store(work.pixel[3] + i, (lower & right) ? first + columns + 1 : beyond);
    const vfloat attention = masked(inside, load(work.attention + i));
    const vfloat of_lower = attention * row.weight, of_upper = attention * (1.0f - row.weight);
    store(work.weights[0] + i, of_upper * (1.0f - column.weight));
    store(work.weights[1] + i, of_upper * column.weight);
    store(work.weights[2] + i, of_lower * (1.0f - column.weight));
    store(work.weights[3] + i, of_lower * column.weight);
    store(work.attention + i, attention);
    store(work.right + i, column.weight);
    store(work.lower + i, row.weight);
  }
}

// The sums of the lanes of kLanes vectors.
inline vfloat sums_of_lanes(vfloat (&v)[kLanes]) {
  transpose(v);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) v[i] = v[i] + v[i + step];
  }
  return v[0];
}

// For kLanes points from `first` on: the products of the query's row with those of their pixels number `corner`.
inline vfloat products(const DeformableLevels& levels, const DeformableHead& head, int64_t first, int corner,
                       const Workspace& work) {
  const int64_t channels = levels.channels, count = levels.points - first;
  vfloat sums[kLanes] = {};
  for (int i = 0; i < kLanes && i < count; ++i) {
    const float* pixel = head.value + work.pixel[corner][first + i] * channels;
    for (int64_t c = 0; c < channels; c += kLanes) sums[i] = fma(load(pixel + c), load(work.row + c), sums[i]);
  }
  return sums_of_lanes(sums);
}

}  // namespace

void deformable_pack(const DeformableLevels& levels, const DeformableRows<const void>& value, float* plane) {
  const int64_t channels = levels.channels;
  for (int64_t i = 0; i < levels.pixels; ++i) load_row(value, i, levels.head_dim, plane + i * channels);
  memset(plane + levels.pixels * channels, 0, sizeof(float) * channels);
}

void deformable_unpack(const DeformableLevels& levels, const float* plane, int64_t begin, int64_t end,
                       const DeformableRows<void>& value) {
  for (int64_t i = begin; i < end; ++i) store_row(plane + i * levels.channels, value, i, levels.head_dim);
}

void deformable_attention_forward(const DeformableLevels& levels, const DeformableHead& head, int64_t begin,
                                  int64_t end, const Workspace& work, const DeformableRows<void>& out) {
  const int64_t channels = levels.channels;
  for (int64_t query = begin; query < end; ++query) {
    find_pixels(levels, head, query, work);
    for_groups(channels / kLanes, [&]<int V>(int64_t first) {
      const float* value = head.value + first * kLanes;
      vfloat upper[V] = {}, lower[V] = {};
      for (int64_t i = 0; i < levels.points; ++i) {
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
          const float* pixel = value + work.pixel[corner][i] * channels;
          const vfloat weight = splat(work.weights[corner][i]);
          vfloat* sums = corner < 2 ? upper : lower;
          for (int v = 0; v < V; ++v) sums[v] = fma(load(pixel + v * kLanes), weight, sums[v]);
        }
      }
      for (int v = 0; v < V; ++v) store(work.row + (first + v) * kLanes, upper[v] + lower[v]);
    });
    store_row(work.row, out, query, levels.head_dim);
  }
}

// With g = grad_out and the products d of g with the pixels' rows, in the order of their shares s:
//   d weight = sum s d,   d x = weight W (upper (d1 - d0) + lower (d3 - d2)),   d y = weight H (left (d2 - d0) +
//   right (d3 - d1)).
void deformable_attention_point_gradients(const DeformableLevels& levels, const DeformableHead& head, int64_t begin,
                                          int64_t end, const Workspace& work,
                                          const DeformableRows<const void>& grad_out, float* grad_locations,
                                          float* grad_weights) {
  for (int64_t query = begin; query < end; ++query) {
    find_pixels(levels, head, query, work);
    load_row(grad_out, query, levels.head_dim, work.row);
    for (int64_t i = 0; i < levels.points; i += kLanes) {
      vfloat d[4];
      for (int corner = 0; corner < 4; ++corner) d[corner] = products(levels, head, i, corner, work);
      const vfloat attention = load(work.attention + i), right = load(work.right + i), lower = load(work.lower + i);
      const vfloat left = 1.0f - right, upper = 1.0f - lower;
      store(work.grad_weight + i, upper * fma(right, d[1], left * d[0]) + lower * fma(right, d[3], left * d[2]));
      const vfloat across = fma(lower, d[3] - d[2], upper * (d[1] - d[0]));
      const vfloat down = fma(right, d[3] - d[1], left * (d[2] - d[0]));
      store(work.grad_x + i, attention * load(levels.width + i) * across);
      store(work.grad_y + i, attention * load(levels.height + i) * down);
    }
    const int64_t at = query * head.stride;
    memcpy(grad_weights + at, work.grad_weight, sizeof(float) * levels.points);
    for (int64_t i = 0; i < levels.points; ++i) {
      grad_locations[2 * (at + i)] = work.grad_x[i];
      grad_locations[2 * (at + i) + 1] = work.grad_y[i];
    }
  }
}

void deformable_attention_value_gradient(const DeformableLevels& levels, const DeformableHead& head, int64_t queries,
                                         int64_t first, int64_t last, const Workspace& work,
                                         const DeformableRows<const void>& grad_out, float* grad) {
  const int64_t channels = levels.channels;
  for (int64_t query = 0; query < queries; ++query) {
    find_pixels(levels, head, query, work);
    load_row(grad_out, query, levels.head_dim, work.row);
    for_groups((last - first) / kLanes, [&]<int V>(int64_t group) {
      const int64_t c = first + group * kLanes;
      vfloat row[V];
      for (int v = 0; v < V; ++v) row[v] = load(work.row + c + v * kLanes);
      for (int64_t i = 0; i < levels.points; ++i) {
        for (int corner = 0; corner < 4; ++corner) {
          float* pixel = grad + work.pixel[corner][i] * channels + c;
          const vfloat weight = splat(work.weights[corner][i]);
          for (int v = 0; v < V; ++v) store(pixel + v * kLanes, fma(row[v], weight, load(pixel + v * kLanes)));
        }
      }
    });
  }
}

}  // namespace fastmask::FASTMASK_SIMD
