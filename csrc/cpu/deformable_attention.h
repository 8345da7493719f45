// Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, equation 3) of one head of one image, and its
// gradient.
//
// A head's pixels are copied to float rows of full vectors, followed by a row of zeros for pixels beyond the border. So
// every point reads four rows, whatever the strides and the type of the values, and neighboring rows are adjacent.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/logits.h"
#include "common/simd.h"

namespace fastmask {

// What all heads share. The points of a query are those of the first level, then of the second, and so on; the arrays
// hold the level of each point and are padded to full vectors.
struct DeformableLevels {
  int64_t pixels;    // of all levels
  int64_t points;    // of a query, in all levels
  int64_t head_dim;  // channels
  int64_t channels;  // of a row: head_dim, up to full vectors
  const float *width, *height;
  const int32_t* start;  // the level's first pixel
};

// Rows of a tensor in its own type, from element `offset` on, `stride` elements apart.
template <typename T>
struct DeformableRows {
  T* data;
  Dtype dtype;
  int64_t offset, stride;
};

// One head of one image; `stride` is the number of points between those of two queries.
struct DeformableHead {
  const float* value;      // [pixels + 1][channels]; null for the gradient of the values
  const float* locations;  // [queries][points][2], (x, y) in 0..1
  const float* weights;    // [queries][points]
  int64_t stride;
};

// The points of one query.
struct DeformableWorkspace {
  float *x, *y;
  float* attention;      // 0 for points outside
  float *right, *lower;  // the shares of the right and of the lower pixels around a point
  float* weights[4];     // of the pixels: attention times share
  int32_t* pixel[4];     // upper left, upper right, lower left, lower right; `pixels` beyond the border
  float* row;            // [channels] of the query
  float *grad_x, *grad_y, *grad_weight;

  void lay_out(Carver& carver, const DeformableLevels& levels) {
    const int64_t points = to_full_vectors(levels.points);
    for (float** array : {&x, &y, &attention, &right, &lower, &grad_x, &grad_y, &grad_weight}) {
      carver.take(*array, points);
    }
    for (int i = 0; i < 4; ++i) {
      carver.take(weights[i], points);
      carver.take(pixel[i], points);
    }
    carver.take(row, levels.channels);
  }
};

// Copies the pixels of a head to `plane`, which has (pixels + 1) * channels floats.
FASTMASK_KERNEL(void deformable_pack(const DeformableLevels& levels, const DeformableRows<const void>& value,
                                     float* plane))

// Writes pixels [begin, end) of a head from the rows of `plane`.
FASTMASK_KERNEL(void deformable_unpack(const DeformableLevels& levels, const float* plane, int64_t begin, int64_t end,
                                       const DeformableRows<void>& value))

// The output of queries [begin, end).
FASTMASK_KERNEL(void deformable_attention_forward(const DeformableLevels& levels, const DeformableHead& head,
                                                  int64_t begin, int64_t end, const DeformableWorkspace& work,
                                                  const DeformableRows<void>& out))

// The gradients of the locations and weights of queries [begin, end), laid out as these.
FASTMASK_KERNEL(void deformable_attention_point_gradients(const DeformableLevels& levels, const DeformableHead& head,
                                                          int64_t begin, int64_t end, const DeformableWorkspace& work,
                                                          const DeformableRows<const void>& grad_out,
                                                          float* grad_locations, float* grad_weights))

// Adds the gradients of channels [first, last) of the values, multiples of a full vector, to `grad`, which has
// (pixels + 1) * channels floats. Queries come in order; the last row is what falls beyond the border.
FASTMASK_KERNEL(void deformable_attention_value_gradient(const DeformableLevels& levels, const DeformableHead& head,
                                                         int64_t queries, int64_t first, int64_t last,
                                                         const DeformableWorkspace& work,
                                                         const DeformableRows<const void>& grad_out, float* grad))

}  // namespace fastmask
