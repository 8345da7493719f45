// Semantic inference of one image: score[k] = sum_n P[n, k] sigmoid(x_n), x_n the resampled mask logits, and argmax_k.
//
// Pixels are taken a strip of kStrip columns at a time, and row by row within it: the few rows of mask logits that a
// row of pixels reads are stretched to the strip's width once for all rows of pixels between them. Sigmoids and scores
// exist for kStrip pixels at a time.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "resample.h"
#include "simd.h"

namespace fastmask {

constexpr int64_t kStrip = kTapsPadding;
constexpr int64_t kClassBlock = 6;  // classes whose sums a register block holds at most

constexpr int64_t to_full_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Mask logits of one image: element offset + n * query_stride + row * row_stride + column.
struct MaskPlanes {
  const void* logits;
  Dtype dtype;
  int64_t offset, query_stride, row_stride;
  int64_t queries, rows, columns;
};

// Class probabilities of one image, in the layouts that the kernels read.
struct ClassTable {
  int64_t queries, classes;
  const float* blocks;  // for each block of R classes from k on: [queries, R] from element queries * k on
  const float* rows;    // [queries, to_full_vectors(classes)], 0 beyond the classes
  const float* peaks;   // [to_full_vectors(queries)], the largest probability of each query
};

// Results of one image, [rows, width]; null for what is not wanted.
struct SemanticMaps {
  int64_t rows, width;
  void* labels;
  int64_t label_bytes;  // 1, 2 or 4
  float* score;         // the winning class's
  float* margin;        // over the runner-up
  float* scores;        // [classes, rows, width]
};

// Floats of scratch memory for a table: blocks, rows and peaks.
constexpr int64_t class_table_floats(int64_t queries, int64_t classes) {
  return queries * (classes + to_full_vectors(classes)) + to_full_vectors(queries);
}

// Lays out probabilities [queries, classes].
FASTMASK_KERNEL(ClassTable make_class_table(const float* probabilities, int64_t queries, int64_t classes,
                                            float* memory))

// The largest logit of query n that each strip of pixels reads of each row, to cells[row, strip, n], and how many
// of its logits are NaN. `cells` has to_full_vectors(queries) elements for each row and strip, or is null.
FASTMASK_KERNEL(int64_t semantic_cells(const MaskPlanes& planes, int64_t n, const Taps& columns, float* cells,
                                       float* scratch))
constexpr int64_t cells_scratch(int64_t columns) { return to_full_vectors(columns) + 16; }

// The rows [begin, end) of one strip of pixels. With `cells`, queries that cannot change a label are left out where
// that is certain; labels stay the same, bit for bit.
FASTMASK_KERNEL(void semantic_strip(const MaskPlanes& planes, const ClassTable& table, const Taps& rows,
                                    const Taps& columns, int64_t strip, int64_t begin, int64_t end, const float* cells,
                                    const SemanticMaps& maps, float* scratch))

constexpr int64_t mask_strip_scratch(int64_t queries, int64_t columns, int row_taps) {
  return row_taps * (queries * kStrip + to_full_vectors(queries)) + to_full_vectors(columns) + 2 * kStrip;
}
constexpr int64_t semantic_scratch(int64_t queries, int64_t classes, int64_t columns, int row_taps) {
  return mask_strip_scratch(queries, columns, row_taps) + 5 * to_full_vectors(queries) + 2 * to_full_vectors(classes) +
         queries * (2 * kStrip + 16);
}

}  // namespace fastmask
